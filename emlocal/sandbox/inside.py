"""Runs in the fresh interpreter: locks itself in, runs the program, reports through a pipe.

    python -I inside.py DESCRIPTOR SECONDS BYTES

takes {"secret": …, "program": …} on stdin. It writes a line to the descriptor when it is locked in, and
{"secret": …, "error": null or text} when the program has come to its end. A program that leaves early
(os._exit, a signal) reports nothing and has not passed. It shares the interpreter with what tests it: one
that sets out to cheat can.

With "calls" ({"function": name, "inputs": literals of tuples of arguments, "seconds": number}) it then calls
that function of the program, and writes {"secret": …, "result": text} for each.
"""

import ast
import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys
import traceback
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from emlocal.sandbox import landlock, seccomp
from emlocal.sandbox.canonical import canonical, shortened

sys.path.pop(0)  # the program is not to find what is beside emlocal in a checkout

_SYSTEM = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/usr/share/zoneinfo")
_SINGLE = ("/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/proc/cpuinfo", "/sys/devices/system/cpu")
_LONGEST = 2000
_LONGEST_NAME = 200
_SET_DEATH_SIGNAL, _SET_DUMPABLE, _SET_NO_NEW_PRIVILEGES = 1, 4, 38  # for prctl
_CAPABILITIES_VERSION = 0x20080522


def _readable() -> list[Path]:
    """Python's own folders and the system's libraries; no home, no secrets, no other process.

    Not the whole of a prefix: `python -m venv .` makes a project's own folder one.
    """
    base = Path(sys.base_prefix)
    folders = [] if str(base) in ("/", "/usr") else [base / "lib", base / "lib64"]
    if sys.prefix != sys.base_prefix:  # a virtual environment: its packages are in lib/python3.11
        name = Path(os.__file__).parent.name
        folders += [Path(sys.prefix, library, name) for library in ("lib", "lib64")]
    wanted = [*folders, *map(Path, (*_SYSTEM, *_SINGLE))]
    return [path for path in dict.fromkeys(wanted) if path.exists()]


def _leave_behind(report: int) -> None:
    """Packages may run code as the interpreter starts (.pth files): what it opened is closed.

    A thread of it would not be locked in. Raises RuntimeError where there is one.
    """
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208
    if threads > 1:
        raise RuntimeError(f"{threads} threads run before the program: a package's .pth file starts them")
    for number in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208
        if number > 2 and number != report:
            with suppress(OSError):  # the listing's own, which is closed
                os.close(number)


def _limit(seconds: int, memory: int) -> None:
    for what, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # SIGXCPU, and SIGKILL if that is ignored


def _prctl(option: int, value: int, what: str) -> None:
    zero = ctypes.c_ulong(0)
    if ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(value), zero, zero, zero):
        raise OSError(ctypes.get_errno(), f"{what} cannot be given up")


def _drop_capabilities() -> None:
    """Root's privileges, where it is root: limits and locks then hold for it as well."""
    header = struct.pack("=Ii", _CAPABILITIES_VERSION, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, bytes(24)):
        raise OSError(ctypes.get_errno(), "the capabilities cannot be given up")


def _error_of(program: str, module: types.ModuleType) -> BaseException | None:
    """Run it, in this module; what it raised."""
    sys.modules[module.__name__] = module
    try:
        exec(compile(program, "<answer>", "exec"), vars(module))  # noqa: S102 (that is what it is for)
    except BaseException as error:  # noqa: BLE001 (sys.exit() is no way to pass)
        return error
    return None


def _said(error: BaseException) -> str:
    """What was raised, last lines first to survive."""
    said = "".join(traceback.format_exception_only(error)).strip()
    return (said[-_LONGEST:] or type(error).__name__) + _why(error)


def _why(error: BaseException) -> str:
    """What a person is told besides, where the sandbox was in the way."""
    if isinstance(error, OSError) and error.errno in (errno.EPERM, errno.EACCES):
        return " (the sandbox refuses it)"
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return " (a program has one thread in the sandbox)"
    return ""


class _OutOfTimeError(BaseException):
    """A call took too long. No Exception, which programs catch."""


def _out_of_time(number: int, frame: object) -> None:
    raise _OutOfTimeError


def _result(function: Callable[..., object] | None, text: str, seconds: float) -> str:
    """What comes of one call: "returns …", "raises TypeError", "out of time"."""
    arguments = ast.literal_eval(text)
    if "random" in sys.modules:  # so that it is the same each time
        sys.modules["random"].seed(0)
    try:
        signal.signal(signal.SIGPROF, _out_of_time)
        signal.setitimer(signal.ITIMER_PROF, seconds, seconds)  # again and again: a program may catch it
        return _returned(function, arguments)
    except _OutOfTimeError:
        return "out of time"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _returned(function: Callable[..., object] | None, arguments: tuple[object, ...]) -> str:
    try:
        if function is None:
            raise NameError
        returned = shortened(canonical(function(*arguments)))
    except _OutOfTimeError:
        raise
    except BaseException as error:  # noqa: BLE001 (exit() is a behaviour like others)
        return _raises(error)
    return f"returns {returned}"


def _raises(error: BaseException) -> str:
    return f"raises {type(error).__name__[:_LONGEST_NAME]}"


def _die_with(parent: int) -> None:
    """Be killed when the process is that started this one, however it ends."""
    _prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, "outliving it")
    if os.getppid() != parent:  # it was gone before
        os._exit(1)


def _main() -> None:
    report, seconds, memory, parent = (int(argument) for argument in sys.argv[1:5])
    _die_with(parent)
    asked = json.load(sys.stdin)
    _leave_behind(report)
    null = os.open("/dev/null", os.O_RDWR)
    _limit(seconds, memory)
    _prctl(_SET_DUMPABLE, 0, "dumps")  # the limit does not hold where the system hands them to a program
    _prctl(_SET_NO_NEW_PRIVILEGES, 1, "new privileges")  # only root could lock itself in without
    landlock.restrict(_readable())
    _drop_capabilities()
    seccomp.restrict()
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    os.write(report, b"ready\n")

    def say(**said: Any) -> None:
        os.write(report, json.dumps({"secret": asked["secret"], **said}).encode() + b"\n")

    module = types.ModuleType("answer")  # no main program: its tests are not to run or to read input
    error = _error_of(asked["program"], module)
    if calls := asked.get("calls"):
        function = vars(module).get(calls["function"])
        for text in calls["inputs"]:
            say(result=_result(function, text, calls["seconds"]) if error is None else _raises(error))
    say(error=None if error is None else _said(error))
    os._exit(0)  # what the program left to be done at exit is not done


_main()
