"""Memory: the arithmetic compared with hand-made numbers, the refusal, and control groups as files."""

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from emlocal.errors import ModelError
from emlocal.models import memory
from emlocal.models.gguf import GGUFHeader, read_header
from tests.tiny_gguf import u32, write_tiny_gguf


@pytest.fixture
def header(tmp_path: Path) -> GGUFHeader:
    return read_header(write_tiny_gguf(tmp_path / "tiny.gguf"))


def test_kv_cache_is_keys_and_values_of_every_layer(header: GGUFHeader) -> None:
    # 1 layer, 2 key-value heads of 8, keys and values, 2 bytes each
    assert memory.kv_bytes(header, 100) == 100 * 1 * 2 * (8 + 8) * 2
    assert memory.kv_bytes(header, 100, kv_type_bytes=34 / 32) == 3400


def test_keys_and_values_of_a_size_of_their_own(tmp_path: Path) -> None:
    uneven = write_tiny_gguf(
        tmp_path / "m.gguf", llama__attention__key_length=u32(8), llama__attention__value_length=u32(8)
    )
    assert memory.kv_bytes(read_header(uneven), 1) == 2 * (8 + 8) * 2


def test_estimate_grows_with_context_and_sequences(header: GGUFHeader) -> None:
    one = memory.estimate(header, 256)
    assert one > header.weights_bytes + memory.kv_bytes(header, 256)
    more = memory.estimate(header, 256, n_seqs=8)
    assert more - one == memory.kv_bytes(header, 7 * 256) + 7 * 4 * header.vocab_size


def test_enough_memory(header: GGUFHeader) -> None:
    assert memory.check_memory(header, 256) == memory.estimate(header, 256)


def test_too_little_memory_says_both_numbers_and_what_fits(header: GGUFHeader) -> None:
    free = memory.available()
    tokens = 2 * free // memory.kv_bytes(header, 1)
    with pytest.raises(
        ModelError, match=rf"Tiny with a context of {tokens:,} needs .* GB of memory, but .* GB is free"
    ) as caught:
        memory.check_memory(header, tokens)
    fitting = int(caught.value.hint.rsplit(" ", 1)[1])
    assert 0.9 * free < memory.estimate(header, fitting) < 1.1 * free


def test_a_model_too_large_for_any_context(header: GGUFHeader) -> None:
    info = replace(header.tensors["token_embd.weight"], nbytes=1 << 50)
    huge = replace(header, tensors=MappingProxyType({**header.tensors, info.name: info}))
    with pytest.raises(ModelError, match=r"needs 1125900\.0 GB") as caught:
        memory.check_memory(huge, 256)
    assert "use a smaller model" in caught.value.hint


def test_there_is_memory_here() -> None:
    assert 50_000_000 < memory.available() < 1 << 50


def write_group(folder: Path, limit: str, used: int, cached: int, version: int) -> None:
    names = {2: ("memory.max", "memory.current"), 1: ("memory.limit_in_bytes", "memory.usage_in_bytes")}[
        version
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    prefix = "" if version == 2 else "total_"
    (folder / "memory.stat").write_text(f"anon 1\n{prefix}inactive_file {cached}\n")


@pytest.mark.parametrize(("version", "line", "top"), [(2, "0::/a/b", ""), (1, "4:memory:/a/b", "memory")])
def test_the_tightest_control_group_counts(tmp_path: Path, version: int, line: str, top: str) -> None:
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    own.write_text(f"12:cpu,cpuacct:/elsewhere\n{line}\n")
    write_group(root / top / "a" / "b", "max" if version == 2 else str((1 << 63) - 4096), 5, 0, version)
    assert memory._cgroup_left(root, own) >= 1 << 60
    write_group(root / top / "a", "1000", 600, 100, version)
    assert memory._cgroup_left(root, own) == 500
    write_group(root / top, "300", 600, 0, version)
    assert memory._cgroup_left(root, own) == 0


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert memory._cgroup_left(tmp_path, tmp_path / "nothing") >= 1 << 60


def test_only_layers_with_full_attention_have_a_cache(header: GGUFHeader) -> None:
    eight = replace(header, metadata=MappingProxyType({**header.metadata, "llama.block_count": 8}))
    every = replace(eight, metadata=MappingProxyType({**eight.metadata, "llama.full_attention_interval": 4}))
    assert every.cached_heads == (0, 0, 0, 2, 0, 0, 0, 2)
    assert every.head_count_kv == (2,) * 8
    assert memory.kv_bytes(eight, 10) == 4 * memory.kv_bytes(every, 10)
    shared = {**eight.metadata, "llama.attention.shared_kv_layers": 5}
    assert replace(eight, metadata=MappingProxyType(shared)).cached_heads == (2, 2, 2, 0, 0, 0, 0, 0)
