"""Files and folders: emlocal's own places, files that are whole or not there, strangers' files.

emlocal's own places hold no models of the hub: those stay in the Hugging Face cache. For downloads there are
a way to report progress, a look at the room on the disk, and plain words for disk errors.

Files that come from somebody else are opened only where they are plain files, and read only so far. A folder
out of git or an archive may have links in it: to a device that never ends, or to a pipe, which keeps whoever
opens it waiting. Its size in `stat` says nothing about either.
"""

import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO, TextIO

import platformdirs

from emlocal.errors import EmlocalError, ModelError
from emlocal.text import human_size


@contextmanager
def atomic_writer(path: Path, *, private: bool = False) -> Iterator[TextIO]:
    """A text file (UTF-8) that appears under its name when the block ends, or not at all if it raises.

    A symbolic link is followed; what is no regular file (a pipe, a device) is written to as it is. A
    `private` file is for its owner only.

    Raises EmlocalError where the file cannot be written (no such folder, read-only, disk full).
    """
    try:
        if path.exists() and not path.is_file():
            with path.open("w", encoding="utf-8") as stream:
                yield stream
            return
        with (
            atomic_path(path, private=private) as temporary,
            temporary.open("w", encoding="utf-8", newline="\n") as file,
        ):
            yield file
    except OSError as why:
        raise EmlocalError(f"cannot write {path}: {why.strerror or why}") from why


@contextmanager
def atomic_path(path: Path, *, private: bool = False) -> Iterator[Path]:
    """A file beside `path` for someone else's code to write, which gets the name `path` when the block ends.

    If the block raises there is no trace of it, and what `path` was it still is. A symbolic link is followed.

    Raises EmlocalError where the file cannot be written.
    """
    temporary: Path | None = None
    try:
        target = path.resolve()
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        temporary = Path(name)
        os.close(descriptor)
        yield temporary
        if not private:  # as `mkstemp` makes it
            temporary.chmod(_usual_mode())
        put_in_place(temporary, target)
    except OSError as why:
        raise EmlocalError(f"cannot write {path}: {why.strerror or why}") from why
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder beside `folder` to put files into, which gets the name `folder` when the block ends.

    If the block raises there is no trace of it. With `replace` a folder that is there already is moved out
    of the way in the same moment and removed; a process killed in that moment leaves it under a name that
    ends in `.old`, never a mixture of the two. The folders above are made.

    Raises EmlocalError where `folder` exists and is not to be replaced, or where nothing can be written.
    """
    temporary: Path | None = None
    try:
        target = folder.resolve()
        if target.exists() and not (replace and target.is_dir()):
            raise EmlocalError(f"{folder} exists already", "choose another name, or remove it first")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        yield temporary
        for file in temporary.iterdir():
            file.chmod(_usual_mode())
        temporary.chmod(_usual_mode(0o777))
        old = temporary.with_suffix(".old")
        if target.exists():
            target.rename(old)
        try:
            put_folder_in_place(temporary, target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as why:
        raise EmlocalError(f"cannot write {folder}: {why.strerror or why}") from why
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(temporary: Path, target: Path) -> None:
    """Rename a file, so that after a power cut the whole of it is there under its new name, or none of it."""
    _sync_file(temporary)
    temporary.replace(target)
    sync_folder(target.parent)


def put_folder_in_place(temporary: Path, target: Path) -> None:
    """The same for a folder of files, where nothing is called `target` yet."""
    for file in temporary.iterdir():
        _sync_file(file)
    sync_folder(temporary)
    temporary.rename(target)
    sync_folder(target.parent)


@contextmanager
def only_one(lock: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file within this block; `waiting` is called each second that another process holds it.

    The system lets go of it when a process dies, so it cannot be stale.
    """
    from filelock import FileLock, Timeout

    held = FileLock(lock)
    while True:
        try:
            held.acquire(timeout=1)
            break
        except Timeout:
            waiting()
    try:
        yield
    finally:
        held.release()


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make durable which files the folder has: a new name can be lost in a power failure until then."""
    if sys.platform != "win32":  # which opens no folders, and whose file system journals names by itself
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as why:
            if why.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such thing
                raise
        finally:
            os.close(descriptor)


def _usual_mode(wanted: int = 0o666) -> int:
    """The permissions that a new file gets; the system tells its mask only to who sets it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return wanted & ~mask


if sys.platform == "win32":
    _FLAGS = os.O_RDONLY | os.O_BINARY | os.O_NOINHERIT
else:
    _FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY  # a pipe put here after the first look does not wait


def open_regular(path: Path) -> BinaryIO:
    """The file `path`, or the one that it is a link to, open for reading.

    Raises ModelError for a pipe, a device, a socket or a folder; OSError where it cannot be opened.
    """
    _check_regular(path, path.stat().st_mode)  # before it is opened: that alone can set off a device
    file = os.fdopen(os.open(path, _FLAGS), "rb")
    try:
        _check_regular(path, os.fstat(file.fileno()).st_mode)
    except BaseException:
        file.close()
        raise
    return file


def read_regular(path: Path, most: int) -> bytes:
    """All of a regular file of at most `most` bytes.

    Raises ModelError for a longer one and for what `open_regular` refuses; OSError where it cannot be read.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ModelError(f"{path} has more than {most:,} bytes, which is not read", hint="get the file again")
    return data


def _check_regular(path: Path, mode: int) -> None:
    if not S_ISREG(mode):
        raise ModelError(
            f"{path} is not a regular file",
            hint="put a file there, not a pipe, a device or a folder",
        )


MAX_JSON_BYTES = 256 << 20  # the largest tokenizer.json known (Gemma 3) has 33 MB
MAX_TEMPLATE_BYTES = 1 << 20


def read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    """A JSON table; empty if the file is not there and not required. Raises ModelError."""
    raw = _read(path, MAX_JSON_BYTES)
    if raw is None and not required:
        return {}
    if raw is None:
        raise ModelError(f"{path.parent} has no {path.name}", hint="get that file too")
    try:
        table = json.loads(raw)
    except (ValueError, RecursionError):
        raise ModelError(f"{path} is not JSON", hint="get the file again") from None
    if not isinstance(table, dict):
        raise ModelError(f"{path} is not a JSON table", hint="get the file again")
    return table


def read_chat_template(folder: Path) -> str | None:
    """chat_template.jinja, else the `chat_template` (the one called "default", of several) of
    tokenizer_config.json. Raises ModelError for one of more than 1 MiB."""
    raw = _read(folder / "chat_template.jinja", MAX_TEMPLATE_BYTES)
    if raw is not None:
        return raw.decode("utf-8", "replace") or None
    said = read_json(folder / "tokenizer_config.json", required=False).get("chat_template")
    if isinstance(said, list):
        named = {t.get("name"): t.get("template") for t in said if isinstance(t, dict)}
        said = named.get("default")
    if not isinstance(said, str):
        return None
    if len(said) > MAX_TEMPLATE_BYTES:
        raise ModelError(
            f"the chat template of {folder} has {len(said):,} characters", hint="use another model"
        )
    return said or None


def _read(path: Path, most: int) -> bytes | None:
    """None where there is no such file."""
    try:
        return read_regular(path, most)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error


def cache_dir() -> Path:
    """What can be fetched again: the starter model, weights converted for engines. EMLOCAL_CACHE_DIR."""
    return _chosen("EMLOCAL_CACHE_DIR") or platformdirs.user_cache_path("emlocal", appauthor=False)


def config_dir() -> Path:
    """What people write: config.toml. EMLOCAL_CONFIG_DIR."""
    return _chosen("EMLOCAL_CONFIG_DIR") or platformdirs.user_config_path("emlocal", appauthor=False)


def data_dir() -> Path:
    """What emlocal writes and nothing can bring back: conversations, adapters. EMLOCAL_DATA_DIR."""
    return _chosen("EMLOCAL_DATA_DIR") or platformdirs.user_data_path("emlocal", appauthor=False)


def _chosen(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value).expanduser() if value else None


Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, the bytes done, and the bytes in all (None: not known)."""


def silent(label: str, done: int, total: int | None) -> None:
    """A Progress that says nothing."""


def nearest(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise ModelError if `folder` (which need not exist yet) has fewer than `needed` bytes free."""
    free = shutil.disk_usage(nearest(folder)).free
    if free < needed:
        raise ModelError(
            f"{what} needs {human_size(needed)} of disk, but {folder} has {human_size(free)} free",
            hint="free some space, or remove models you no longer use: emlocal models rm NAME",
        )


@contextmanager
def disk_errors(folder: Path, variable: str) -> Iterator[None]:
    """Turn OSErrors of writing under `folder` (moved by `variable` of the environment) into ModelErrors."""
    try:
        yield
    except OSError as error:
        move = f"or keep models elsewhere: {variable}=/another/folder"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelError(f"the disk of {folder} is full", hint=f"free some space, {move}") from error
        why = error.strerror or str(error)
        raise ModelError(f"cannot write to {folder}: {why}", hint=f"make it writable, {move}") from error
