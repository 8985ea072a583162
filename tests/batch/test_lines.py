"""Lines of input: the three forms, and the error for each fault."""

import io
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emlocal.batch.lines import BadLine, Item, canonical, digest, parse_line, parse_object, read_lines
from emlocal.text import TOO_LONG
from tests.examples import examples


def item(value: Any) -> Item:
    found = parse_line(1, json.dumps(value).encode())
    assert isinstance(found, Item), found
    return found


def read(raw: bytes) -> list[Item | BadLine]:
    return list(read_lines(io.BytesIO(raw)))


def body(**fields: Any) -> dict[str, Any]:
    return {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields},
    }


def test_a_prompt_with_settings_and_fields_of_its_own() -> None:
    found = item({"prompt": "hi", "custom_id": "q1", "temperature": 0, "top-k": 5, "gold": [1, {"a": None}]})
    assert found == Item(
        1, "q1", None, "hi", False, {"temperature": 0, "top-k": 5}, {"gold": [1, {"a": None}]}
    )


def test_a_bare_text_is_a_prompt() -> None:
    assert item("hi") == Item(1, None, None, "hi")


def test_raw_is_a_field_of_a_line() -> None:
    assert item({"prompt": "hi", "raw": True}).raw
    assert item({"prompt": "hi", "raw": True}).content() != item({"prompt": "hi"}).content()


def test_messages() -> None:
    said = [{"role": "developer", "content": "s"}, {"role": "user", "content": "u", "name": "Ann"}]
    found = item({"messages": said})
    assert found.messages == ({"role": "system", "content": "s"}, {"role": "user", "content": "u"})
    assert found.prompt is None
    assert found.custom_id is None


def test_an_openai_line() -> None:
    fields = {"temperature": 0.5, "max_completion_tokens": 7, "n": 2, "stop": "x", "seed": None}
    found = item(body(**fields, stream=False, user="u", metadata={"a": 1}, logprobs=None) | {"gold": 3})
    assert found.overrides == {"temperature": 0.5, "max_completion_tokens": 7, "n": 2, "stop": "x"}
    assert found.messages == ({"role": "user", "content": "hi"},)
    assert found.extra == {"gold": 3}
    assert found.custom_id == "a"
    assert not found.raw


NEUTRAL: dict[str, Any] = {
    "logprobs": False,
    "top_logprobs": 0,
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "stream": False,
    "user": "me",
    "modalities": ["text"],
}


def test_what_asks_for_nothing_changes_nothing() -> None:
    assert item(body(**NEUTRAL)) == item(body())
    assert item(body(**NEUTRAL)).content() == item(body()).content()


@pytest.mark.parametrize(
    ("url", "raw"),
    [
        ("/v1/chat/completions", False),
        ("/chat/completions", False),  # Azure's batch files
        ("/openai/deployments/my-gpt/chat/completions?api-version=2024-10-21", False),
        ("https://me.openai.azure.com/openai/v1/chat/completions", False),
        ("https://api.openai.com/v1/chat/completions", False),
        ("/v1/completions", True),
        ("/completions", True),
    ],
)
def test_addresses(url: str, raw: bool) -> None:
    asked = {"prompt": "once"} if raw else {"messages": [{"role": "user", "content": "hi"}]}
    assert item({"url": url, "body": asked}).raw is raw


def test_tools_and_calls() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    said = [
        {"role": "user", "content": "x?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "2"}]},
    ]
    found = item(body(messages=said, tools=[tool]))
    assert found.tools == (tool,)
    assert found.messages == (
        said[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    )
    assert found.content() != item(body(messages=said)).content()
    assert item(body(messages=said, tools=[tool], tool_choice="none")).tools is None
    own = item({"messages": said, "tools": [tool]})
    assert (own.tools, own.extra) == ((tool,), {})
    column = item({"prompt": "x", "tools": ["hammer"]})
    assert (column.tools, column.extra) == (None, {"tools": ["hammer"]})


def tools_named(*names: str) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name}} for name in names]


def test_a_call_that_is_asked_for_fixes_the_form() -> None:
    named = {"type": "function", "function": {"name": "g"}}
    for choice, names in (("required", ["f", "g"]), (named, ["g"])):
        fields = {"tools": tools_named("f", "g"), "tool_choice": choice}
        for found in (item(body(**fields)), item({"prompt": "x", **fields})):
            schema = json.loads(found.overrides["json_schema"])
            assert [call["properties"]["name"]["const"] for call in schema["anyOf"]] == names
            assert found.tools == tuple(tools_named("f", "g"))
            assert found.extra == {}
    assert item({"prompt": "x", "tool_choice": "required"}).extra == {"tool_choice": "required"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tool_choice": "required"}, "there are no tools"),
        (
            {"tools": tools_named("f"), "tool_choice": {"type": "function", "function": {"name": "h"}}},
            'names "h"',
        ),
        ({"tools": tools_named("f"), "tool_choice": {"type": "function"}}, "it must be"),
        ({"tools": tools_named("f"), "tool_choice": "any"}, "it must be"),
        ({"tools": tools_named("f"), "tool_choice": 1}, "it must be"),
        (
            {
                "tools": tools_named("f"),
                "tool_choice": "required",
                "response_format": {"type": "json_object"},
            },
            "whose form is fixed",
        ),
    ],
)
def test_calls_that_cannot_be_asked_for(fields: dict[str, Any], message: str) -> None:
    found = parse_line(1, json.dumps(body(**fields)).encode())
    assert isinstance(found, BadLine)
    assert message in found.message


def test_content_in_parts() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    found = item(body(messages=[{"role": "user", "content": parts}], prompt=None))
    assert found.messages == ({"role": "user", "content": "one two"},)


def test_a_completions_line_goes_without_template() -> None:
    found = item({"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "once", "messages": None}})
    assert (found.prompt, found.messages, found.raw) == ("once", None, True)


def test_blank_lines_bom_crlf_and_a_missing_end_of_line() -> None:
    raw = b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n   \n{"prompt": "b"}\n\n{"prompt": "c"}'
    assert [(i.line, i.prompt) for i in read(raw) if isinstance(i, Item)] == [(1, "a"), (4, "b"), (6, "c")]
    assert read(b"\xef\xbb\xbf\r\n") == read(b"\xef\xbb\xbf") == read(b"") == read(b"\n\n") == []


def test_unicode_written_and_escaped_is_the_same_line() -> None:
    written, escaped = read(
        '{"prompt": "ü😀\u2028x"}\n'.encode() + b'{"prompt": "\\u00fc\\ud83d\\ude00\\u2028x"}'
    )
    assert isinstance(written, Item)
    assert isinstance(escaped, Item)
    assert written.prompt == escaped.prompt == "ü😀\u2028x"  # U+2028 does not end a line
    assert written.content() == escaped.content()


def test_what_identifies_a_line_is_question_and_settings() -> None:
    plain = item({"prompt": "x", "seed": 1, "min_p": 0})
    assert item({"min_p": 0, "note": 7, "seed": 1, "prompt": "x"}).content() == plain.content()
    others = [
        {"prompt": "x", "seed": 2, "min_p": 0},
        {"prompt": "x"},
        {"prompt": "y", "seed": 1, "min_p": 0},
        {"messages": [{"role": "user", "content": "x"}], "seed": 1, "min_p": 0},
    ]
    assert len({plain.content(), *(item(value).content() for value in others)}) == 5


def test_digest_tells_where_one_text_ends() -> None:
    assert digest("ab", "c") != digest("a", "bc") != digest("abc")
    assert len(digest("\ud800")) == 32


def test_a_line_that_is_too_long_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emlocal.text.MAX_LINE_BYTES", 64)
    long = json.dumps({"prompt": "x" * 1000}).encode()
    first, bad, last = read(b'{"prompt": "a"}\n' + long + b'\n{"prompt": "b"}\n')
    assert isinstance(bad, BadLine)
    assert (bad.line, bad.message) == (2, TOO_LONG)
    assert isinstance(first, Item)
    assert isinstance(last, Item)
    assert (last.line, last.prompt) == (3, "b")


NESTED = b'{"prompt": "x", "k": ' + b"[" * 200 + b"]" * 200 + b"}"
NOT_THERE = "there is no parameter"
BAD = [
    (b'{"prompt": "x"', "not JSON: Expecting ',' delimiter at column 15"),
    (b"{prompt: 1}", "not JSON: Expecting property name enclosed in double quotes at column 2"),
    (b'{"prompt": "x"} {"prompt": "y"}', "not JSON: Extra data at column 17"),
    (b'{"prompt": "a\tb"}', "not JSON: Invalid control character at at column 14"),
    (b"\0\0\0", "not JSON: Expecting value at column 1"),
    (b'{"prompt": "caf\xe9"}', "byte 0xe9 at column 16 is not UTF-8"),
    (b'\xff\xfe{\0"\0', "byte 0xff at column 1 is not UTF-8"),
    (b'{"prompt": "x", "temperature": NaN}', "not JSON: NaN is not a JSON number"),
    (b'{"prompt": "x", "gold": -Infinity}', "not JSON: -Infinity is not a JSON number"),
    (b'{"prompt": "x", "gold": 1e999}', "not JSON: the number 1e999 is too large"),
    (b'{"prompt": "x", "k": ' + b"9" * 5000 + b"}", "not JSON: a number of 5,000 digits is too long"),
    (NESTED, "lists and objects are nested more than 100 deep"),
    (b"[" * 1_000_000, "lists and objects are nested more than 100 deep"),
    (b"[1]", "a list where an object is expected"),
    (b"17", "a number where an object is expected"),
    (b"null", "null where an object is expected"),
    (b"true", "true or false where an object is expected"),
    (b'""', "the prompt is empty"),
    (b"{}", "a line needs a prompt or messages"),
    ({"prompt": " \n"}, "the prompt is empty"),
    ({"prompt": 5}, "prompt is a number; it must be a text"),
    ({"prompt": ["x"]}, "prompt[0] is a text; it must be an object"),
    ({"prompt": None}, "a line needs a prompt or messages"),
    ({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "or messages, not both"),
    ({"messages": []}, "messages is empty; it must be a list with at least one message"),
    ({"messages": "hi"}, "messages is a text; it must be a list"),
    ({"messages": ["hi"]}, "messages[0] is a text; it must be an object with role and content"),
    ({"messages": [{"content": "x"}]}, "messages[0].role is null; it must be one of system, user"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, 'messages[0].role is ["user"]; it must be one of'),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "bot"}]}, 'messages[1].role is "bot"'),
    ({"messages": [{"role": "user"}]}, "messages[0].content is null; it must be a text"),
    ({"messages": [{"role": "user", "content": {"a": 1}}]}, "messages[0].content is an object"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts that are not text"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "parts that are not text"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content has parts that are not text"),
    ({"prompt": "x", "raw": "yes"}, 'raw is "yes"; it must be true or false'),
    ({"prompt": "x", "custom_id": ""}, 'custom_id is ""; it must be a text that is not empty'),
    ({"prompt": "x", "custom_id": 5}, "custom_id is 5; it must be a text that is not empty"),
    ({"prompt": "x", "temprature": 1}, f'{NOT_THERE} "temprature" (did you mean temperature?)'),
    ({"prompt": "x", "max-token": 1}, f'{NOT_THERE} "max-token" (did you mean max_tokens?)'),
    (b'{"prompt": "a\\ud83d"}', "the text has half of a surrogate pair (\\ud83d)"),
    (b'{"messages": [{"role": "user", "content": "\\ude00"}]}', "half of a surrogate pair (\\ude00)"),
    (b'{"prompt": "a", "stop": ["\\ud800"]}', "the text has half of a surrogate pair (\\ud800)"),
    (b'{"prompt": "a", "custom_id": "\\udfff"}', "the text has half of a surrogate pair (\\udfff)"),
    (b'{"prompt": "a", "\\ud801": 1}', "the text has half of a surrogate pair (\\ud801)"),
    ({"custom_id": "a", "body": "x"}, "body is a text; it must be an object"),
    ({"custom_id": "a", "body": None}, "body is null; it must be an object"),
    ({"body": {}}, "a line needs a prompt or messages"),
    (body(stream=True), "stream is true; only false is supported"),
    (body(logprobs=True), "logprobs is true; only false is supported"),
    (body(temprature=1), f'{NOT_THERE} "temprature" here (did you mean temperature?)'),
    (body(tools=[1]), "tools[0] is 1; it must be"),
    (body(functions=[{}]), "functions is [{}]; only [] is supported"),
    (body(top_logprobs=2), "top_logprobs is 2; only 0 is supported"),
    (body(best_of=True), "best_of is true; only 1 is supported"),
    (body(tool_choice="required"), "there are no tools"),
    (body() | {"url": "https://api.openai.com/v1/embeddings"}, "is supported, not"),
    (body() | {"url": "/v1/chat/completions/x"}, "is supported, not"),
    (body(messages=[{"role": "assistant", "content": None, "tool_calls": 5}]), "tool_calls is a number"),
    (body(messages=[{"role": "assistant", "tool_calls": [{"id": "a"}]}]), "tool_calls[0] is"),
    ({"messages": [{"role": "tool", "content": None}]}, "messages[0].content is null; it must be a text"),
    (body() | {"url": "/v1/embeddings"}, 'not "POST to /v1/embeddings"'),
    (body() | {"method": "GET"}, 'not "GET to /v1/chat/completions"'),
    (body() | {"url": ["x"]}, "only POST to /v1/chat/completions or /v1/completions is supported"),
    (body() | {"temperature": 0}, "temperature is outside the body (move it into the body"),
    (body() | {"prompt": "x"}, "prompt is outside the body"),
]


@pytest.mark.parametrize(("line", "says"), BAD, ids=[says[:50] for _, says in BAD])
def test_a_bad_line_says_what_is_wrong_with_it(line: bytes | dict[str, Any], says: str) -> None:
    raw = line if isinstance(line, bytes) else json.dumps(line).encode()
    found = parse_line(7, raw)
    assert isinstance(found, BadLine)
    assert found.line == 7
    assert says in found.message
    assert len(found.message) < 200
    json.dumps([found.custom_id, found.message], allow_nan=False, ensure_ascii=False).encode()


def test_bad_lines_are_told_apart_and_stay_the_same() -> None:
    raws = {line if isinstance(line, bytes) else json.dumps(line).encode() for line, _ in BAD}
    found = [parse_line(n, raw) for n, raw in enumerate(raws)]
    contents = {line.content for line in found if isinstance(line, BadLine)}
    assert len(contents) == len(raws)
    again = {line.content for line in (parse_line(1, raw) for raw in raws) if isinstance(line, BadLine)}
    assert again == contents  # wherever it stands


def test_a_bad_line_keeps_its_name_where_it_can_be_read() -> None:
    found = parse_line(1, b'{"custom_id": "q1", "prompt": 5}')
    assert isinstance(found, BadLine)
    assert found.custom_id == "q1"
    half = parse_line(1, b'{"custom_id": "q\\ud800", "prompt": "x"}')
    assert isinstance(half, BadLine)
    assert half.custom_id is None


def test_others_go_on_after_bad_lines() -> None:
    raws = [line if isinstance(line, bytes) else json.dumps(line).encode() for line, _ in BAD]
    found = read(b"\n".join(b'%s\n{"prompt": "good"}' % raw for raw in raws))
    assert sum(isinstance(each, Item) for each in found) == len(raws)
    assert [each.line for each in found if isinstance(each, BadLine)] == list(range(1, 2 * len(raws), 2))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    ["prompt", "messages", "custom_id", "body", "url", "method", "raw", "temperature", "stop", "em_preset"]
)
LINES = VALUES | st.dictionaries(FIELDS, VALUES | st.dictionaries(FIELDS, VALUES, max_size=4), max_size=5)


def _is_clean(found: Item | BadLine) -> bool:
    """Whether all of it can be written and holds no NaN."""
    parts = [found.message, found.content] if isinstance(found, BadLine) else [dict(found.extra)]
    if isinstance(found, Item):
        parts += [found.content(), dict(found.overrides)]
    json.dumps([found.custom_id, *parts], allow_nan=False)
    return True


@examples(200)
@given(st.binary(max_size=60))
def test_no_bytes_break_it(raw: bytes) -> None:
    assert _is_clean(parse_line(1, raw))
    for found in read(raw):
        assert _is_clean(found)


@examples(300)
@given(LINES)
def test_no_value_breaks_it(value: Any) -> None:
    found = parse_line(1, json.dumps(value).encode())  # Python writes a NaN, and the parser refuses it
    assert _is_clean(found)
    assert found == parse_line(1, json.dumps(value, ensure_ascii=True).encode())
    if "NaN" not in canonical(value) and "Infinity" not in canonical(value):
        assert type(parse_object(1, value)) is type(found)


@pytest.mark.parametrize(
    ("value", "says"), [(math.nan, "float values"), ({1, 2}, "type set"), (b"x", "type bytes")]
)
def test_what_is_no_json_is_a_bad_line_from_python_too(value: Any, says: str) -> None:
    found = parse_object(3, {"prompt": "x", "note": value})
    assert isinstance(found, BadLine)
    assert "cannot be written as JSON" in found.message
    assert says in found.message


def test_a_value_within_itself() -> None:
    value: dict[str, Any] = {"prompt": "x"}
    value["note"] = value
    assert isinstance(parse_object(3, value), BadLine)
