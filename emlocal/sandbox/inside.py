"""The program of the sandbox's interpreter: locks itself in, runs a program, reports through a pipe.

    python -s -P inside.py DESCRIPTOR SECONDS BYTES PARENT

It takes {"secret": …, "program": …} on stdin. It writes a line to the descriptor when it is locked in, and
{"secret": …, "error": null or text} when the program has ended. A program that exits early (os._exit, a
signal) reports nothing and has not passed. The program shares the interpreter with its test, so a program
that means to cheat can.

With "calls" ({"function": name, "inputs": literals of tuples of arguments, "seconds": number}) it then calls
that function of the program, and writes {"secret": …, "result": text} for each call.
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

sys.path.pop(0)  # the program must not find other modules beside emlocal in a checkout

_SYSTEM = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/usr/share/zoneinfo")
_SINGLE = ("/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/proc/cpuinfo", "/sys/devices/system/cpu")
_LONGEST = 2000
_LONGEST_NAME = 200
_SET_DEATH_SIGNAL, _SET_DUMPABLE, _SET_NO_NEW_PRIVILEGES = 1, 4, 38  # for prctl
_CAPABILITIES_VERSION = 0x20080522


def _readable() -> list[Path]:
    """Returns the paths that a program may read: Python's own folders and the system's libraries.

    They hold no home folder, no secrets and no other process. The whole of a prefix is not among them,
    because `python -m venv .` makes a project's own folder a prefix.
    """
    base = Path(sys.base_prefix)
    folders = [] if str(base) in ("/", "/usr") else [base / "lib", base / "lib64"]
    if sys.prefix != sys.base_prefix:  # a virtual environment: its packages are in lib/python3.11
        name = Path(os.__file__).parent.name
        folders += [Path(sys.prefix, library, name) for library in ("lib", "lib64")]
    wanted = [*folders, *map(Path, (*_SYSTEM, *_SINGLE))]
    return [path for path in dict.fromkeys(wanted) if path.exists()]


def _leave_behind(report: int) -> None:
    """Closes what packages opened as the interpreter started; their .pth files may run code.

    Raises RuntimeError if they started a thread: that thread would not be locked in.
    """
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208
    if threads > 1:
        raise RuntimeError(f"{threads} threads run before the program, started by a package's .pth file")
    for number in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208
        if number > 2 and number != report:
            with suppress(OSError):  # the listing's own descriptor, which is closed by now
                os.close(number)


def _limit(seconds: int, memory: int) -> None:
    for what, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
    # SIGXCPU, then SIGKILL if a program ignores that
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))


def _prctl(option: int, value: int, what: str) -> None:
    zero = ctypes.c_ulong(0)
    if ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(value), zero, zero, zero):
        raise OSError(ctypes.get_errno(), f"{what} cannot be dropped")


def _drop_capabilities() -> None:
    """Gives up the capabilities that root has, so that limits and locks apply to root as well."""
    header = struct.pack("=Ii", _CAPABILITIES_VERSION, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, bytes(24)):
        raise OSError(ctypes.get_errno(), "the capabilities cannot be dropped")


def _error_of(program: str, module: types.ModuleType) -> BaseException | None:
    """Runs the program in this module; returns what it raised, or None."""
    sys.modules[module.__name__] = module
    try:
        exec(compile(program, "<answer>", "exec"), vars(module))  # noqa: S102 (that is what it is for)
    except BaseException as error:  # noqa: BLE001 (sys.exit() is no way to pass)
        return error
    return None


def _said(error: BaseException) -> str:
    """Returns what was raised as text. Of a long text the end is kept."""
    said = "".join(traceback.format_exception_only(error)).strip()
    return (said[-_LONGEST:] or type(error).__name__) + _why(error)


def _why(error: BaseException) -> str:
    """Returns a note for people if the sandbox caused the error, else ""."""
    if isinstance(error, OSError) and error.errno in (errno.EPERM, errno.EACCES):
        return " (the sandbox refuses it)"
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return " (a program has one thread in the sandbox)"
    return ""


class _OutOfTimeError(BaseException):
    """Raised when a call takes too long. It is not an Exception, because programs catch those."""


def _out_of_time(number: int, frame: object) -> None:
    raise _OutOfTimeError


def _result(function: Callable[..., object] | None, text: str, seconds: float) -> str:
    """Returns the result of one call: "returns …", "raises TypeError" or "out of time"."""
    arguments = ast.literal_eval(text)
    if "random" in sys.modules:  # so that the result is the same each time
        sys.modules["random"].seed(0)
    try:
        signal.signal(signal.SIGPROF, _out_of_time)
        signal.setitimer(signal.ITIMER_PROF, seconds, seconds)  # repeated, because a program may catch it
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
    """Has this process killed when the process that started it ends, for whatever reason."""
    _prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, "outliving it")
    if os.getppid() != parent:  # the parent had ended before
        os._exit(1)


def _main() -> None:
    report, seconds, memory, parent = (int(argument) for argument in sys.argv[1:5])
    _die_with(parent)
    asked = json.load(sys.stdin)
    _leave_behind(report)
    null = os.open("/dev/null", os.O_RDWR)
    _limit(seconds, memory)
    _prctl(_SET_DUMPABLE, 0, "dumps")  # the limit does not apply if the system pipes core dumps to a program
    _prctl(_SET_NO_NEW_PRIVILEGES, 1, "new privileges")  # without this, only root could lock itself in
    landlock.restrict(_readable())
    _drop_capabilities()
    seccomp.restrict()
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    os.write(report, b"ready\n")

    def say(**said: Any) -> None:
        os.write(report, json.dumps({"secret": asked["secret"], **said}).encode() + b"\n")

    module = types.ModuleType("answer")  # not __main__: its tests must not run or read input
    error = _error_of(asked["program"], module)
    if calls := asked.get("calls"):
        function = vars(module).get(calls["function"])
        for text in calls["inputs"]:
            say(result=_result(function, text, calls["seconds"]) if error is None else _raises(error))
    say(error=None if error is None else _said(error))
    os._exit(0)  # skips what the program registered to run at exit


_main()
