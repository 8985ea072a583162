"""What a template does with messages is found out by asking it."""

from typing import Literal

import pytest

from emlocal.errors import ModelError
from emlocal.models import templates
from emlocal.models.template_traits import ToolTraits, Traits, opening, tool_traits, traits

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}{{ m.role }}:"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %};{% endfor %}"
)
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}: "
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }}(ARGUMENTS){% endfor %}"
    "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (CHATML, Traits("text", "shown", "shown")),
        (PARTS, Traits("parts", "shown", "shown")),
        (PARTS.replace("p.type", "p['type']").replace("{% if", "{%- if"), Traits("parts", "shown", "shown")),
        (NO_SYSTEM, Traits("text", "shown", "dropped")),
        (REFUSING, Traits("text", "shown", "refused")),
        ("{{ messages[-1].content | trim | upper }}", Traits("text", "dropped", "dropped")),
        ("chatml", Traits("text", "dropped", "dropped")),  # a name, not a template
        ("{{ raise_exception('never') }}", Traits("text", "refused", "shown")),
    ],
)
def test_messages(template: str, found: Traits) -> None:
    assert traits(template) == found


@pytest.mark.parametrize(
    ("written", "arguments", "content"),
    [
        ("{{ c.function.arguments | tojson }}", "object", None),
        ("{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}", "object", None),
        ("{{ c.function.arguments }}", "text", None),
        ("{{ '' + c.function.arguments }}", "text", None),
        ("{{ '' + m.content }}{{ c.function.arguments | tojson }}", "object", ""),
        ("{{ m.content }}{{ c.function.arguments | tojson }}", "object", ""),
    ],
)
def test_tools(written: str, arguments: Literal["object", "text"], content: str | None) -> None:
    found = tool_traits(TOOLS.replace("ARGUMENTS", written))
    assert found == ToolTraits("shown", arguments, content, "shown", "shown")


def test_templates_without_tools() -> None:
    assert tool_traits(CHATML) == ToolTraits("dropped", "object", "", "dropped", "shown")
    strict = "{% for m in messages %}{{ {'user': 1, 'assistant': 2}[m.role] + 0 }}{{ m.content }}{% endfor %}"
    assert tool_traits(strict).results == "refused"


def test_the_opening_shows_whether_a_thought_is_opened() -> None:
    thinking = CHATML.replace(
        "assistant\n{% endif %}",
        "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
        "{% else %}<think>\n{% endif %}{% endif %}",
    )
    assert opening(CHATML) == "<|im_start|>assistant\n"
    assert opening(thinking) == "<|im_start|>assistant\n<think>\n"
    assert opening(thinking, enable_thinking=False) == "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ending = "{% if add_generation_prompt %}<|ai|>\n{% else %}{{ eos_token }}{% endif %}"
    ending = "{{ messages[0].content }}<|end|>\n" + ending
    assert opening(ending, eos="<|endoftext|>") == "<|ai|>\n"
    assert opening("{{ messages[0].content }}") == ""


def test_one_that_is_stopped_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def stopped(template: str, *_: object, **__: object) -> tuple[str, str]:
        asked.append(template)
        return "stopped", "it took more than 2 seconds"

    monkeypatch.setattr("emlocal.models.template_traits.outcome", stopped)
    with pytest.raises(ModelError, match="was stopped: it took more than 2 seconds"):
        traits("{{ endless }}")
    assert asked == ["{{ endless }}"]
    assert templates.outcome is not stopped
