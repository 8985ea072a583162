"""Calls of tools are found in the forms that models write, whole or in pieces; all else stays text."""

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emlocal.answers.tool_calls import MOST_CALLS, CallReader, ToolCall, parsed, schema_of_call

TOOLS = ("f", "get_weather")
ONE = ToolCall("f", {"x": 1, "y": ["</tool_call>", {"z": None}]})
TWO = ToolCall("get_weather", {"city": "Oslo; [ARGS] } é"})


def dumped(call: ToolCall, key: str = "arguments") -> str:
    return json.dumps({"name": call.name, key: dict(call.arguments)}, ensure_ascii=False)


def hermes(calls: list[ToolCall]) -> str:
    return "\n".join(f"<tool_call>\n{dumped(call)}\n</tool_call>" for call in calls)


def llama(calls: list[ToolCall]) -> str:
    return "; ".join(dumped(call, "parameters") for call in calls)


def mistral(calls: list[ToolCall]) -> str:
    return f"[TOOL_CALLS][{', '.join(map(dumped, calls))}]"


def newer_mistral(calls: list[ToolCall]) -> str:
    return "".join(f"[TOOL_CALLS]{c.name}[ARGS]{json.dumps(dict(c.arguments))}" for c in calls)


FORMS = {
    "hermes": hermes,
    "llama": llama,
    "llama, marked": lambda calls: "<|python_tag|>" + llama(calls),
    "mistral": mistral,
    "mistral, unmarked": lambda calls: mistral(calls).removeprefix("[TOOL_CALLS]"),
    "newer mistral": newer_mistral,
    "hermes, cut off after the JSON": lambda calls: hermes(calls).removesuffix("</tool_call>"),
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.builds(ToolCall, st.sampled_from(TOOLS), st.dictionaries(st.text(max_size=4), JSON, max_size=3))
SNIPPETS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "f", '{"name": "f", '),
        *('"parameters": {}}', '"arguments": {"x": 1}}', "[", "]", "{", "}", ";", "\n", " ", "<tool", "text"),
    ]
)


def in_pieces(text: str, cuts: list[int], tools: tuple[str, ...] = TOOLS) -> tuple[str, tuple[ToolCall, ...]]:
    reader, said = CallReader(tools), ""
    ends = [*sorted(c % (len(text) + 1) for c in cuts), len(text)]
    start = 0
    for end in ends:
        said += reader.feed(text[start:end])
        start = end
    said += reader.end()
    return said, reader.calls


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("calls", [[ONE], [TWO], [ONE, TWO]])
def test_the_forms(form: str, calls: list[ToolCall]) -> None:
    assert parsed(FORMS[form](calls), TOOLS) == ("", tuple(calls))


@pytest.mark.parametrize("form", ["hermes", "mistral", "newer mistral", "llama, marked"])
def test_text_before_a_call(form: str) -> None:
    assert parsed("[1] Let me see.\n" + FORMS[form]([ONE]), TOOLS) == ("[1] Let me see.", (ONE,))


def test_ids_and_arguments_as_text() -> None:
    assert parsed('[TOOL_CALLS]f[CALL_ID]abc[ARGS]{"x": 1}', TOOLS).calls == (ToolCall("f", {"x": 1}),)
    assert parsed('<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', TOOLS).calls == (
        ToolCall("f", {"x": 1}),
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "The answer is 4.",
        '{"name": "other", "parameters": {}}',  # bare, and no tool of ours: an answer in JSON
        '{"city": "Oslo"}',
        '{"name": "f", "parameters": {}} and more',
        '{"name": "f", "parameters": [1]}',
        '{"name": "f", "parameters": {"x": NaN}}',
        '{"name": "f", "parameters": ',
        '[{"name": "f"}]',
        "[1, 2, 3]",
        "[]",
        '<tool_call>{"name": "f", "arguments": {}',
        "<tool_call><function=f><parameter=x>1</parameter></function></tool_call>",  # Qwen3-Coder's form
        '<|python_tag|>print("hi")',
        "[TOOL_CALLS]",
        "[TOOL_CALLS]f{}",
        "a <tool_call",
        '{"name": "f", "parameters": ' + '{"x": ' * 100_000,
    ],
)
def test_all_else_stays_text(text: str) -> None:
    assert parsed(text, TOOLS) == (text, ())


def test_without_tools_all_is_text_at_once() -> None:
    reader = CallReader(())
    assert [reader.feed(hermes([ONE])), reader.end(), reader.calls] == [hermes([ONE]), "", ()]


def test_many_calls_stay_text() -> None:
    text = hermes([ONE] * (MOST_CALLS + 1))
    assert parsed(text, TOOLS) == (text, ())
    assert len(parsed(hermes([ONE] * MOST_CALLS), TOOLS).calls) == MOST_CALLS


def test_text_streams_until_a_call_may_begin() -> None:
    reader = CallReader(TOOLS)
    pieces = [reader.feed(piece) for piece in ("Hello ", "you <", "b> and <tool", "_call>{")]
    assert pieces == ["Hello ", "you ", "<b> and ", ""]


@given(st.lists(CALLS, min_size=1, max_size=3), st.sampled_from(sorted(FORMS)), st.lists(st.integers(0)))
def test_what_is_written_is_found(calls: list[ToolCall], form: str, cuts: list[int]) -> None:
    text = FORMS[form](calls)
    assert in_pieces(text, cuts) == ("", tuple(calls))


@given(st.lists(SNIPPETS, max_size=12).map("".join), st.lists(st.integers(0), max_size=8))
def test_pieces_give_what_the_whole_gives(text: str, cuts: list[int]) -> None:
    whole: tuple[Any, Any] = in_pieces(text, [])
    assert in_pieces(text, cuts) == whole
    if not whole[1]:
        assert whole[0] == text


@given(st.text())
def test_no_text_is_lost(text: str) -> None:
    said = parsed(text, TOOLS)
    assert said.calls or said.text == text


def test_the_schema_of_a_call_is_read_as_that_call() -> None:
    """Also where parameters refer to their own root, as pydantic's do for nested models."""
    recursive = {
        "$defs": {"Node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}}}},
        "$ref": "#/$defs/Node",
    }
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": recursive}},
        {"type": "function", "function": {"name": "g"}},
    ]
    checker = jsonschema.Draft202012Validator(schema_of_call(tools))
    good = {"name": "f", "arguments": {"next": {"next": {}}}}
    assert checker.is_valid(good)
    assert checker.is_valid({"name": "g", "arguments": {"x": 1}})
    for bad in (
        {"name": "f", "arguments": {"next": {"next": 1}}},
        {"name": "h", "arguments": {}},
        {"name": "g"},
        {"name": "g", "arguments": {}, "more": 1},
    ):
        assert not checker.is_valid(bad)
    assert parsed(json.dumps(good), ["f", "g"]).calls == (ToolCall("f", {"next": {"next": {}}}),)
