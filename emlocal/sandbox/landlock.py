"""Landlock: a process gives up access to all files but some, for good. Linux 6.2 or newer.

It needs no privileges. Older kernels have Landlock too, but let a program empty a file that it may not write
(their ABI is less than 3). Source: the kernel's Documentation/userspace-api/landlock.rst. Standard library
only: an interpreter without emlocal imports this.
"""

import ctypes
import os
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

OLDEST_ABI = 3
_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446  # the same on every architecture
_VERSION_FLAG = 1
_PATH_BENEATH = 1
_WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14
_FILES_BY_ABI = {3: 15, 5: 16}
"""ABI → the number of rights on files from that ABI on; each right is one bit, from the lowest."""
_NETWORK, _SCOPES = 0b11, 0b11  # bind and connect TCP (ABI 4); abstract sockets and signals (ABI 6)


def abi() -> int:
    """Returns the version of Landlock's ABI here; 0 if there is none."""
    if sys.platform != "linux":
        return 0
    return max(0, int(_libc().syscall(_CREATE, None, 0, _VERSION_FLAG)))


def restrict(readable: Iterable[Path]) -> None:
    """Lets this thread, from now on, only read these files and folders and write to /dev/null.

    Descriptors that are open already stay open. Unless root calls it, the thread must have given up new
    privileges. Raises OSError if the kernel refuses.
    """
    version = abi()
    files = (1 << max(count for least, count in _FILES_BY_ABI.items() if version >= least)) - 1
    network = _NETWORK if version >= 4 else 0
    scopes = _SCOPES if version >= 6 else 0
    attributes = struct.pack("=QQQ", files, network, scopes)[: 8 * (1 + (version >= 4) + (version >= 6))]
    rules = _call(_CREATE, attributes, len(attributes), 0)
    try:
        for path in readable:
            _allow(rules, path, _READ_FILE | (_READ_DIR if path.is_dir() else 0))
        _allow(rules, Path("/dev/null"), _READ_FILE | _WRITE_FILE | _TRUNCATE)
        _call(_RESTRICT, rules, 0)
    finally:
        os.close(rules)


def _allow(rules: int, path: Path, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        _call(_ADD_RULE, rules, _PATH_BENEATH, struct.pack("=Qi", rights, descriptor), 0)
    finally:
        os.close(descriptor)


def _call(number: int, *arguments: int | bytes) -> int:
    result = int(_libc().syscall(number, *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"Landlock: {os.strerror(code)}")
    return result


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
