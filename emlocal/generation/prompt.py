"""From messages to the tokens of a prompt, by the model's template; text of messages stays text.

An engine's `encode` is one native call. For a text of megabytes it takes seconds, in which no signal is
handled. For a text that exceeds the context many times over, that time is wasted. So texts that cannot fit
are refused at once, and a long text is tokenized in a thread.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from emlocal.backends.base import Backend, ModelInfo
from emlocal.cancel import never, unfinished, waited_for
from emlocal.errors import CancelledError, ContextFullError, ModelError, UsageError
from emlocal.generation.dialogue import (
    Dialogue,
    Warn,
    check_shown,
    dialogue_of,
    fitted,
    template_of,
    text_of,
    with_messages,
)
from emlocal.models.template_traits import as_form
from emlocal.models.templates import Message, render
from emlocal.text import longest_of

SHORT = 16_384
"""The length in characters up to which any engine tokenizes a text within milliseconds."""
Asked = str | Sequence[Message]
"""A text that is sent as it is, or messages for the chat template: a Dialogue, where tools go with them."""


def unheard(text: str) -> None:
    """Ignores a warning, for callers that have nobody to warn."""


def once(warn: Warn) -> Warn:
    """Returns a function that passes each text to `warn` once."""
    said: set[str] = set()

    def warn_once(text: str) -> None:
        if text not in said:
            said.add(text)
            warn(text)

    return warn_once


def prompt_tokens(
    backend: Backend, asked: Asked, cancelled: Callable[[], bool] = never, warn: Warn = unheard
) -> list[int]:
    """Returns the prompt's tokens for a text that is sent as it is, or for messages (see `chat_tokens`).

    A text that begins with the model's first token, such as <s>, does not get a second one.

    Raises ContextFullError for a text that cannot fit, and CancelledError.
    """
    if not isinstance(asked, str):
        return chat_tokens(backend, asked, cancelled, warn)
    tokens = text_tokens(backend, asked, add_special=True, parse_special=True, cancelled=cancelled)
    bos = backend.info.bos
    if bos and asked.startswith(bos):
        first = backend.encode(bos, add_special=False, parse_special=True)
        if len(first) == 1 and tokens[:2] == first * 2:
            warn(f"the prompt begins with {bos}, which the model's tokenizer adds too: one of them is kept")
            return tokens[1:]
    return tokens


def for_template(info: ModelInfo, messages: Sequence[Message], warn: Warn) -> Asked:
    """Returns the messages in the form in which this model is asked.

    If the model has no chat template, a single question is sent unchanged, and `warn` is told so. Raises
    UsageError if there is no template and roles are needed.
    """
    tools = dialogue_of(messages).tools
    if info.chat_template is None and not tools and [m["role"] for m in messages] == ["user"]:
        warn(sent_as_it_is(info.name))
        return text_of(messages[0])
    template = template_of(info, dialogue_of(messages))
    if template is None and not tools and [m["role"] for m in messages] == ["system", "user"]:
        raise UsageError(
            f"{info.name} has no chat template, so a system message (--system) cannot be used",
            "leave it out, or use a chat model",
        )
    check_template(info.name, template)
    return messages


def sent_as_it_is(model: str) -> str:
    """Returns the warning for prompts that go to a model without chat template."""
    return f"{model} has no chat template; prompts are sent as they are (--raw)"


def check_template(model: str, template: str | None) -> None:
    """Raises UsageError for a model without chat template, for uses that need roles."""
    if template is None:
        raise UsageError(
            f"{model} has no chat template, which system messages, conversations and training need",
            "use a chat model, or send a text as it is: emlocal generate --raw",
        )


def chat_tokens(
    backend: Backend,
    messages: Sequence[Message],
    cancelled: Callable[[], bool] = never,
    warn: Warn = unheard,
) -> list[int]:
    """Returns the prompt's tokens for these messages; they end where the answer begins.

    If the last message is the assistant's, the answer continues it. `warn` is told what the template does not
    take as it is (see `fitted` and `check_shown`).

    Raises:
        UsageError: the model has no chat template, or its template refuses the messages.
        ModelError: the template is broken.
        ContextFullError: the template's text is so long that it cannot fit.
        CancelledError: `cancelled()` became true.
    """
    info = backend.info
    asked = dialogue_of(messages)
    check_template(info.name, template_of(info, asked))
    asked = fitted(info, asked, warn)
    texts = [*asked.texts()]
    length = sum(map(len, texts))
    text = _rendered_and_checked(backend, asked, texts, warn) if length > SHORT else None
    named = _control_texts_in(backend, asked, texts, length)
    if not named:
        if text is None:
            text = _rendered(info, asked, texts, warn)
        return text_tokens(backend, text, add_special=False, parse_special=True, cancelled=cancelled)
    # a message says "<|im_end|>", say: a stand-in goes through the template, and is put back as mere text
    start, end, _ = _unused_characters(texts)
    pattern = _any_of(tuple(named))
    number = {text: str(i) for i, text in enumerate(named)}
    masked = asked.mapped(lambda said: pattern.sub(lambda hit: f"{start}{number[hit[0]]}{end}", said))
    rendered = _rendered(info, masked, [*texts, start, end], warn)
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
    """Returns the messages, with a system message before them unless they have one."""
    if system is None or messages[0]["role"] == "system":
        return messages
    said: Message = {"role": "system", "content": system}
    more = [said, *messages]
    return with_messages(messages, more) if isinstance(messages, Dialogue) else more


def with_more(messages: Sequence[Message], answer: str, said: str) -> Sequence[Message]:
    """Returns the messages, then the answer to them and the reply to that answer."""
    before, begun = [*messages], ""
    if dialogue_of(messages).continues:
        begun = text_of(before.pop())
    after: Message = {"role": "assistant", "content": begun + answer}
    more = [*before, after, {"role": "user", "content": said}]
    return with_messages(messages, more) if isinstance(messages, Dialogue) else more


def _rendered(info: ModelInfo, asked: Dialogue, texts: Sequence[str], warn: Warn) -> str:
    """Returns the rendered messages. Raises UsageError if the template leaves out the question."""
    template = template_of(info, asked)
    assert template is not None
    values = {"add_generation_prompt": not asked.continues, **asked.variables}
    mark = ""
    said = asked
    if asked.continues:  # what comes after the mark ends the turn, and is not wanted
        *_, mark = _unused_characters(texts)
        last = {**asked[-1], "content": _marked(asked[-1], f"{mark} ")}
        said = with_messages(asked, [*asked[:-1], last])
    text = render(template, said.messages, bos=info.bos, eos=info.eos, tools=said.tools, **values)
    if mark:
        place = text.rfind(mark)
        if place < 0:
            raise UsageError(
                f"the chat template of {info.name} leaves out the assistant's last message:"
                " the answer cannot continue it",
                "leave that message out",
            )
        trimmed = not text.startswith(f"{mark} ", place)
        text = text[:place].rstrip() if trimmed else text[:place]
    check_shown(info, asked, text, warn)
    return text


def _marked(message: Message, mark: str) -> object:
    return as_form(text_of(message) + mark, "text" if isinstance(message["content"], str) else "parts")


def _rendered_and_checked(backend: Backend, asked: Dialogue, texts: Sequence[str], warn: Warn) -> str:
    """Returns the rendered messages. Raises ContextFullError if they cannot fit.

    Only the template knows how much of the messages goes into the prompt: some leave out thoughts and white
    space.
    """
    try:
        text = _rendered(backend.info, asked, texts, warn)
    except ModelError:  # messages of megabytes exceed the template's bounds: their size is the better reason
        check_fits(backend, "".join(texts))
        raise
    check_fits(backend, text)
    return text


def _control_texts_in(backend: Backend, asked: Dialogue, texts: Sequence[str], length: int) -> list[str]:
    """Returns the names of control tokens in the texts of the messages. `length`: of all texts together."""
    if length > SHORT:
        pattern = _any_of(tuple(backend.control_texts()))
        return list(dict.fromkeys(hit for text in texts for hit in pattern.findall(text)))
    # many short ones together: a name that only seems to be there is not found below
    contents = texts if asked.tools is None else ["\n".join(texts)]
    both = ([backend.encode(c, add_special=False, parse_special=p) for c in contents] for p in (True, False))
    if next(both) == next(both):  # nearly always; listing the names takes longer
        return []
    return [name for name in backend.control_texts() if any(name in text for text in texts)]


@lru_cache(maxsize=4)
def _any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(longest_of(texts))


def _unused_characters(texts: Sequence[str]) -> tuple[str, str, str]:
    """Returns three private-use characters that no text contains."""
    said = set().union(*texts)
    free = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in said)
    return next(free), next(free), next(free)


def text_tokens(
    backend: Backend,
    text: str,
    *,
    add_special: bool,
    parse_special: bool,
    cancelled: Callable[[], bool] = never,
) -> list[int]:
    """Returns the tokens of a text, as `Backend.encode` does.

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
    """Raises ContextFullError for a text whose size alone is too large for the context."""
    least = backend.least_tokens(text) if len(text) > SHORT else 0
    if least >= backend.context:
        size = len(text.encode(errors="replace"))
        raise ContextFullError(
            f"the prompt has {size:,} bytes, at least {least:,} tokens;"
            f" the context holds {backend.context:,}, one of them for the answer",
            "shorten the prompt or set a larger --context",
        )
