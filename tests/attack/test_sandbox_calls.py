"""All existing and future system calls: the sandbox's verdict on each, for both architectures.

The filter runs in Python for both. On this machine's architecture, each refused call is also made for real.
"""

import errno
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from emlocal.sandbox import landlock, run, seccomp
from emlocal.sandbox.run import Limits
from tests.attack.calls import ALLOW, ENOSYS, EPERM, KILL, MACHINES, numbers, table, verdict

contained = pytest.mark.skipif(
    landlock.abi() < landlock.OLDEST_ABI or not seccomp.known(), reason="needs Landlock (Linux 6.2)"
)
both = pytest.mark.parametrize("machine", MACHINES)
QUICK = Limits(seconds=5)
BEYOND = 1024  # numbers to test; the kernel has about 470
X32 = 0x40000000
ODD = [*range(X32, X32 + BEYOND), 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]
PROBES = [
    (0,) * 6,
    (2**64 - 1,) * 6,
    (1,) * 6,
    (0, 1, 1, 0x22, 0, 0),
    (15, 3, 0, 0, 0, 0),
    (3, 0x5401, 4, 2, 0, 0),
    (0, 129, 1, 0, 0, 0),
]
"""Each call here is allowed with some arguments and refused with others."""


@both
def test_each_call_is_allowed_for_a_reason_or_refused(machine: str) -> None:
    filter_ = seccomp.program(machine)
    reasons = {number: call for call in seccomp.ALLOWED if (number := call.number(machine)) is not None}
    known = {number: call for call in table() if (number := call.number(machine)) is not None}
    for number in range(BEYOND):
        said = {verdict(filter_, MACHINES[machine], number, probe) for probe in PROBES}
        call = known.get(number)
        name = f"{call.name if call else 'nothing known'}, {number} on {machine}"
        if number in reasons:
            assert call is not None, name
            assert call.name == reasons[number].name, name
            assert reasons[number].why, name
            assert call.expected == ("arguments" if reasons[number].rules else "allowed"), name
            assert said == ({ALLOW, EPERM} if reasons[number].rules else {ALLOW}), name
        elif call is not None:
            assert said == {{"refused": EPERM, "unknown": ENOSYS}[call.expected]}, name
        else:
            assert said == {ENOSYS if number >= seccomp.NEW else EPERM}, name


@both
def test_numbers_of_other_kinds_do_not_exist(machine: str) -> None:
    """Tests x32's numbers, negative ones, and the highest possible one."""
    filter_ = seccomp.program(machine)
    assert {verdict(filter_, MACHINES[machine], n, probe) for n in ODD for probe in PROBES} == {ENOSYS}


@both
def test_another_architecture_ends_the_process(machine: str) -> None:
    filter_ = seccomp.program(machine)
    others = [0x40000003, 0x40000028, 0xC00000F3, 0, 0xFFFFFFFF, *MACHINES.values()]
    others.remove(MACHINES[machine])
    assert {verdict(filter_, other, n) for other in others for n in (0, 20, 60, X32, 500)} == {KILL}


def test_the_page_says_how_many_are_allowed() -> None:
    page = Path(__file__).parents[2].joinpath("docs", "evaluation.md").read_text(encoding="utf-8")
    by_arguments = sum(bool(call.rules) for call in seccomp.ALLOWED)
    assert f"{len(seccomp.ALLOWED)} system calls, {by_arguments} of them with certain arguments only" in page


@both
def test_the_filter_is_one_that_the_kernel_takes(machine: str) -> None:
    filter_ = seccomp.program(machine)
    assert len(filter_) <= 4096
    assert {len(instruction) for instruction in filter_} == {8}


def allowed(machine: str, name: str, values: range, at: int, *others: int) -> set[int]:
    """Returns the argument values with which a call is allowed; `others`: the arguments before it."""
    filter_, number = seccomp.program(machine), numbers(machine)[name]
    before = others or (0,) * at
    return {v for v in values if verdict(filter_, MACHINES[machine], number, (*before, v)) == ALLOW}


@both
def test_commands_are_looked_at(machine: str) -> None:
    every = range(-64, 4096)
    assert allowed(machine, "prctl", every, 0) == {2, 3, 15, 16, 21, 39}
    assert allowed(machine, "fcntl", every, 1) == {0, 1, 2, 3, 4, 1030, 1032}
    assert allowed(machine, "ioctl", range(0x5400, 0x5500), 1) == {
        0x5401,
        0x5413,
        0x541B,
        0x5421,
        0x5450,
        0x5451,
    }
    assert allowed(machine, "madvise", every, 2) == {0, 1, 2, 3, 4, 8, 14, 15}
    assert allowed(machine, "futex", every, 1) == {128, 129, 131, 132, 133, 137, 138, 384, 393}
    for clock in ("clock_gettime", "clock_getres", "clock_nanosleep"):
        assert allowed(machine, clock, every, 0) == set(range(8))
    for own in ("prlimit64", "getpgid", "sched_getaffinity"):
        assert allowed(machine, own, every, 0) == {0}
    assert allowed(machine, "mprotect", range(256), 2) == {0, 1, 2, 3}


@both
def test_flags_are_looked_at_bit_by_bit(machine: str) -> None:
    def bits(name: str, at: int, *before: int) -> int:
        found = (
            1 << b for b in range(32) if allowed(machine, name, range(1 << b, (1 << b) + 1), at, *before)
        )
        return sum(found)

    anonymous, path_only, temporary = 0x20, 0x200000, 0x400000
    mapped = 0x3 | 0x10 | anonymous | 0x800 | 0x1000 | 0x4000 | 0x8000 | 0x10000 | 0x20000 | 0x100000
    assert bits("mmap", 3, 0, 0, 3) == mapped
    assert bits("mmap", 3, 0, 0, 5) == mapped - anonymous
    assert bits("mmap", 2, 0, 0) == 1 | 2 | 4 | 16
    assert not allowed(machine, "mmap", range(2), 3, 0, 0, 6)  # memory must not be writable and executable
    assert not allowed(machine, "mmap", range(2), 3, 0, 0, 7)
    assert bits("openat", 2, 0, 0) == 0xFFFFFFFF - path_only - temporary
    assert bits("pipe2", 1, 0) == 0x80000 | 0x800
    assert bits("fcntl", 2, 0, 4) == 0xFFFFFFFF - 0x2000


@contained
def test_refused_calls_are_refused_by_this_kernel() -> None:
    """Tests all calls, known and unknown, with harmless arguments: no pointer, descriptor or pid."""
    machine = platform.machine()
    wanted = {call.number(machine): call.expected for call in table()}
    tried = {
        n: errno.ENOSYS if n >= seccomp.NEW or wanted.get(n) == "unknown" else errno.EPERM
        for n in [*range(BEYOND), *ODD]
        if wanted.get(n, "refused") in ("refused", "unknown")
        if n not in [numbers("x86_64")[name] for name in UNFILTERED]
    }
    program = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nwrong = {}\n"
        f"for number, expected in {tried!r}.items():\n"
        "    for value in (-1, 0):\n"
        "        done = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(value)] * 6)\n"
        "        if (done, ctypes.get_errno()) != (-1, expected):\n"
        "            wrong[number] = done, ctypes.get_errno(), expected\n"
        "assert not wrong, wrong"
    )
    assert run.run(program, QUICK) == run.Outcome("passed")


UNFILTERED = ("uretprobe", "uprobe")
"""The kernel lets these pass every filter and ends a program that makes one."""


@contained
@pytest.mark.parametrize("name", UNFILTERED)
def test_the_kernels_own_calls_do_nothing_for_a_program(name: str) -> None:
    number = numbers("x86_64")[name]
    outcome = run.run(
        f"import ctypes\nassert ctypes.CDLL(None).syscall({number}) == -1\nraise OSError", QUICK
    )
    assert outcome.detail in ("ended by signal 4", "OSError")


NOT_TRIED = {"exit", "exit_group", "rt_sigreturn", "pause", "rt_sigsuspend", "restart_syscall"}
"""Calls that would end the program, or wait forever."""


@contained
def test_allowed_calls_reach_this_kernel() -> None:
    """Uses arguments that no call accepts, so that most fail, but not with the sandbox's errors."""
    tried = [
        n
        for call in table()
        if call.expected == "allowed" and call.name not in NOT_TRIED
        if (n := call.number(platform.machine())) is not None
    ]
    program = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nwrong = {}\n"
        f"for number in {tried!r}:\n"
        "    ctypes.set_errno(0)\n"
        "    libc.syscall(ctypes.c_long(number), *[ctypes.c_long(-1)] * 6)\n"
        "    if ctypes.get_errno() in (1, 38):\n"
        "        wrong[number] = ctypes.get_errno()\n"
        "assert not wrong, wrong"
    )
    assert run.run(program, QUICK) == run.Outcome("passed")


@contained
@pytest.mark.skipif(platform.machine() != "x86_64", reason="int 0x80 is x86's")
def test_a_call_of_32_bit_code_ends_the_process() -> None:
    """Prepares memory with such code before the locks are set; afterwards that is impossible."""
    code = (
        "import ctypes, mmap, sys\n"
        "from emlocal.sandbox import seccomp\n"
        "page = mmap.mmap(-1, 4096, prot=7)\n"
        "page.write(bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3]))  # mov eax, 20 (getpid); int 0x80; ret\n"
        "getpid = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))\n"
        "zero = ctypes.c_ulong(0)\n"
        "assert ctypes.CDLL(None).prctl(38, ctypes.c_ulong(1), zero, zero, zero) == 0\n"
        "if sys.argv[1] == 'locked':\n    seccomp.restrict()\n"
        "print(getpid(), flush=True)"
    )

    def ended(how: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", code, how], cwd=Path(__file__).parents[2], capture_output=True, check=False
        )
        assert (done.stdout == b"") == (done.returncode != 0), done.stderr
        return done.returncode

    no_such_calls = ended("open") != 0  # a kernel without 32-bit calls: SIGSEGV
    assert ended("locked") == (-11 if no_such_calls else -31)
