"""Constraints of a batch's lines: their spellings, whose is stronger, and what rows say."""

import json
import re
from typing import Any

import jsonschema
import pytest

from emlocal.batch.forecast import Speed, survey
from emlocal.batch.lines import BadLine, Item, parse_object
from emlocal.methods import Chosen
from emlocal.settings import Plan, SamplingParams
from tests.batch.batches import batch_on, engine, rows, settings

FORM = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}
WRAPPED = {"type": "json_schema", "json_schema": {"name": "form", "strict": True, "schema": FORM}}


def valid(row: dict[str, Any], wanted: Any = FORM) -> None:
    assert "error" not in row, row
    assert (row["finish_reason"], row["complete"]) == ("stop", True)
    jsonschema.validate(json.loads(row["text"]), wanted)


@pytest.mark.parametrize(
    "field",
    [
        {"json_schema": FORM},
        {"json_schema": json.dumps(FORM)},
        {"response_format": WRAPPED},
        {"guided_json": FORM},
    ],
)
def test_a_line_may_ask_for_a_schema(field: dict[str, Any]) -> None:
    asked, free = rows([{"prompt": "x", "max_tokens": 200, **field}, {"prompt": "x"}])
    valid(asked)
    assert "complete" not in free


def test_openai_lines_may_too() -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 200, "response_format": WRAPPED}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (row,) = rows([line], settings(openai=True))
    found = row["response"]["body"]
    jsonschema.validate(json.loads(found["choices"][0]["message"]["content"]), FORM)
    assert found["emlocal"]["complete"] is True


def test_json_object_is_any_object() -> None:
    plan = {"response_format": {"type": "json_object"}, "max_tokens": 300, "temperature": 1.0}
    found = rows([{"prompt": str(i), **plan} for i in range(12)])
    whole = [row for row in found if row["finish_reason"] == "stop"]
    assert whole
    assert all(isinstance(json.loads(row["text"]), dict) for row in whole)


BAD = [
    ({"response_format": "json"}, "its type must be text, json_object or json_schema"),
    ({"response_format": {"type": "xml"}}, "its type must be"),
    ({"response_format": {"type": "json_schema"}}, "no json_schema.schema"),
    ({"response_format": WRAPPED, "json_schema": FORM}, "the same setting"),
    ({"json_schema": 3}, "must be a JSON schema"),
    ({"json_schema": "{"}, "not JSON"),
    ({"json_schema": {"type": "foo"}}, "Invalid type"),
    ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    ({"json_schema": FORM, "regex": "a"}, "contradict"),
    ({"grammar": "start: foo"}, "unknown name"),
    ({"json_schema": "/etc/passwd"}, "not JSON"),
]


@pytest.mark.parametrize(("field", "why"), BAD)
def test_a_bad_constraint_is_an_error_row_and_the_others_go_on(field: dict[str, Any], why: str) -> None:
    bad, good = rows([{"prompt": "x", **field}, {"prompt": "x", "regex": "abc"}], settings(ordered=True))
    assert why in bad["error"]
    assert "\n" not in bad["error"]
    assert (good["text"], good["complete"]) == ("abc", True)


@pytest.mark.parametrize(("field", "why"), BAD)
def test_a_dry_run_finds_it(field: dict[str, Any], why: str) -> None:
    line = parse_object(1, {"prompt": "x", **field})
    found = survey(engine(2), [line], settings(), speed=Speed(2, 100.0))
    assert found.bad_lines == 1
    assert why in found.bad[0][1]


def own(plan: Plan) -> Any:
    base = settings()
    return type(base)(plan, base.method, base.chosen, ordered=True)


def test_a_lines_own_constraint_takes_the_runs_place() -> None:
    plan = Plan(SamplingParams(temperature=1.0), 100, regex="run")
    lines = [
        {"prompt": "x"},
        {"prompt": "x", "regex": "line"},
        {"prompt": "x", "json_schema": {"const": 1}},
        {"prompt": "x", "response_format": {"type": "text"}},
        {"prompt": "x", "temperature": 0.5},
    ]
    found = rows(lines, own(plan))
    assert [row["text"] for row in found[:3]] == ["run", "line", "1"]
    assert "complete" not in found[3]
    assert found[4]["text"] == "run"


def test_two_constraints_at_once_are_refused() -> None:
    with pytest.raises(Exception, match="json_schema and regex contradict each other"):
        Plan(json_schema="{}", regex="a")


def test_the_order_of_properties_is_the_schemas_own() -> None:
    """Answers follow it, so lines whose schemas differ in it are different lines."""
    ab = {
        "properties": {"b": {"const": 1}, "a": {"const": 2}},
        "required": ["b", "a"],
        "type": "object",
        "additionalProperties": False,
    }
    ba = {**ab, "properties": {"a": {"const": 2}, "b": {"const": 1}}}
    one, other = (parse_object(1, {"prompt": "x", "json_schema": s}) for s in (ab, ba))
    assert isinstance(one, Item)
    assert isinstance(other, Item)
    assert one.content() != other.content()
    found = rows(
        [{"prompt": "x", "json_schema": s, "max_tokens": 300} for s in (ab, ba)], settings(ordered=True)
    )
    assert [[*json.loads(row["text"])] for row in found] == [["b", "a"], ["a", "b"]]


@pytest.mark.parametrize(
    "method", ["vote:4", "self-consistency:3", "em-best:3", "think-em:2", "power:3", "greedy"]
)
def test_methods_answer_in_form(method: str) -> None:
    """Those that draw in parts, too: what follows matches with what was begun."""
    pattern = r"so [a-f]{1,3}\.\n\nthe answer is [1-3]\."
    how = Chosen(method)
    base = Plan(SamplingParams(temperature=1.0), 120, regex=pattern)
    shared = type(settings())(how.plan(base), how, ordered=True)
    for row in rows([{"prompt": f"q{i}"} for i in range(4)], shared):
        assert "error" not in row, row
        assert re.fullmatch(pattern, row["text"])
        assert row["complete"] is True
        for sample in row.get("samples", ()):
            assert re.fullmatch(pattern, sample["text"])


def test_rows_do_not_depend_on_their_neighbours() -> None:
    lines = [{"prompt": f"q{i}", "regex": "[a-z]{3,9}(, [a-z]{2,5})*"} for i in range(9)]
    together = {row["custom_id"]: row["text"] for row in rows(lines, parallel=5)}
    alone = {row["custom_id"]: row["text"] for line in lines for row in rows([line], parallel=1)}
    assert together == alone


def test_bad_lines_are_bad_before_they_run() -> None:
    assert isinstance(parse_object(1, {"prompt": "x", "response_format": 3}), BadLine)


def test_a_runs_schema_is_for_every_line() -> None:
    plan = Plan(SamplingParams(temperature=1.0), 100, json_schema=json.dumps(FORM))
    backend = engine(3)
    run = batch_on(backend, [parse_object(i, {"prompt": f"q{i}"}) for i in range(6)], own(plan), 3)
    for row in run.rows():
        valid(row)
