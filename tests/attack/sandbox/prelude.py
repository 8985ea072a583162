"""Code that attacks use. It goes into the sandbox before a file of attacks, so it imports nothing of emlocal.

An attack is a function that returns after doing something forbidden. `proven` marks those that demonstrably
succeed without the sandbox, on any Linux and without privileges.
"""

import ctypes
import os
from collections.abc import Callable
from typing import Any

NUMBERS: dict[str, int] = {}
"""System calls of this machine, by name; filled in by the code that runs the attacks."""
VICTIM: dict[str, Any] = {}
"""Things that belong to others: see `victims.py`."""
ATTACKS: dict[str, Callable[[], object]] = {}
PROVEN: list[str] = []

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
_REFUSED = (1, 13, 38)  # EPERM, EACCES, ENOSYS


def attack(function: Callable[[], object]) -> Callable[[], object]:
    ATTACKS[function.__name__] = function
    return function


def proven(function: Callable[[], object]) -> Callable[[], object]:
    PROVEN.append(function.__name__)
    return attack(function)


def call(name: str, *arguments: Any) -> int:
    """Makes a system call. Raises OSError if it fails; ENOSYS if the architecture lacks it."""
    if name not in NUMBERS:
        raise OSError(38, name)
    given = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    done = int(libc.syscall(ctypes.c_long(NUMBERS[name]), *given))
    if done == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return done


def control(option: int, value: int = 0) -> int:
    return call("prctl", option, value, 0, 0, 0)


def own_file() -> int:
    """Returns a descriptor of a file that may be read."""
    return os.open(VICTIM["readable"], os.O_RDONLY)


def there(path: str) -> str:
    """Returns the path if the file exists; otherwise there is nothing to attack."""
    if not os.path.lexists(path):
        raise PermissionError(1, f"{path} is not there")
    return path


def come_of(name: str) -> str:
    """Runs an attack and reports the result: "did it", "refused", or the error."""
    try:
        ATTACKS[name]()
    except OSError as error:
        return "refused" if error.errno in _REFUSED else f"{type(error).__name__}: {error}"
    except BaseException as error:  # noqa: BLE001 (whatever it was is shown)
        refused = "can't start new thread" in str(error)
        return "refused" if refused else f"{type(error).__name__}: {error}"
    return "did it"
