"""From messages to the tokens of a prompt: the model's template, and nothing smuggled in by a message."""

import re
from collections.abc import Sequence

from emlocal.backends.base import Backend
from emlocal.errors import UsageError
from emlocal.models.templates import Message, render


def chat_tokens(backend: Backend, messages: Sequence[Message]) -> list[int]:
    """The prompt for these messages, ending where the assistant is to speak.

    Raises:
        UsageError: the model has no chat template, or its template refuses the messages.
        ModelError: the template is broken.
    """
    info = backend.info
    if info.chat_template is None:
        raise UsageError(
            f"{info.name} has no chat template: it is not a chat model",
            "send the prompt as it is: emlocal generate --raw",
        )
    named = _control_texts_in(backend, messages)
    if not named:
        text = render(info.chat_template, messages, bos=info.bos, eos=info.eos)
        return backend.encode(text, add_special=False, parse_special=True)
    # a message says "<|im_end|>", say: a stand-in goes through the template, and is put back as mere text
    start, end = _unused_characters(messages)
    pattern = re.compile("|".join(map(re.escape, sorted(named, key=len, reverse=True))))
    texts = list(named)
    masked = [
        {**m, "content": pattern.sub(lambda hit: f"{start}{texts.index(hit[0])}{end}", m["content"])}
        for m in messages
    ]
    rendered = render(info.chat_template, masked, bos=info.bos, eos=info.eos)
    tokens: list[int] = []
    for i, part in enumerate(re.split(f"{start}([0-9]+){end}", rendered)):
        text = texts[int(part)] if i % 2 else part
        tokens += backend.encode(text, add_special=False, parse_special=i % 2 == 0)
    return tokens


def with_system(messages: Sequence[Message], system: str | None) -> Sequence[Message]:
    """The messages, with a system message before them where there is none."""
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _control_texts_in(backend: Backend, messages: Sequence[Message]) -> list[str]:
    """The names of control tokens that occur in the messages."""
    contents = [m["content"] for m in messages]
    both = ([backend.encode(c, add_special=False, parse_special=p) for c in contents] for p in (True, False))
    if next(both) == next(both):  # nearly always; to list the names takes longer
        return []
    return [name for name in backend.control_texts() if any(name in content for content in contents)]


def _unused_characters(messages: Sequence[Message]) -> tuple[str, str]:
    """Two private-use characters that no message contains."""
    said = set().union(*(m["content"] for m in messages))
    free = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in said)
    return next(free), next(free)
