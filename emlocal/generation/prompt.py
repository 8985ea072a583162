"""From messages to the tokens of a prompt: the model's template, and nothing smuggled in by a message.

An engine's `encode` is one native call. For a text of megabytes it takes seconds, in which no signal is
handled, and for a text that exceeds the context many times over it is in vain. So what cannot fit is refused
at once, and a long text is tokenized in a thread.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from emlocal.backends.base import Backend, ModelInfo
from emlocal.cancel import never, unfinished, waited_for
from emlocal.errors import CancelledError, ContextFullError, ModelError, UsageError
from emlocal.models.templates import Message, render
from emlocal.text import longest_of

SHORT = 16_384
"""Characters that any engine tokenizes within milliseconds."""
Asked = str | Sequence[Message]
"""A text that is sent as it is, or messages for the chat template."""


def prompt_tokens(backend: Backend, asked: Asked, cancelled: Callable[[], bool] = never) -> list[int]:
    """The prompt for a text that is sent as it is, or for messages (see `chat_tokens`).

    Raises ContextFullError for a text that cannot fit, CancelledError.
    """
    if isinstance(asked, str):
        return text_tokens(backend, asked, add_special=True, parse_special=True, cancelled=cancelled)
    return chat_tokens(backend, asked, cancelled)


def for_template(info: ModelInfo, messages: Sequence[Message], warn: Callable[[str], None]) -> Asked:
    """The messages, as they are asked of this model. Where it has no chat template, a single question is sent
    as it is, and `warn` is told so.

    Raises UsageError where there is no template and roles are needed.
    """
    if info.chat_template is None and [m["role"] for m in messages] == ["user"]:
        warn(sent_as_it_is(info.name))
        return messages[0]["content"]
    check_template(info.name, info.chat_template)
    return messages


def sent_as_it_is(model: str) -> str:
    """What people are told where prompts go to a model without chat template."""
    return f"{model} has no chat template; prompts are sent as they are (--raw)"


def check_template(model: str, template: str | None) -> None:
    """Raise UsageError for a model without chat template: for what needs roles."""
    if template is None:
        raise UsageError(
            f"{model} has no chat template: it takes no system message, no conversation and no training",
            "use a chat model, or send one text as it is: emlocal generate --raw",
        )


def chat_tokens(
    backend: Backend, messages: Sequence[Message], cancelled: Callable[[], bool] = never
) -> list[int]:
    """The prompt for these messages, ending where the assistant is to speak.

    Raises:
        UsageError: the model has no chat template, or its template refuses the messages.
        ModelError: the template is broken.
        ContextFullError: what the template makes of them is so long that it cannot fit.
        CancelledError: `cancelled()` became true.
    """
    info = backend.info
    check_template(info.name, info.chat_template)
    assert info.chat_template is not None
    length = sum(len(m["content"]) for m in messages)
    text = _rendered_and_checked(backend, messages) if length > SHORT else None
    named = _control_texts_in(backend, messages, length)
    if not named:
        if text is None:
            text = render(info.chat_template, messages, bos=info.bos, eos=info.eos)
        return text_tokens(backend, text, add_special=False, parse_special=True, cancelled=cancelled)
    # a message says "<|im_end|>", say: a stand-in goes through the template, and is put back as mere text
    start, end = _unused_characters(messages)
    pattern = _any_of(tuple(named))
    number = {text: str(i) for i, text in enumerate(named)}
    masked = [
        {**m, "content": pattern.sub(lambda hit: f"{start}{number[hit[0]]}{end}", m["content"])}
        for m in messages
    ]
    rendered = render(info.chat_template, masked, bos=info.bos, eos=info.eos)
    spelt = [backend.encode(text, add_special=False, parse_special=False) for text in named]
    tokens: list[int] = []
    for i, part in enumerate(re.split(f"{start}([0-9]+){end}", rendered)):
        if cancelled():
            raise CancelledError
        if i % 2:
            tokens += spelt[int(part)]
        else:
            tokens += text_tokens(backend, part, add_special=False, parse_special=True, cancelled=cancelled)
    return tokens


def with_system(messages: Sequence[Message], system: str | None) -> Sequence[Message]:
    """The messages, with a system message before them where there is none."""
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _rendered_and_checked(backend: Backend, messages: Sequence[Message]) -> str:
    """What the template makes of the messages. Raises ContextFullError where it cannot fit.

    Only the template knows how much of them goes into the prompt: some leave out thoughts and white space.
    """
    info = backend.info
    assert info.chat_template is not None
    try:
        text = render(info.chat_template, messages, bos=info.bos, eos=info.eos)
    except ModelError:  # messages of megabytes exceed the template's bounds: their size is the better reason
        check_fits(backend, "".join(m["content"] for m in messages))
        raise
    check_fits(backend, text)
    return text


def _control_texts_in(backend: Backend, messages: Sequence[Message], length: int) -> list[str]:
    """The names of control tokens that occur in the messages, which have `length` characters."""
    contents = [m["content"] for m in messages]
    if length > SHORT:
        pattern = _any_of(tuple(backend.control_texts()))
        return list(dict.fromkeys(hit for content in contents for hit in pattern.findall(content)))
    both = ([backend.encode(c, add_special=False, parse_special=p) for c in contents] for p in (True, False))
    if next(both) == next(both):  # nearly always; to list the names takes longer
        return []
    return [name for name in backend.control_texts() if any(name in content for content in contents)]


@lru_cache(maxsize=4)
def _any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(longest_of(texts))


def _unused_characters(messages: Sequence[Message]) -> tuple[str, str]:
    """Two private-use characters that no message contains."""
    said = set().union(*(m["content"] for m in messages))
    free = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in said)
    return next(free), next(free)


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
