"""Files that are written whole or not at all, and paths that are not files."""

import os
import stat
import threading
from pathlib import Path

import pytest

from emlocal.errors import EmlocalError
from emlocal.files import atomic_folder, atomic_path, atomic_writer


def test_a_file_appears_whole_with_the_usual_permissions(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    before = os.umask(0o022)
    try:
        with atomic_writer(path) as file:
            file.write("höflich\n")
            assert not path.exists()
    finally:
        os.umask(before)
    assert path.read_bytes() == "höflich\n".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted() -> None:
        with atomic_writer(path) as file:
            file.write("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    with atomic_writer(link) as file:
        file.write("new")
    assert link.is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_a_pipe_stays_a_pipe(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(path.read_text()))
    reader.start()
    with atomic_writer(path) as file:
        file.write("through")
    reader.join(10)
    assert read == ["through"]
    assert stat.S_ISFIFO(path.stat().st_mode)


@pytest.mark.parametrize("name", ["none/a.txt", "."])
def test_what_cannot_be_written_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(EmlocalError, match="cannot write"), atomic_writer(tmp_path / name):
        pytest.fail("the block must not run")


def test_a_full_device(tmp_path: Path) -> None:
    with pytest.raises(EmlocalError, match="No space left"), atomic_writer(Path("/dev/full")) as file:
        file.write("x" * 100_000)


def test_a_file_written_by_others_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
        assert temporary.parent == path.parent
    assert path.read_bytes() == b"new"

    def interrupted() -> None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_folder_appears_whole_with_the_usual_permissions(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    before = os.umask(0o022)
    try:
        with atomic_folder(folder) as temporary:
            (temporary / "a").write_text("1")
            (temporary / "b").write_text("2")
            assert not folder.exists()
    finally:
        os.umask(before)
    assert {p.name: p.read_text() for p in folder.iterdir()} == {"a": "1", "b": "2"}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert stat.S_IMODE((folder / "a").stat().st_mode) == 0o644
    assert [p.name for p in folder.parent.iterdir()] == ["folder"]


def interrupted_folder(folder: Path, *, replace: bool) -> None:
    with atomic_folder(folder, replace=replace) as temporary:
        (temporary / "a").write_text("1")
        raise KeyboardInterrupt


def test_an_interrupted_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted_folder(tmp_path / "folder", replace=False)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").write_text("1")
    with pytest.raises(EmlocalError, match="exists already"), atomic_folder(folder):
        pytest.fail("the block must not run")
    with pytest.raises(KeyboardInterrupt):
        interrupted_folder(folder, replace=True)
    assert [p.name for p in folder.iterdir()] == ["old"]
    with atomic_folder(folder, replace=True) as temporary:
        (temporary / "new").write_text("2")
    assert [p.name for p in folder.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_folder_below_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EmlocalError, match="cannot write"), atomic_folder(tmp_path / "file" / "x"):
        pytest.fail("the block must not run")
