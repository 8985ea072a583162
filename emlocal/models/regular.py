"""Files that come from somebody else, opened only where they are plain files, and read only so far.

A folder out of git or an archive may have links in it: to a device that never ends, or to a pipe, which keeps
whoever opens it waiting. Its size in `stat` says nothing about either.

The small files of a Hugging Face model folder, read within bounds.
"""

import json
import os
import sys
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO

from emlocal.errors import ModelError

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
