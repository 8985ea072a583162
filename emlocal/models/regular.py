"""Files that come from somebody else, opened only where they are plain files, and read only so far.

A folder out of git or an archive may have links in it: to a device that never ends, or to a pipe, which keeps
whoever opens it waiting. Its size in `stat` says nothing about either.
"""

import os
import sys
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO

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
