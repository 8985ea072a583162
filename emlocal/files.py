"""Files and folders: emlocal's own folders, atomic writing, and careful reading of other people's files.

emlocal's own folders hold no models of the hub: those stay in the Hugging Face cache. For downloads, this
module reports progress, checks the free disk space, and puts disk errors in plain words.

Other people's files are opened only if they are regular files, and are read up to a limit. A folder from git
or an archive may contain links: to a device that never ends, or to a pipe, which blocks whoever opens it. The
size that `stat` gives reveals neither.
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
    """Yields a text file (UTF-8) that gets its name when the block ends, or disappears if the block raises.

    A symbolic link is followed. A path that is not a regular file (a pipe, a device) is written to directly.
    Only its owner can read a `private` file.

    Raises EmlocalError if the file cannot be written (no such folder, read-only, disk full).
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
    """Yields the path of a temporary file beside `path`, which gets the name `path` when the block ends.

    Use it for code that takes a path to write to. If the block raises, the temporary file is removed and
    `path` stays as it was. A symbolic link is followed.

    Raises EmlocalError if the file cannot be written.
    """
    temporary: Path | None = None
    try:
        target = path.resolve()
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        temporary = Path(name)
        os.close(descriptor)
        yield temporary
        if not private:  # `mkstemp` makes it private
            temporary.chmod(_usual_mode())
        put_in_place(temporary, target)
    except OSError as why:
        raise EmlocalError(f"cannot write {path}: {why.strerror or why}") from why
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside `folder`, which gets the name `folder` when the block ends.

    If the block raises, the temporary folder is removed. With `replace`, an existing folder is renamed at the
    same moment and then removed. If the process is killed at that moment, the old folder remains under a name
    that ends in `.old`; the two are never mixed. Missing parent folders are created.

    Raises EmlocalError if `folder` exists and `replace` is false, or if nothing can be written.
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
    """Renames a file so that after a power cut the new name has the whole file or does not exist."""
    _sync_file(temporary)
    temporary.replace(target)
    sync_folder(target.parent)


def put_folder_in_place(temporary: Path, target: Path) -> None:
    """Renames a folder of files in the same way; nothing may be called `target` yet."""
    for file in temporary.iterdir():
        _sync_file(file)
    sync_folder(temporary)
    temporary.rename(target)
    sync_folder(target.parent)


@contextmanager
def only_one(lock: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds the lock file within this block; calls `waiting` each second that another process holds it.

    The system releases the lock when a process dies, so it cannot be stale.
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
    """Makes the list of a folder's files durable; until then a power failure can lose a new name."""
    if sys.platform != "win32":  # Windows does not open folders, and its file system journals names by itself
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as why:
            if why.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot do this
                raise
        finally:
            os.close(descriptor)


def _usual_mode(wanted: int = 0o666) -> int:
    """Returns the permissions of a new file.

    The system reveals its mask only when the mask is set, so this sets it and sets it back.
    """
    mask = os.umask(0o077)
    os.umask(mask)
    return wanted & ~mask


if sys.platform == "win32":
    _FLAGS = os.O_RDONLY | os.O_BINARY | os.O_NOINHERIT
else:
    # O_NONBLOCK: a pipe put here after the first check does not block
    _FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY


def open_regular(path: Path) -> BinaryIO:
    """Opens the file `path`, or the file that it links to, for reading.

    Raises ModelError for a pipe, a device, a socket or a folder; OSError if it cannot be opened.
    """
    _check_regular(path, path.stat().st_mode)  # checked before opening, which alone can set off a device
    file = os.fdopen(os.open(path, _FLAGS), "rb")
    try:
        _check_regular(path, os.fstat(file.fileno()).st_mode)
    except BaseException:
        file.close()
        raise
    return file


def read_regular(path: Path, most: int) -> bytes:
    """Returns the content of a regular file of at most `most` bytes.

    Raises ModelError for a longer file and for those that `open_regular` refuses; OSError if it cannot be
    read.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ModelError(
            f"{path} has more than {most:,} bytes, the limit for this file", hint="fetch the file again"
        )
    return data


def _check_regular(path: Path, mode: int) -> None:
    if not S_ISREG(mode):
        raise ModelError(
            f"{path} is not a regular file",
            hint="use a file, not a pipe, device or folder",
        )


MAX_JSON_BYTES = 256 << 20  # the largest tokenizer.json known (Gemma 3) has 33 MB
MAX_TEMPLATE_BYTES = 1 << 20


def read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    """Returns the table in a JSON file; an empty one if the file is missing and not required.

    Raises ModelError.
    """
    raw = _read(path, MAX_JSON_BYTES)
    if raw is None and not required:
        return {}
    if raw is None:
        raise ModelError(f"{path.parent} has no {path.name}", hint="fetch that file too")
    try:
        table = json.loads(raw)
    except (ValueError, RecursionError):
        raise ModelError(f"{path} is not JSON", hint="fetch the file again") from None
    if not isinstance(table, dict):
        raise ModelError(f"{path} is not a JSON table", hint="fetch the file again")
    return table


TOOL_USE = "tool_use"
"""The name that models give the template for conversations with tools, where they have several."""


def read_chat_template(folder: Path, name: str = "default") -> str | None:
    """The chat template of a model folder, of the given name where it has several.

    It is in chat_template.jinja (others in additional_chat_templates/NAME.jinja), else in
    tokenizer_config.json, else in chat_template.json. A single one with another name is the default. Raises
    ModelError for one of more than 1 MiB.
    """
    file = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
    raw = _read(folder / file, MAX_TEMPLATE_BYTES)
    if raw is not None:
        return raw.decode("utf-8", "replace") or None
    for table in ("tokenizer_config.json", "chat_template.json"):
        found = _template_in(read_json(folder / table, required=False).get("chat_template"), name)
        if found and len(found) > MAX_TEMPLATE_BYTES:
            raise ModelError(
                f"the chat template of {folder} has {len(found):,} characters", hint="use another model"
            )
        if found:
            return found
    return None


def _template_in(said: Any, name: str) -> str | None:
    """The template of this name: a table has a text, a list of {"name", "template"}, or {name: text}."""
    if isinstance(said, list):
        said = {t.get("name"): t.get("template") for t in said if isinstance(t, dict)}
    if isinstance(said, dict):
        only = next(iter(said.values())) if len(said) == 1 and TOOL_USE not in said else None
        said = said.get(name, only if name == "default" else None)
    elif name != "default":
        return None
    return said if isinstance(said, str) else None


def _read(path: Path, most: int) -> bytes | None:
    """Returns a file's content; None if there is no such file."""
    try:
        return read_regular(path, most)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error


def cache_dir() -> Path:
    """Returns the folder of files that can be downloaded or made again. EMLOCAL_CACHE_DIR moves it.

    These are the starter model and weights converted for engines.
    """
    return _chosen("EMLOCAL_CACHE_DIR") or platformdirs.user_cache_path("emlocal", appauthor=False)


def config_dir() -> Path:
    """Returns the folder of the files that people write (config.toml). EMLOCAL_CONFIG_DIR moves it."""
    return _chosen("EMLOCAL_CONFIG_DIR") or platformdirs.user_config_path("emlocal", appauthor=False)


def data_dir() -> Path:
    """Returns the folder of what cannot be made again: conversations, adapters. EMLOCAL_DATA_DIR moves it."""
    return _chosen("EMLOCAL_DATA_DIR") or platformdirs.user_data_path("emlocal", appauthor=False)


def _chosen(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value).expanduser() if value else None


Progress = Callable[[str, int, int | None], None]
"""A callback for progress. It gets a label, the bytes done, and the bytes in all (None: not known)."""


def silent(label: str, done: int, total: int | None) -> None:
    """Does nothing: a Progress without output."""


def nearest(path: Path) -> Path:
    """Returns `path`, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raises ModelError if `folder` (which need not exist yet) has fewer than `needed` bytes free."""
    free = shutil.disk_usage(nearest(folder)).free
    if free < needed:
        raise ModelError(
            f"{what} needs {human_size(needed)} of disk, but {folder} has {human_size(free)} free",
            hint="free some space, or remove models you no longer use: emlocal models rm NAME",
        )


@contextmanager
def disk_errors(folder: Path, variable: str) -> Iterator[None]:
    """Turns OSErrors from writing under `folder` into ModelErrors.

    `variable` is the environment variable that moves the folder.
    """
    try:
        yield
    except OSError as error:
        move = f"or keep models elsewhere: {variable}=/another/folder"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelError(f"the disk of {folder} is full", hint=f"free some space, {move}") from error
        why = error.strerror or str(error)
        raise ModelError(f"cannot write to {folder}: {why}", hint=f"make it writable, {move}") from error
