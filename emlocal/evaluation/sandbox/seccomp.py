"""seccomp: a process gives up system calls, for good. Needs no privileges.

What is refused: new processes and threads, other programs, sockets, signals, other processes' memory and
priorities, memory outside the process's own (which no limit would count), and everything about files that
Landlock lets pass (modes, owners, times, attributes). System calls added since 2019 do not exist: they
would be new ways around this list, and libraries do without them.

Source: the kernel's Documentation/userspace-api/seccomp_filter.rst. Standard library only.
"""

import ctypes
import errno
import os
import platform
import struct

_SET_SECCOMP, _FILTER = 22, 2
_LOAD, _EQUALS, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # BPF instructions on 32-bit words
_KILL, _ALLOW, _ERROR = 0x80000000, 0x7FFF0000, 0x00050000
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_NEW = 424
"""The first system call whose number is the same everywhere; x86's 32-bit calls are above it as well."""
_SECOND_ARGUMENT_AT = 24
_SIGNALS_BY = {
    "x86_64": ((72, (8, 10, 15)), (16, (0x8901, 0x8902))),
    "aarch64": ((25, (8, 10, 15)), (29, (0x8901, 0x8902))),
}
"""System calls and their commands, the second argument, that let the kernel send signals to other processes:
fcntl's F_SETOWN, F_SETSIG and F_SETOWN_EX; ioctl's FIOSETOWN and SIOCSPGRP."""
_PRLIMIT = {"x86_64": 302, "aarch64": 261}
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_REFUSED = {
    "x86_64": (
        *(56, 57, 58, 59, 322),  # clone, fork, vfork, execve, execveat
        *(41, 53),  # socket, socketpair
        *(62, 200, 234, 129, 297),  # kill, tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo
        *(101, 310, 311, 312),  # ptrace, process_vm_readv, process_vm_writev, kcmp
        *(272, 308, 165, 166, 155, 161),  # unshare, setns, mount, umount2, pivot_root, chroot
        *(90, 91, 268, 92, 93, 94, 260),  # chmod, fchmod, fchmodat, chown, fchown, lchown, fchownat
        *(132, 235, 261, 280, 76),  # utime, utimes, futimesat, utimensat, truncate
        *(188, 189, 190, 197, 198, 199),  # setxattr, removexattr and their kind
        *(319, 29, 68, 64, 240),  # memfd_create, shmget, msgget, semget, mq_open
        *(321, 298, 323, 248, 249, 250),  # bpf, perf_event_open, userfaultfd, add_key, request_key, keyctl
        *(
            141,
            251,
            203,
            144,
            142,
            314,
        ),  # setpriority, ioprio_set, sched_setaffinity, …scheduler, …param, …attr
        *(279, 256, 253, 294, 300, 135),  # move_pages, migrate_pages, inotify, fanotify, personality
    ),
    "aarch64": (
        *(220, 221, 281),
        *(198, 199),
        *(129, 130, 131, 138, 240),
        *(117, 270, 271, 272),
        *(97, 268, 40, 39, 41, 51),
        *(52, 53, 55, 54),
        *(88, 45),
        *(5, 6, 7, 14, 15, 16),
        *(279, 194, 186, 190, 180),
        *(280, 241, 282, 217, 218, 219),
        *(140, 30, 122, 119, 118, 274),
        *(239, 238, 26, 262, 92),
    ),
}


def known() -> bool:
    """Whether the list is for this architecture."""
    return platform.machine() in _REFUSED


def restrict() -> None:
    """From now on this thread, the only one and without new privileges, can make no refused system call.

    Raises OSError where the kernel says no, KeyError on another architecture.
    """
    machine = platform.machine()
    refuse = _statement(_RETURN, _ERROR | errno.EPERM)
    program = [
        _statement(_LOAD, _ARCHITECTURE_AT),
        _jump(_EQUALS, _ARCHITECTURES[machine], over=1),
        _statement(_RETURN, _KILL),
        _statement(_LOAD, _NUMBER_AT),
        _jump(_AT_LEAST, _NEW, not_over=1),
        _statement(_RETURN, _ERROR | errno.ENOSYS),
    ]
    for number in _REFUSED[machine]:
        program += [_jump(_EQUALS, number, not_over=1), refuse]
    for number, commands in _SIGNALS_BY[machine]:
        program += [
            _jump(_EQUALS, number, not_over=2 + 2 * len(commands)),
            _statement(_LOAD, _SECOND_ARGUMENT_AT),
        ]
        for command in commands:
            program += [_jump(_EQUALS, command, not_over=1), refuse]
        program.append(_statement(_RETURN, _ALLOW))
    program += [
        _jump(_EQUALS, _PRLIMIT[machine], not_over=3),  # limits of this process only: pid 0
        _statement(_LOAD, _FIRST_ARGUMENT_AT),
        _jump(_EQUALS, 0, over=1),
        refuse,
        _statement(_RETURN, _ALLOW),
    ]
    _install(b"".join(program), len(program))


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
    program = _Program(count, instructions)
    if libc.prctl(_SET_SECCOMP, ctypes.c_ulong(_FILTER), ctypes.byref(program), zero, zero):
        code = ctypes.get_errno()
        raise OSError(code, f"seccomp: {os.strerror(code)}")
