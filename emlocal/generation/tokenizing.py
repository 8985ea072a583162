"""Texts of any length become tokens: what cannot fit is refused at once, and signals are heard meanwhile.

An engine's `encode` is one native call. For a text of megabytes it takes seconds, in which no signal is
handled, and for a text that exceeds the context many times over it is in vain.
"""

from collections.abc import Callable

from emlocal.backends.base import Backend
from emlocal.cancel import unfinished, waited_for
from emlocal.errors import ContextFullError

SHORT = 16_384
"""Characters that any engine tokenizes within milliseconds."""


def never() -> bool:
    """No, it is not cancelled."""
    return False


def text_tokens(
    backend: Backend,
    text: str,
    *,
    add_special: bool,
    parse_special: bool,
    cancelled: Callable[[], bool] = never,
) -> list[int]:
    """What `Backend.encode` gives.

    Raises:
        ContextFullError: the text cannot fit the context, however it is tokenized.
        CancelledError: `cancelled()` became true.
    """
    if len(text) <= SHORT and not unfinished():
        return backend.encode(text, add_special=add_special, parse_special=parse_special)
    check_fits(backend, text)
    return waited_for(
        lambda: backend.encode(text, add_special=add_special, parse_special=parse_special), cancelled
    )


def check_fits(backend: Backend, text: str) -> None:
    """Raise ContextFullError for a text that is too long by its mere size."""
    least = backend.least_tokens(text) if len(text) > SHORT else 0
    if least >= backend.context:
        size = len(text.encode(errors="replace"))
        raise ContextFullError(
            f"the prompt has {size:,} bytes, at least {least:,} tokens;"
            f" the context holds {backend.context:,}, one of them for the answer",
            "shorten the prompt or give a larger --context",
        )
