"""Errors that people see: one line that says what failed, one that says what mends it.

Everything raised on purpose is an `EmlocalError`; the command line prints it without a traceback and
leaves with its `exit_code`. Anything else that reaches the top is `explained`.
"""

import errno


class EmlocalError(Exception):
    """What failed, with the numbers; `hint` is the command or change that mends it. Exit code 1."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(EmlocalError):
    """The request itself cannot be meant: a bad value, or flags that contradict each other. Exit code 2."""

    exit_code = 2


class ModelError(EmlocalError):
    """A model or adapter that cannot be found, fetched, trusted or loaded."""


class BackendError(EmlocalError):
    """An engine that is missing, or that failed while running."""


class ContextFullError(EmlocalError):
    """The tokens asked for do not fit the context; nothing is ever cut off silently."""


class CancelledError(Exception):
    """A long computation stopped because it was asked to."""


_MEMORY_HINT = "close other programs, raise ulimit -v, or give a smaller --context, --parallel or model"

_REFUSALS = ("cannot allocate memory", "failed to map segment", "start new thread")


def explained(error: Exception) -> EmlocalError:
    """What nobody foresaw, as an error that people can read: the system's refusals by their names, and what
    is left as a defect of emlocal."""
    said = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return EmlocalError("memory ran out", _MEMORY_HINT)
    for line in said.splitlines():  # numpy says it among many others
        if any(part in line for part in _REFUSALS):
            return EmlocalError(f"the system gives no more memory or threads: {line}", _MEMORY_HINT)
    if isinstance(error, OSError):
        return EmlocalError(f"{error.filename or 'the output'}: {error.strerror or error}")
    if isinstance(error, RecursionError):
        return EmlocalError("something is nested too deeply", "use simpler input; --debug shows where")
    return EmlocalError(f"unexpected {type(error).__name__}: {error}", "a defect; --debug shows where")


class LogitsError(EmlocalError, ValueError):
    """A row of logits that is no distribution: NaN, +inf, or every token masked."""
