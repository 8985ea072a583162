"""Errors that people see: one line says what failed, a second line says how to fix it.

Every error that emlocal raises on purpose is an `EmlocalError`. The command line prints it without a
traceback and exits with its `exit_code`. `explained` turns any other error that reaches the top into an
`EmlocalError`.
"""

import errno


class EmlocalError(Exception):
    """An error with a message, which says what failed, with the numbers. Exit code 1.

    `hint` is the command or the change that fixes it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(EmlocalError):
    """A wrong request: a bad value, flags that contradict each other, a file that is missing. Exit code 2."""

    exit_code = 2


class ModelError(EmlocalError):
    """An error about a model or adapter that cannot be found, downloaded, trusted or loaded."""


class WrongNameError(ModelError):
    """An error about a name that means no model or adapter, or more than one. Exit code 2: wrong usage."""

    exit_code = 2


class BackendError(EmlocalError):
    """An error about an engine that is missing, or that failed while running."""


class ContextFullError(EmlocalError):
    """An error about tokens that do not fit the context. Nothing is ever cut off silently."""


class CancelledError(Exception):
    """Raised when a long computation stops because it was asked to."""


_MEMORY_HINT = "close other programs, raise ulimit -v, or use a smaller --context, --parallel or model"

_REFUSALS = ("cannot allocate memory", "failed to map segment", "start new thread")


def explained(error: Exception) -> EmlocalError:
    """Returns an unforeseen error as one that people can read.

    Refusals by the system (memory, threads, files) are named. Any other error is reported as a defect of
    emlocal.
    """
    said = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return EmlocalError("memory ran out", _MEMORY_HINT)
    for line in said.splitlines():  # numpy prints this line among many others
        if any(part in line for part in _REFUSALS):
            return EmlocalError(f"the system refused more memory or threads: {line}", _MEMORY_HINT)
    if isinstance(error, OSError):
        return EmlocalError(f"{error.filename or 'the output'}: {error.strerror or error}")
    if isinstance(error, RecursionError):
        return EmlocalError("something is nested too deeply", "use simpler input; --debug shows where")
    return EmlocalError(
        f"unexpected {type(error).__name__}: {error}", "this is a defect of emlocal; --debug shows where"
    )


class LogitsError(EmlocalError, ValueError):
    """An error about a row of logits that is not a distribution: NaN, +inf, or every token masked."""
