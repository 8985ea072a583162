"""seccomp: a process gives up system calls, for good. It needs no privileges.

`ALLOWED` lists the calls that a program may make, with rules on their arguments. All other calls are refused:
new processes and threads, other programs, sockets, signals, other processes, memory that is not the process's
own, and everything that changes files. A call that the list does not know, old or future, is refused as well.

A call is listed if Python, numpy or scipy cannot do without it. It must also touch nothing but the program
itself and the files that Landlock lets it read. If that depends on arguments, rules restrict them. A rule
looks at the lower 32 bits of an argument: the kernel reads these arguments as ints, or gives the upper half
no meaning.

Sources: the kernel's Documentation/userspace-api/seccomp_filter.rst; for the numbers, on x86-64 and ARM64,
its headers (asm/unistd_64.h, asm-generic/unistd.h). Standard library only.
"""

import ctypes
import errno
import os
import platform
import struct
from typing import NamedTuple


class OneOf(NamedTuple):
    """A check that the argument, counted from 0, is one of these values."""

    argument: int
    values: tuple[int, ...]


class Within(NamedTuple):
    """A check that the argument has no bits outside the mask."""

    argument: int
    mask: int


Rule = tuple[OneOf | Within, ...]
"""Checks that must all pass."""


class Call(NamedTuple):
    """A system call that is allowed."""

    name: str
    x86_64: int | None
    """Its number on x86-64; None if that architecture does not have it."""
    aarch64: int | None
    why: str
    rules: tuple[Rule, ...] = ()
    """At least one rule must pass; without rules the call is always allowed."""

    def number(self, machine: str) -> int | None:
        return self.x86_64 if machine == "x86_64" else self.aarch64


_ALL = 0xFFFFFFFF
_PATH_ONLY, _TEMPORARY = 0x200000, 0x400000  # O_PATH, which Landlock does not check; O_TMPFILE
_SIGNAL_WHEN_READY = 0x2000  # O_ASYNC
_PIPE = 0x80000 | 0x800  # O_CLOEXEC, O_NONBLOCK; O_EXCL would make it a queue of the kernel's messages
_DESCRIPTOR_COMMANDS = (0, 1, 2, 3, 1030, 1032)
"""fcntl: F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ."""
_SET_FLAGS = 4  # F_SETFL
_REQUESTS = (0x5450, 0x5451, 0x5421, 0x541B, 0x5401, 0x5413, 0x802C542A)
"""ioctl: FIONCLEX, FIOCLEX, FIONBIO, FIONREAD; TCGETS, TIOCGWINSZ, TCGETS2.

The last three ask whether it is a terminal, and its size.
"""
_READ, _WRITE, _EXECUTE = 1, 2, 4
_BRANCH_TARGETS = 0x10  # PROT_BTI, which ARM64's loader requests
_ANONYMOUS = 0x20
_MAPPINGS = 0x3 | 0x10 | _ANONYMOUS | 0x800 | 0x1000 | 0x4000 | 0x8000 | 0x10000 | 0x20000 | 0x100000
"""mmap: shared, private, fixed, anonymous, and hints.

Not: locked or huge pages, which belong to the machine.
"""
_ADVICE = (0, 1, 2, 3, 4, 8, 14, 15)
"""madvise: normal, random, sequential, will need, do not need, free, huge pages or not."""
_FUTEX = tuple(0x80 | operation for operation in (0, 1, 3, 4, 5, 9, 10, 0x100, 0x109))
"""futex: waiting and waking within the process. Not: on shared memory, or with priorities."""
_CLOCKS = tuple(range(8))  # other clocks are processes' own times, and alarms that wake the machine
_PRCTL = (15, 16, 2, 3, 21, 39)
"""prctl: set and get the name; get the death signal, the dump flag, seccomp, no new privileges."""

_FILES = "Landlock says which files"
_ABOUT = "names, sizes and kinds of files can be seen"
_OPEN = "of what is open: Python's files, /dev/null, its own pipes"
_MEMORY = "its own memory, which the limit counts"
_TIME = "the time, and its own alarm"
_SIGNALS = "how it takes signals itself; it can send none"
_ITSELF = "what it is, and what it has used"
_END = "its end"


def _only(argument: int, *values: int) -> tuple[Rule, ...]:
    return ((OneOf(argument, values),),)


ALLOWED = (
    Call("open", 2, None, _FILES, ((Within(1, _ALL & ~(_PATH_ONLY | _TEMPORARY)),),)),
    Call("openat", 257, 56, _FILES, ((Within(2, _ALL & ~(_PATH_ONLY | _TEMPORARY)),),)),
    Call("stat", 4, None, _ABOUT),
    Call("lstat", 6, None, _ABOUT),
    Call("fstat", 5, 80, _ABOUT),
    Call("newfstatat", 262, 79, _ABOUT),
    Call("access", 21, None, _ABOUT),
    Call("faccessat", 269, 48, _ABOUT),
    Call("readlink", 89, None, _ABOUT),
    Call("readlinkat", 267, 78, _ABOUT),
    Call("getcwd", 79, 17, _ABOUT),
    Call("chdir", 80, 49, "only where this process stands"),
    Call("fchdir", 81, 50, "only where this process stands"),
    Call("read", 0, 63, _OPEN),
    Call("pread64", 17, 67, _OPEN),
    Call("readv", 19, 65, _OPEN),
    Call("lseek", 8, 62, _OPEN),
    Call("getdents64", 217, 61, _OPEN),
    Call("write", 1, 64, _OPEN),
    Call("writev", 20, 66, _OPEN),
    Call("close", 3, 57, _OPEN),
    Call("dup", 32, 23, _OPEN),
    Call("dup2", 33, None, _OPEN),
    Call("dup3", 292, 24, _OPEN),
    Call("pipe", 22, None, "64 descriptors are all it has"),
    Call("pipe2", 293, 59, "64 descriptors are all it has", ((Within(1, _PIPE),),)),
    Call("poll", 7, None, _OPEN),
    Call("ppoll", 271, 73, _OPEN),
    Call("select", 23, None, _OPEN),
    Call("pselect6", 270, 72, _OPEN),
    Call(
        "fcntl",
        72,
        25,
        "descriptors and their flags; no locks, leases, owners, sizes of pipes",
        (
            (OneOf(1, _DESCRIPTOR_COMMANDS),),
            (OneOf(1, (_SET_FLAGS,)), Within(2, _ALL & ~_SIGNAL_WHEN_READY)),
        ),
    ),
    Call("ioctl", 16, 29, "flags of descriptors, and whether it is a terminal", _only(1, *_REQUESTS)),
    Call("brk", 12, 214, _MEMORY),
    Call(
        "mmap",
        9,
        222,
        _MEMORY + "; code only from files, and never to be written",
        (
            (Within(2, _READ | _WRITE), Within(3, _MAPPINGS)),
            (Within(2, _READ | _EXECUTE | _BRANCH_TARGETS), Within(3, _MAPPINGS & ~_ANONYMOUS)),
        ),
    ),
    Call("munmap", 11, 215, _MEMORY),
    Call("mremap", 25, 216, _MEMORY),
    Call("mprotect", 10, 226, _MEMORY + "; never made code", ((Within(2, _READ | _WRITE),),)),
    Call("madvise", 28, 233, _MEMORY, _only(2, *_ADVICE)),
    Call("futex", 202, 98, "waiting within the process", _only(1, *_FUTEX)),
    Call("clock_gettime", 228, 113, _TIME, _only(0, *_CLOCKS)),
    Call("clock_getres", 229, 114, _TIME, _only(0, *_CLOCKS)),
    Call("clock_nanosleep", 230, 115, _TIME, _only(0, *_CLOCKS)),
    Call("nanosleep", 35, 101, _TIME),
    Call("gettimeofday", 96, 169, _TIME),
    Call("time", 201, None, _TIME),
    Call("getitimer", 36, 102, _TIME),
    Call("setitimer", 38, 103, _TIME),
    Call("alarm", 37, None, _TIME),
    Call("restart_syscall", 219, 128, "a sleep goes on after a signal"),
    Call("rt_sigaction", 13, 134, _SIGNALS),
    Call("rt_sigprocmask", 14, 135, _SIGNALS),
    Call("rt_sigreturn", 15, 139, _SIGNALS),
    Call("rt_sigpending", 127, 136, _SIGNALS),
    Call("rt_sigtimedwait", 128, 137, _SIGNALS),
    Call("rt_sigsuspend", 130, 133, _SIGNALS),
    Call("sigaltstack", 131, 132, _SIGNALS),
    Call("pause", 34, None, _SIGNALS),
    Call("getpid", 39, 172, _ITSELF),
    Call("gettid", 186, 178, _ITSELF),
    Call("getppid", 110, 173, _ITSELF),
    Call("getuid", 102, 174, _ITSELF),
    Call("geteuid", 107, 175, _ITSELF),
    Call("getgid", 104, 176, _ITSELF),
    Call("getegid", 108, 177, _ITSELF),
    Call("getgroups", 115, 158, _ITSELF),
    Call("getpgrp", 111, None, _ITSELF),
    Call("getpgid", 121, 155, _ITSELF, _only(0, 0)),
    Call("getrusage", 98, 165, _ITSELF),
    Call("times", 100, 153, _ITSELF),
    Call("getrlimit", 97, 163, _ITSELF),
    Call("setrlimit", 160, 164, "its limits can only become less"),
    Call("prlimit64", 302, 261, "its limits can only become less", _only(0, 0)),
    Call("prctl", 157, 167, _ITSELF, _only(0, *_PRCTL)),
    Call("sched_getaffinity", 204, 123, "how many processors it may use", _only(0, 0)),
    Call("sched_yield", 24, 124, "lets others run"),
    Call("getcpu", 309, 168, "the processor that it runs on"),
    Call("uname", 63, 160, "the system's and the machine's name"),
    Call("sysinfo", 99, 179, "the machine's memory and load"),
    Call("getrandom", 318, 278, "random numbers"),
    Call("exit", 60, 93, _END),
    Call("exit_group", 231, 94, _END),
)

MISSING = {"x86_64": (324, 326, 327, 328, 332, 334), "aarch64": (283, 285, 286, 287, 291, 293)}
"""Calls that are refused as if the kernel did not know them, so that libraries use an older call.

They are membarrier, copy_file_range, preadv2, pwritev2, statx and rseq. All calls from `NEW` on are refused
in the same way, among them clone3 and faccessat2.
"""
NEW = 424
"""The first system call whose number is the same everywhere. x86's 32-bit calls (x32) are above it too."""


_SET_SECCOMP, _FILTER = 22, 2
_LOAD, _EQUALS, _AT_LEAST, _HAS_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF, on 32-bit words
_KILL, _ALLOW, _ERROR = 0x80000000, 0x7FFF0000, 0x00050000
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""The kernel's codes of the known architectures. A call by any other architecture ends the process."""


def known() -> bool:
    """Returns whether the list knows this architecture."""
    return platform.machine() in ARCHITECTURES


def restrict() -> None:
    """Makes the kernel refuse, from now on, all system calls of this thread that are not allowed.

    It must be the only thread, and must have given up new privileges. Raises OSError if the kernel refuses,
    KeyError on another architecture.
    """
    instructions = program(platform.machine())
    _install(b"".join(instructions), len(instructions))


def program(machine: str) -> list[bytes]:
    """Returns the filter's instructions, eight bytes each. Raises KeyError for an unknown architecture."""
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
    """Returns the instructions for an allowed call: its rules one after the other, until one passes."""
    if not call.rules:
        return [_statement(_RETURN, _ALLOW)]
    return [instruction for rule in call.rules for instruction in _rule(rule)] + [refuse]


def _rule(rule: Rule) -> list[bytes]:
    """Returns instructions that allow the call if all checks pass, and otherwise continue behind the rule."""
    made = [_statement(_RETURN, _ALLOW)]
    for check in reversed(rule):
        made = [*_check(check, len(made)), *made]
    return made


def _check(check: OneOf | Within, to_next: int) -> list[bytes]:
    """Returns instructions that skip the next `to_next` instructions if the check fails."""
    # the lower half: both architectures are little-endian
    load = _statement(_LOAD, _ARGUMENTS_AT + 8 * check.argument)
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
    """Returns an instruction that skips `over` instructions if the comparison is true, else `not_over`."""
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
