"""GGUF files with one fault: each key that llama.cpp knows, each tensor, alone and in small combinations.

emlocal must refuse a file in one line. If it accepts one, the real library loads it in a separate process and
either computes three rows of logits or refuses it with an error.

    pytest -m attack tests/attack/test_gguf.py       all of it: hours on two cores
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from math import prod
from pathlib import Path

import pytest

from emlocal.errors import ModelError
from emlocal.models.gguf import read_header
from emlocal.models.gguf.keys import CHECKED
from emlocal.models.gguf.types import TENSOR_TYPES
from tests.models.gguf.alone import Changed, keys_of_llama_cpp, with_one_key_changed, with_one_tensor_changed
from tests.models.gguf.loading import Worker, accepted
from tests.models.gguf.mutants import mutant
from tests.tiny_architectures import (
    ARCHITECTURES,
    architecture_metadata,
    architecture_tensors,
    general_architecture,
)
from tests.tiny_gguf import Tensor, Value, build, ints, u32

RANDOM = 100_000
STEP = 613
"""The normal tests load one in this many files of the walk."""
WORST = ("_swa", "sliding_window_pattern", "rope.dimension_count")
"""Endings of keys that have crashed or hung the process.

The normal tests take every third value of those that an architecture reads.
"""

File = tuple[str, bytes]
"""The change that was made, and the file's bytes."""


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


def survivors_only(files: Iterable[File], path: Path, worker: Worker) -> Counter[str]:
    """Reads all files and loads the accepted ones; asserts that none crashes or hangs.

    Returns counted verdicts.
    """
    verdicts, crashes = Counter[str](), []
    for done, data in files:
        path.write_bytes(data)
        verdict = worker.load(path) if accepted(path) else "not accepted"
        verdicts[verdict.split()[0]] += 1
        if verdict.startswith("killed"):
            crashes.append(f"{done}: {verdict}")
    print(f"{verdicts.total():,} files: {dict(verdicts)}")
    assert not crashes
    return verdicts


def written(files: Iterable[Changed]) -> Iterator[File]:
    return ((file.what, build(file.metadata, file.tensors)) for file in files)


def whole_walk(architecture: str) -> Iterator[Changed]:
    return chain(with_one_key_changed(architecture), with_one_tensor_changed(architecture))


def random_files(count: int) -> Iterator[File]:
    return ((f"random {seed}", mutant(seed)) for seed in range(count))


def test_the_checked_architectures_are_those_that_are_walked() -> None:
    assert {general_architecture(name) for name in ARCHITECTURES} == set(CHECKED)
    known = {name.removeprefix("%s.") for name in keys_of_llama_cpp()}
    assert len(known) > 200
    for rules in CHECKED.values():
        assert set(rules) <= known  # otherwise the table has a key that llama.cpp does not read


@pytest.mark.real
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_part_of_the_walk(architecture: str, tmp_path: Path, worker: Worker) -> None:
    """Takes a third of the values of the worst keys, and an even selection of all others."""
    read = CHECKED[general_architecture(architecture)]
    prefix = f"{architecture}: {general_architecture(architecture)}."
    worst = {f"{prefix}{key}" for key in read if key.endswith(WORST)}
    values = (f for f in with_one_key_changed(architecture) if f.what.partition(" = ")[0] in worst)
    files = chain(islice(values, None, None, 3), islice(whole_walk(architecture), None, None, STEP))
    verdicts = survivors_only(written(files), tmp_path / "file.gguf", worker)
    assert verdicts["decoded"] > 30
    assert verdicts["not"] > 80


@pytest.mark.attack
@pytest.mark.real
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_whole_walk(architecture: str, tmp_path: Path, worker: Worker) -> None:
    survivors_only(written(whole_walk(architecture)), tmp_path / "file.gguf", worker)


@pytest.mark.attack
@pytest.mark.real
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_accepted_can_be_used(architecture: str, tmp_path: Path) -> None:
    """Tests the keys that the architecture reads in emlocal's contexts: shared and not, with forks."""
    name = general_architecture(architecture)
    read = {f"{architecture}: {name}.{key}" for key in CHECKED[name]}
    files = (f for f in with_one_key_changed(architecture) if f.what.partition(" = ")[0] in read)
    worker = Worker("emlocal_worker")
    try:
        verdicts = survivors_only(written(files), tmp_path / "file.gguf", worker)
    finally:
        worker.close()
    assert verdicts["answered"] > 100


@pytest.mark.attack
@pytest.mark.real
def test_a_hundred_thousand_at_random(tmp_path: Path, worker: Worker) -> None:
    survivors_only(random_files(RANDOM), tmp_path / "file.gguf", worker)


def changed(architecture: str, without: str = "", **keys: Value | None) -> bytes:
    """Returns a sound model with these keys changed (`__` is a dot.

    None: gone) and without tensors of this name.
    """
    metadata = dict(architecture_metadata(architecture))
    for name, value in keys.items():
        key = f"{general_architecture(architecture)}.{name.replace('__', '.')}"
        metadata.pop(key, None)
        if value is not None:
            metadata[key] = value
    tensors = architecture_tensors(architecture)
    return build(metadata, [t for t in tensors if not without or without not in t.name])


FOUND: dict[str, tuple[bytes, str]] = {
    "a rotated size of 0 in layers with a window": (
        changed("gemma3", rope__dimension_count_swa=u32(0)),
        "gemma3.rope.dimension_count_swa is 0",
    ),
    "an odd one": (
        changed("gemma3", rope__dimension_count_swa=u32(7)),
        "rope.dimension_count_swa is 7, an odd number",
    ),
    "one larger than a head": (
        changed("gemma3", rope__dimension_count_swa=u32(16)),
        "dimension_count_swa is 16",
    ),
    "no layer with the window": (
        changed("gemma3", attention__sliding_window_pattern=u32(1)),
        "attention.sliding_window_pattern is 1: no layer has a window",
    ),
    "an array of zeros": (
        changed("gemma2", attention__sliding_window_pattern=ints([0, 0])),
        "attention.sliding_window_pattern is (0, 0): no layer has a window",
    ),
    "neither form of Q, K and V": (changed("phi3", "attn_qkv"), "layer 0 has no attn_qkv.weight"),
    "all of a head is rotated": (
        changed("deepseek2", rope__dimension_count=None),
        "of 12 numbers of a head's key all 20 are rotated",
    ),
    "key-value heads that differ": (
        changed("deepseek2", attention__head_count_kv=ints([1, 2])),
        "layer 1 has 4 attention heads for 2 key-value heads, the first layer 4 for 1",
    ),
    "windowed heads of another size": (
        changed("gemma3", attention__key_length_swa=u32(16)),
        "attention.key_length_swa is 16, but heads without a window have 8",
    ),
}


@pytest.mark.parametrize("what", FOUND)
def test_what_an_attack_found_is_one_line(what: str, tmp_path: Path) -> None:
    """Tests the files of the page, made here, and similar ones."""
    data, complaint = FOUND[what]
    path = tmp_path / "file.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError) as caught:
        read_header(path)
    assert complaint in caught.value.message
    assert caught.value.message.isprintable()


def test_vectors_are_of_one_type(tmp_path: Path) -> None:
    """Tests mamba, whose ssm_d is a vector in all but its name."""
    tensors = architecture_tensors("mamba")
    for tensor in tensors:
        if tensor.name.endswith("ssm_d"):
            tensor.type, tensor.data = 30, tensor.data[: len(tensor.data) // 2]
    path = tmp_path / "file.gguf"
    path.write_bytes(build(architecture_metadata("mamba"), tensors))
    with pytest.raises(ModelError, match="ssm_d is of type BF16, not F32"):
        read_header(path)


WIDE = 256
"""Row length, which is the block length of the quantized types with the longest blocks."""


def wide_model(type_: int, of: str, fill: bytes) -> bytes:
    """Returns a llama model with rows of 256 whose matrices with `of` in their names have this type."""
    sizes = {"context_length": 256, "embedding_length": WIDE, "block_count": 1, "feed_forward_length": WIDE}
    sizes |= {"attention.head_count": 4, "attention.head_count_kv": 4, "rope.dimension_count": WIDE // 4}
    metadata = architecture_metadata("llama") | {f"llama.{name}": u32(n) for name, n in sizes.items()}
    tensors = []
    for tensor in architecture_tensors("llama"):
        rows = tensor.shape[1:] if "token_embd" in tensor.name else (WIDE,) * (len(tensor.shape) - 1)
        shape = (WIDE, *rows)
        chosen = type_ if of in tensor.name and len(shape) > 1 else 0
        _, block, size = TENSOR_TYPES[chosen]
        count = prod(shape) // block * size
        tensors.append(Tensor(tensor.name, shape, (fill * count)[:count], chosen))
    return build(metadata, tensors)


@pytest.mark.real
def test_weights_of_every_type(tmp_path: Path, worker: Worker) -> None:
    """Includes types with long blocks, which do not fit the small models."""
    verdicts = survivors_only(
        (
            (f"{TENSOR_TYPES[code][0]} for {of}, filled with {fill.hex()}", wide_model(code, of, fill))
            for code in TENSOR_TYPES
            for of, fill in (("token_embd", b"\0"), ("attn_", b"\x5a\x13\xc7"), ("ffn_", b"\x5a\x13\xc7"))
        ),
        tmp_path / "file.gguf",
        worker,
    )
    assert verdicts["decoded"] > 75
