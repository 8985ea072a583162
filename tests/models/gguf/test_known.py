"""A checked file is not checked again unless it changed; everything else is checked."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from emlocal.errors import ModelError
from emlocal.models import gguf as reading
from emlocal.models.gguf import file, read_header
from tests.tiny_gguf import write_tiny_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache file's path, in a folder of this test; tiny vocabularies count as large."""
    monkeypatch.setenv("EMLOCAL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(file, "LARGE", 1)
    return tmp_path / "cache" / "checked-headers.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose tokens were checked."""
    names: list[str] = []
    real = reading.check_tokens
    monkeypatch.setattr(
        reading, "check_tokens", lambda header, data: (names.append(header.path.name), real(header, data))
    )
    return names


def test_a_header_is_checked_once_and_read_the_same(model: Path, checked: list[str]) -> None:
    first, second = read_header(model), read_header(model)
    assert checked == ["tiny.gguf"]
    assert first == second
    assert first.array("tokenizer.ggml.tokens") == second.array("tokenizer.ggml.tokens")


def test_a_file_that_changed_within_one_tick_is_checked_again(model: Path, checked: list[str]) -> None:
    """Path, size, inode and times are equal: only the content differs."""
    read_header(model)
    before, data = model.stat(), model.read_bytes()
    twice = data.replace(b"<0x41>", b"<0x42>", 1)
    assert twice != data
    with model.open("r+b") as file:
        file.write(twice)
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = model.stat()
    assert (after.st_size, after.st_ino, after.st_mtime_ns) == (
        before.st_size,
        before.st_ino,
        before.st_mtime_ns,
    )
    with pytest.raises(ModelError, match="<0x42> appears twice"):
        read_header(model)
    assert checked == ["tiny.gguf"] * 2


def test_other_metadata_are_another_header(model: Path, checked: list[str]) -> None:
    read_header(model)
    write_tiny_gguf(model, chat_template="{{ messages[0].content }}")
    assert read_header(model).chat_template == "{{ messages[0].content }}"
    read_header(model)
    assert checked == ["tiny.gguf"] * 2


def test_a_shorter_file_is_refused(model: Path) -> None:
    read_header(model)
    whole = model.read_bytes()
    for size in (len(whole) - 1, 4000, 10, 0):
        model.write_bytes(whole[:size])
        with pytest.raises(ModelError):
            read_header(model)


def test_what_is_refused_is_not_remembered(tmp_path: Path, cache: Path) -> None:
    path = write_tiny_gguf(tmp_path / "bad.gguf")
    path.write_bytes(path.read_bytes().replace(b"<0x41>", b"<0x42>", 1))
    for _ in range(2):
        with pytest.raises(ModelError, match="appears twice"):
            read_header(path)
    assert not cache.exists()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"x": 1}'])
def test_a_damaged_cache_is_ignored_and_written_anew(
    model: Path, cache: Path, checked: list[str], damage: bytes
) -> None:
    read_header(model)
    cache.write_bytes(damage)
    read_header(model)
    read_header(model)
    assert checked == ["tiny.gguf"] * 2


@pytest.mark.parametrize(
    "change",
    [
        {"length": -1},
        {"length": 1 << 60},
        {"length": "all"},
        {"extents": {}},
        {"extents": {"tokenizer.ggml.tokens": 8}},
        {"extents": {"tokenizer.ggml.tokens": -8}},
        {"extents": None},
        {"digest": None},
        {"digest": "0" * 64},
    ],
)
def test_a_false_entry_is_ignored(
    model: Path, cache: Path, checked: list[str], change: dict[str, Any]
) -> None:
    header = read_header(model)
    (entry,) = json.loads(cache.read_text()).values()
    cache.write_text(json.dumps({str(model): entry | change}))
    assert read_header(model) == header
    assert checked == ["tiny.gguf"] * 2


@pytest.mark.parametrize("name", ["__version__", "CHECKS"])
def test_other_checks_check_again(
    model: Path, checked: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    read_header(model)
    monkeypatch.setattr(file, name, 999)
    read_header(model)
    assert checked == ["tiny.gguf"] * 2


def test_a_folder_that_cannot_be_written_to(model: Path, checked: list[str], cache: Path) -> None:
    cache.parent.write_text("a file is here")
    read_header(model)
    read_header(model)
    assert checked == ["tiny.gguf"] * 2


def test_the_oldest_is_forgotten(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "_MOST", 2)
    paths = [write_tiny_gguf(tmp_path / f"{i}.gguf") for i in range(3)]
    for path in paths:
        read_header(path)
    assert list(json.loads(cache.read_text())) == [str(p) for p in paths[1:]]


def test_small_vocabularies_are_not_worth_it(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file, "LARGE", 10_000)
    read_header(model)
    assert not cache.exists()
