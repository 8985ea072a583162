"""Attacks: devices, terminals, the machine's switches, and descriptors that were left open."""

import ctypes
import fcntl
import os
import sys

from tests.attack.sandbox.prelude import attack, call, proven, there


@proven
def a_terminal_of_its_own() -> None:
    os.open("/dev/ptmx", os.O_RDWR)


@proven
def zeros() -> None:
    os.open("/dev/zero", os.O_RDONLY)


@attack
def shared_memory_files() -> None:
    os.open("/dev/shm/made", os.O_CREAT | os.O_RDWR)


@attack
def devices() -> None:
    """Opens all devices except /dev/null and /dev/urandom."""
    found = [
        os.path.join("/dev", name) for name in ("mem", "kmsg", "tty", "kvm", "fuse", "random", "full", "vda")
    ]
    opened = []
    for path in filter(os.path.exists, found):
        try:
            opened.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        except PermissionError:
            continue
    if not opened:
        raise PermissionError(1, "none")


@attack
def sysrq() -> None:
    os.open(there("/proc/sysrq-trigger"), os.O_WRONLY)


@attack
def sleep_of_the_machine() -> None:
    os.open(there("/sys/power/state"), os.O_RDONLY)


@attack
def control_groups() -> None:
    os.listdir(there("/sys/fs/cgroup"))


@attack
def type_into_a_terminal() -> None:
    call("ioctl", 0, 0x5412, b"x")


@attack
def a_controlling_terminal() -> None:
    call("ioctl", 0, 0x540E, 1)


@attack
def foreground_of_a_terminal() -> None:
    call("ioctl", 0, 0x5410, (ctypes.c_int * 1)(1))


@attack
def paste_into_a_console() -> None:
    call("ioctl", 0, 0x541C, b"\x03")


@attack
def random_numbers_of_all() -> None:
    call("ioctl", os.open("/dev/urandom", os.O_RDONLY), 0x5206, 0)


@attack
def write_to_random() -> None:
    os.open("/dev/urandom", os.O_WRONLY)


@attack
def a_descriptor_that_was_left_open() -> None:
    """Only the standard descriptors (/dev/null) and the report's pipe (for writing) may be open."""
    report, null = int(sys.argv[1]), os.stat("/dev/null")
    for number in range(64):
        try:
            found = os.fstat(number)
        except OSError:
            continue
        if number in (0, 1, 2):
            assert os.path.samestat(found, null), number
        elif number == report:
            assert fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
        else:
            return
    raise PermissionError(1, "none")
