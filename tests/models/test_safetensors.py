"""The safetensors header: the error cases of the reference implementation, with one line each."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from emlocal.errors import ModelError
from emlocal.models.safetensors import read_safetensors_header

TWO = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def build(header: object, data: int = 32, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data)


def changed(name: str, **fields: Any) -> dict[str, Any]:
    return TWO | {name: TWO[name] | fields}


def complaint(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(ModelError) as caught:
        read_safetensors_header(path)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_a_sound_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(build({"__metadata__": {"format": "pt"}} | TWO))
    header = read_safetensors_header(path)
    assert header.metadata == {"format": "pt"}
    assert header.tensors["a"].shape == (2, 3)
    start = path.stat().st_size - 32
    assert (header.tensors["a"].offset, header.tensors["b"].offset) == (start, start + 24)
    path.write_bytes(build({"s": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, data=4))
    assert read_safetensors_header(path).tensors["s"].shape == ()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "header has 0 bytes, the file 0"),
        (b"1234567", "header has 0 bytes, the file 7"),
        (build(TWO, length=1 << 40), "header has 1,099,511,627,776 bytes"),
        (build(TWO, length=(1 << 64) - 1), "header has 18,446,744,073,709,551,615 bytes"),
        (build(b"{not json}"), "is not JSON"),
        (build(b"\xff\xfe{}"), "is not JSON"),
        (build(b"[" * 100_000), "is not JSON"),
        (build([1]), "is not a table"),
        (build(b'{"a": 1, "a": 2}'), "has a duplicate name"),
        (build({"__metadata__": {"a": 1}}, data=0), "not a table of strings"),
        (build({"a": 1}), "tensor a lacks"),
        (build(changed("a", dtype="F7")), "tensor a lacks"),
        (build(changed("a", dtype=["F32"])), "tensor a lacks"),
        (build(changed("a", shape=[-2, -3])), "tensor a lacks"),
        (build(changed("a", shape=[2.0, 3])), "tensor a lacks"),
        (build(changed("a", data_offsets=[0])), "tensor a lacks"),
        (build(changed("a", shape=[2, 4])), "tensor a has 24 bytes for 2 × 4 of F32"),
        (build(changed("a", shape=[1 << 62, 1 << 62])), "tensor a has 24 bytes for"),
        (build(changed("b", data_offsets=[20, 28])), "tensor b starts at byte"),
        (build(changed("b", data_offsets=[28, 36]), data=36), "tensor b starts at byte"),
        (build(TWO, data=31), "but the file has"),
        (build(TWO, data=33), "but the file has"),
    ],
)
def test_unsound_files(tmp_path: Path, data: bytes, words: str) -> None:
    assert words in complaint(tmp_path / "m.safetensors", data)


def test_mutants_are_accepted_or_refused_in_one_line(tmp_path: Path) -> None:
    rng, path, refused = random.Random(0), tmp_path / "m.safetensors", 0
    for _ in range(3000):
        data = bytearray(build(TWO))
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data) - 32)] = rng.randrange(256)
        path.write_bytes(data)
        try:
            read_safetensors_header(path)
        except ModelError as error:
            refused += error.message.isprintable()
    assert refused > 2000
