"""Which engine runs, and why."""

from functools import cache
from importlib import import_module

from emlocal.backends import ENGINES, FOLDERS
from emlocal.backends.engine import Engine
from emlocal.errors import UsageError


@cache
def engine(name: str) -> Engine:
    """An engine's record; the engine itself is not imported. Raises UsageError for an unknown name."""
    if name not in FOLDERS:
        known = f"{', '.join(ENGINES[:-1])} or {ENGINES[-1]}"
        raise UsageError(f"there is no engine {name}", f"use --backend {known}, or leave it out")
    found: Engine = import_module(f"emlocal.backends.{FOLDERS[name]}").ENGINE
    return found


def select_backend(asked: str = "auto", model: str | None = None) -> tuple[str, str]:
    """The engine to use and the reason for it. `model`: what it is to run, as the user names it.

    Raises UsageError for an engine that this version does not have, BackendError for one whose packages are
    not installed.
    """
    if asked != "auto":
        engine(asked).check()
        return asked, "asked for"
    found = ((name, engine(name).suits(model)) for name in FOLDERS)
    return next((name, reason) for name, reason in found if reason is not None)
