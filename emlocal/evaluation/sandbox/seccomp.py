"""seccomp: a process gives up system calls, for good. Needs no privileges.

`calls.ALLOWED` is what is left to it, with the arguments that are looked at. Everything else is refused: new
processes and threads, other programs, sockets, signals, other processes, memory that is not the process's
own, and all that changes files. A call that the list does not know, old or yet to come, is refused as well.

Source: the kernel's Documentation/userspace-api/seccomp_filter.rst. Standard library only.
"""

import ctypes
import errno
import os
import platform
import struct

from emlocal.evaluation.sandbox.calls import ALLOWED, MISSING, NEW, Call, OneOf, Rule, Within

_SET_SECCOMP, _FILTER = 22, 2
_LOAD, _EQUALS, _AT_LEAST, _HAS_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF, on 32-bit words
_KILL, _ALLOW, _ERROR = 0x80000000, 0x7FFF0000, 0x00050000
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_ALL = 0xFFFFFFFF
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""As the kernel names those whose numbers are known. A call by any other architecture ends the process."""


def known() -> bool:
    """Whether the list is for this architecture."""
    return platform.machine() in ARCHITECTURES


def restrict() -> None:
    """From now on this thread, the only one and without new privileges, can make no refused system call.

    Raises OSError where the kernel says no, KeyError on another architecture.
    """
    instructions = program(platform.machine())
    _install(b"".join(instructions), len(instructions))


def program(machine: str) -> list[bytes]:
    """The filter's instructions, eight bytes each. Raises KeyError for an architecture that is not known."""
    refuse = _statement(_RETURN, _ERROR | errno.EPERM)
    missing = _statement(_RETURN, _ERROR | errno.ENOSYS)
    made = [
        _statement(_LOAD, _ARCHITECTURE_AT),
        _jump(_EQUALS, ARCHITECTURES[machine], over=1),
        _statement(_RETURN, _KILL),
        _statement(_LOAD, _NUMBER_AT),
        _jump(_AT_LEAST, NEW, not_over=1),
        missing,
    ]
    for call in ALLOWED:
        number = call.number(machine)
        if number is not None:
            made += _when_equal(number, _body(call, refuse))
    for number in MISSING[machine]:
        made += _when_equal(number, [missing])
    return [*made, refuse]


def _when_equal(number: int, body: list[bytes]) -> list[bytes]:
    return [_jump(_EQUALS, number, not_over=len(body)), *body]


def _body(call: Call, refuse: bytes) -> list[bytes]:
    """What is done with an allowed call: its rules one after the other, until one holds."""
    if not call.rules:
        return [_statement(_RETURN, _ALLOW)]
    return [instruction for rule in call.rules for instruction in _rule(rule)] + [refuse]


def _rule(rule: Rule) -> list[bytes]:
    """Allow where all checks hold; where one does not, go on behind it."""
    made = [_statement(_RETURN, _ALLOW)]
    for check in reversed(rule):
        made = [*_check(check, len(made)), *made]
    return made


def _check(check: OneOf | Within, to_next: int) -> list[bytes]:
    """Skip `to_next` instructions behind this where the check does not hold."""
    load = _statement(_LOAD, _ARGUMENTS_AT + 8 * check.argument)  # the lower half: both are little-endian
    if isinstance(check, Within):
        return [load, _jump(_HAS_BITS, _ALL & ~check.mask, over=to_next)]
    last = len(check.values) - 1
    return [
        load,
        *(
            _jump(_EQUALS, value, over=last - i, not_over=to_next if i == last else 0)
            for i, value in enumerate(check.values)
        ),
    ]


def _statement(code: int, value: int) -> bytes:
    return struct.pack("=HBBI", code, 0, 0, value)


def _jump(code: int, value: int, *, over: int = 0, not_over: int = 0) -> bytes:
    """Where the comparison holds, skip `over` instructions, else `not_over`."""
    return struct.pack("=HBBI", code, over, not_over, value)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def _install(instructions: bytes, count: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    filter_ = _Program(count, instructions)
    if libc.prctl(_SET_SECCOMP, ctypes.c_ulong(_FILTER), ctypes.byref(filter_), zero, zero):
        code = ctypes.get_errno()
        raise OSError(code, f"seccomp: {os.strerror(code)}")
