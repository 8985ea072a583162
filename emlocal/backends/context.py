"""How many tokens a context holds: asked for, or chosen."""

from emlocal.backends.options import DEFAULT_CONTEXT
from emlocal.errors import UsageError


def context_length(asked: int | None, trained: int) -> int:
    """The tokens asked for; else the model's own length, at most `DEFAULT_CONTEXT`.

    Raises UsageError for more than the model was trained for.
    """
    if asked is None:
        return min(trained, DEFAULT_CONTEXT)
    if asked > trained:
        raise UsageError(
            f"--context {asked:,} is longer than the {trained:,} tokens the model was trained for",
            f"use at most --context {trained}",
        )
    return asked
