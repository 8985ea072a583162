"""Lines with tools: the template shows them, and rows have the calls."""

import json
from dataclasses import replace
from typing import Any

import pytest

import emlocal
from emlocal.answers.tool_calls import ToolCall
from emlocal.backends.fake import saying
from emlocal.batch.lines import parse_line
from emlocal.batch.run import Batch
from emlocal.errors import UsageError
from emlocal.generation import Scheduler
from tests.batch.batches import engine, settings
from tests.dialogues import CALLING, QUESTION, TOOLS

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.tool_calls or m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call>'


def row(
    line: dict[str, Any], reply: str, template: str = TEMPLATE, **how: Any
) -> tuple[dict[str, Any], list[str]]:
    """The line's row, and what is said to people."""
    said: list[str] = []
    backend = engine(2, saying(reply))
    backend.info = replace(backend.info, chat_template=template)
    lines = [parse_line(1, json.dumps(line).encode())]
    how_all = settings(max_tokens=200, **how)
    run = Batch(backend, lines, how_all, runner=Scheduler(backend, 2), warn=said.append)
    [found] = run.rows()
    return found, said


def asked(**fields: Any) -> dict[str, Any]:
    return {"custom_id": "a", "body": {"messages": [QUESTION], "tools": TOOLS, **fields}}


def test_calls_are_in_the_row_beside_the_text() -> None:
    found, said = row(asked(), f"Let me see.\n{CALL}")
    assert found["text"] == f"Let me see.\n{CALL}"
    [call] = found["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
    assert len(call["id"]) == 9
    assert call["id"].isalnum()
    assert said == []
    assert found["prompt_tokens"] > len(json.dumps(TOOLS))


def test_as_openai_has_them() -> None:
    found, _ = row(asked(), f"Let me see.\n{CALL}", openai=True)
    [choice] = found["response"]["body"]["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    alone, _ = row(asked(), CALL, openai=True)
    assert alone["response"]["body"]["choices"][0]["message"]["content"] is None


def test_without_tools_there_are_no_calls() -> None:
    for fields in ({"tools": None}, {"tool_choice": "none"}):
        found, _ = row(asked(**fields), CALL)
        assert (found["text"], found.get("tool_calls")) == (CALL, None)
    plain, _ = row(asked(tools=[]), "Yes.", openai=True)
    assert plain["response"]["body"]["choices"][0]["message"] == {"role": "assistant", "content": "Yes."}


def test_a_conversation_with_calls() -> None:
    found, said = row({"messages": CALLING[:3], "tools": TOOLS}, "It rains.")
    assert (found["text"], said) == ("It rains.", [])


def test_a_template_without_tools_is_warned_of() -> None:
    without = TEMPLATE.replace("{% if tools %}{{ tools | tojson }}\n{% endif %}", "")
    _, said = row(asked(), "Yes.", without)
    assert said == ["the chat template of fake does not show tools: the model will not know of them"]


def test_raw_prompts_have_no_tools() -> None:
    found, _ = row({"prompt": "x", "raw": True, "tools": TOOLS}, "Yes.")
    assert "tools go through the chat template" in found["error"]


def test_from_python() -> None:
    backend = engine(2, saying(CALL))
    backend.info = replace(backend.info, chat_template=TEMPLATE)
    model = emlocal.Model(backend, 1)
    answer = model.generate("How is Oslo's weather?", tools=TOOLS, temperature=0.0)
    assert answer.tool_calls == (ToolCall("get_weather", {"city": "Oslo"}),)
    assert answer.text == CALL
    assert model.generate("How is Oslo's weather?", temperature=0.0).tool_calls == ()
    with pytest.raises(UsageError, match=r"tools\[0\] is 1"):
        model.generate("x", tools=[1])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="a raw prompt must be one text, without roles or tools"):
        model.generate("x", tools=TOOLS, raw=True)
