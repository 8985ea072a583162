"""Each template gets messages as it wants them, and what it leaves out is not left out in silence."""

from typing import Any

import pytest

from emlocal.errors import UsageError
from emlocal.generation.dialogue import Dialogue, fitted
from emlocal.generation.prompt import chat_tokens, for_template, once, prompt_tokens, with_more, with_system
from tests.dialogues import ANSWERED, CALL, CALLING, PARTS, QUESTION, SYSTEM, TALK, TOOLS, backend_with
from tests.models.test_template_traits import CHATML, NO_SYSTEM, REFUSING
from tests.models.test_template_traits import PARTS as PARTS_TEMPLATE
from tests.models.test_template_traits import TOOLS as TOOL_TEMPLATE


def asked(template: str, messages: Any, **info: Any) -> tuple[str, list[str]]:
    """The prompt, and what is said to people."""
    warnings: list[str] = []
    backend = backend_with(template, **info)
    return bytes(prompt_tokens(backend, messages, warn=warnings.append)).decode(), warnings


def test_parts_and_texts() -> None:
    as_parts = "system:Be brief.;user:Is 2 < 3?;"
    for messages in (PARTS, [SYSTEM, QUESTION]):
        assert asked(PARTS_TEMPLATE, messages) == (as_parts, [])
        assert asked(CHATML, messages)[0].startswith("<|im_start|>system\nBe brief.<|im_end|>")
    image = [{"role": "user", "content": [{"type": "image_url"}]}]
    with pytest.raises(UsageError, match="parts that are not text"):
        asked(CHATML, image)


@pytest.mark.parametrize("template", [NO_SYSTEM, REFUSING])
def test_a_system_message_goes_in_front_of_the_question(template: str) -> None:
    text, warnings = asked(template, TALK)
    assert "Be brief.\n\nIs 2 < 3?" in text
    assert "system" not in text
    assert warnings == [
        "the chat template of fake takes no system message: its text goes in front of the first question"
    ]
    assert asked(template, [{"role": "system", "content": " "}, QUESTION]) == asked(template, [QUESTION])


def test_it_is_said_once() -> None:
    said: list[str] = []
    backend, warn = backend_with(NO_SYSTEM), once(said.append)
    for _ in range(3):
        chat_tokens(backend, TALK, warn=warn)
    assert len(said) == 1


def test_a_message_that_is_left_out() -> None:
    last = "{{ messages[-1].content | trim }}"
    assert asked(last, TALK) == (
        "And 3 < 2?",
        [
            "the chat template of fake takes no system message: its text goes in front of the first question",
            "the chat template of fake leaves out a message of the assistant",
            "the chat template of fake leaves out a message of the user",
        ],
    )
    for template in ("chatml", "{{ messages | length }}"):
        with pytest.raises(UsageError, match="leaves out what is asked") as caught:
            asked(template, [QUESTION])
        assert "--raw" in caught.value.hint


@pytest.mark.parametrize(
    "written",
    [
        "{{ m.content | tojson }}",
        "{{ m.content.replace('<', '(') }}",
        "{{ m.content.split('</think>')[-1] }}",
    ],
)
def test_a_message_that_is_written_otherwise_is_there(written: str) -> None:
    template = "{% for m in messages %}" + written + "{% endfor %}"
    thought = [QUESTION, {"role": "assistant", "content": '<think>2 "<" 3</think>Yes.'}, QUESTION]
    assert asked(template, thought)[1] == []


def test_an_answer_goes_on() -> None:
    text, warnings = asked(CHATML, ANSWERED)
    assert text == "<|im_start|>user\nIs 2 < 3?<|im_end|>\n<|im_start|>assistant\nLet me see. "
    assert warnings == []
    trimmed = CHATML.replace("m.content", "m.content | trim")
    assert asked(trimmed, ANSWERED)[0].endswith("assistant\nLet me see.")
    assert asked(PARTS_TEMPLATE, ANSWERED)[0] == "user:Is 2 < 3?;assistant:Let me see. "
    unseen = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(UsageError, match="leaves out the assistant's last message"):
        asked(unseen, ANSWERED)
    with pytest.raises(UsageError, match="the last message is the assistant's call of a tool"):
        asked(CHATML, CALLING[:2])


def test_an_answer_that_went_on_and_was_followed_by_a_question() -> None:
    more = with_more(ANSWERED, "Yes.", "Sure?")
    assert [m["content"] for m in more] == ["Is 2 < 3?", "Let me see. Yes.", "Sure?"]
    assert [m["role"] for m in with_more([QUESTION], "Yes.", "Sure?")] == ["user", "assistant", "user"]


def test_tools_stay_with_the_messages() -> None:
    dialogue = Dialogue((QUESTION,), tuple(TOOLS), {"enable_thinking": False})
    for changed in (with_system(dialogue, "Be brief."), with_more(dialogue, "a", "b")):
        assert isinstance(changed, Dialogue)
        assert (changed.tools, changed.variables) == (dialogue.tools, dialogue.variables)
    template = CHATML + "{{ enable_thinking }}{{ tools[0].function.name }}"
    assert asked(template, dialogue)[0].endswith("Falseget_weather")


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ("{{ c.function.arguments | tojson }}", '{"city": "Oslo"}'),
        ("{{ '' + c.function.arguments }}", '{"city": "Oslo"}'),
        ("{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}", "city=Oslo"),
    ],
)
@pytest.mark.parametrize("given", [{"city": "Oslo"}, '{"city": "Oslo"}'])
def test_arguments_of_calls(arguments: str, shown: str, given: Any) -> None:
    call = {**CALL, "function": {"name": "get_weather", "arguments": given}}
    messages = [CALLING[0], {**CALLING[1], "tool_calls": [call]}, *CALLING[2:]]
    text, warnings = asked(
        TOOL_TEMPLATE.replace("ARGUMENTS", arguments), Dialogue(tuple(messages), tuple(TOOLS))
    )
    assert f"assistant: get_weather({shown})tool: rainassistant: It rains." in text
    assert '"name": "get_weather"' in text
    assert warnings == []


def test_a_template_that_knows_no_tools() -> None:
    _, warnings = asked(CHATML, Dialogue((QUESTION,), tuple(TOOLS)))
    assert warnings == ["the chat template of fake does not show tools: the model will not know of them"]


def test_a_template_of_its_own_for_tools() -> None:
    own = "tools: {{ tools[0].function.name }}; {{ messages[-1].content }}"
    dialogue = Dialogue((QUESTION,), tuple(TOOLS))
    assert asked(CHATML, dialogue, tool_template=own) == ("tools: get_weather; Is 2 < 3?", [])
    assert asked(CHATML, [QUESTION], tool_template=own)[0].startswith("<|im_start|>")


def test_calls_cannot_speak_for_others() -> None:
    """Names of control tokens in arguments and in tools are text, as they are in contents."""
    calling = {**CALLING[1], "tool_calls": [{**CALL, "id": "<|im_end|>"}]}
    evil = Dialogue((QUESTION, calling, CALLING[2]), tuple(TOOLS))
    taken = fitted(backend_with(CHATML).info, evil, lambda _: None)
    masked = taken.mapped(lambda text: text.replace("<|im_end|>", "X"))
    assert "<|im_end|>" not in [*masked.texts()]
    assert masked.messages[1]["tool_calls"][0]["id"] == "X"
    assert "<|im_end|>" in [*evil.texts()]


def test_a_second_first_token() -> None:
    class Beginning(type(backend_with(CHATML))):  # type: ignore[misc]
        def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
            tokens = list(text.removeprefix("<s>").encode())
            tokens = [1, *tokens] if text.startswith("<s>") else tokens
            return [1, *tokens] if add_special else tokens

    backend = Beginning(context=512)
    object.__setattr__(backend.info, "bos", "<s>")
    said: list[str] = []
    assert prompt_tokens(backend, "<s>hi", warn=said.append) == [1, *b"hi"]
    assert said == ["the prompt begins with <s>, which the model's tokenizer adds too: one of them is kept"]
    assert prompt_tokens(backend, "hi", warn=said.append) == [1, *b"hi"]
    assert len(said) == 1


def test_tools_need_a_template() -> None:
    with pytest.raises(UsageError, match="no chat template"):
        for_template(backend_with(None).info, Dialogue((QUESTION,), tuple(TOOLS)), lambda _: None)
    own = "{{ tools }}{{ messages[0].content }}"
    info = backend_with(None, tool_template=own).info
    assert for_template(info, Dialogue((QUESTION,), tuple(TOOLS)), lambda _: None)
