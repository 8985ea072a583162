"""A model in several files: read as one, or refused in one line."""

from pathlib import Path

from emlocal.models.gguf import read_header
from tests.models.gguf.test_file import complaint
from tests.tiny_gguf import build, i32, tiny_metadata, tiny_tensors, u16, u32, write_tiny_gguf


def write_shards(folder: Path, stem: str = "tiny", counts: tuple[int, ...] = (4, 4, 3)) -> list[Path]:
    """The tiny model in three shards, as llama-gguf-split would write it."""
    tensors, paths, start = tiny_tensors(), [], 0
    for number, count in enumerate(counts):
        split = {
            "split.no": u16(number),
            "split.count": u16(len(counts)),
            "split.tensors.count": i32(len(tensors)),
        }
        metadata = (tiny_metadata() if number == 0 else {}) | split
        path = folder / f"{stem}-{number + 1:05d}-of-{len(counts):05d}.gguf"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(build(metadata, tensors[start : start + count]))
        paths.append(path)
        start += count
    return paths


def test_shards_are_read_as_one_from_any_of_them(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    whole = read_header(write_tiny_gguf(tmp_path / "whole.gguf"))
    for path in paths:
        header = read_header(path)
        assert header.path == paths[0]
        assert header.files == tuple(paths)
        assert header.weights_bytes == whole.weights_bytes
        assert header.file_size == sum(p.stat().st_size for p in paths)
        assert {t.file for t in header.tensors.values()} == set(paths)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    paths[1].unlink()
    assert "tiny-00002-of-00003.gguf is missing" in complaint(paths[0])


def test_shards_that_disagree(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    paths[2].write_bytes(paths[1].read_bytes())
    assert "split.no is 1, but by its name it is 2" in complaint(paths[0])
    paths = write_shards(tmp_path, counts=(4, 4, 2))
    assert "split.tensors.count is 11, but the shards hold 10" in complaint(paths[0])
    tensors = tiny_tensors()
    split = {"split.no": u16(2), "split.count": u16(3)}
    paths[2].write_bytes(build(split, tensors[:3]))
    assert "token_embd.weight is also in tiny-00001-of-00003.gguf" in complaint(paths[0])
    # llama.cpp asserts the type of split.no
    paths[2].write_bytes(build({"split.no": u32(2)}, tensors[8:]))
    assert "split.no is 2" in complaint(paths[0])
