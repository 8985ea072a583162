"""--json-schema, --regex and --grammar on the command line, on a tiny model in real llama.cpp."""

import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

from tests.cli.conftest import Outcome

Emlocal = Callable[..., Outcome]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["the", 12]}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("given", ["file", "text"])
def test_a_schema_from_a_file_or_typed(emlocal: Emlocal, tiny: str, tmp_path: Path, given: str) -> None:
    text = json.dumps(SCHEMA)
    path = tmp_path / "schema.json"
    path.write_text(text, "utf-8")
    typed = str(path) if given == "file" else text
    done = emlocal(
        "generate", "-m", tiny, "--seed", "3", "--em-inf", "--json", "--json-schema", typed, "hello"
    )
    value = json.loads(done.out)
    jsonschema.validate(json.loads(value["text"]), SCHEMA)
    assert (value["finish_reason"], value["complete"]) == ("stop", True)


def test_a_grammar_from_a_file(emlocal: Emlocal, tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "g.gbnf"
    path.write_text('root ::= "the " ("cat" | "rat")\n', "utf-8")
    done = emlocal("generate", "-m", tiny, "-q", "--grammar", str(path), "hello")
    assert done.out in ("the cat\n", "the rat\n")


def test_an_answer_that_is_cut_off_says_that_it_is_not_whole(emlocal: Emlocal, tiny: str) -> None:
    done = emlocal("generate", "-m", tiny, "--regex", "(the ){40}", "--max-tokens", "3", "hello")
    assert "cut off at --max-tokens 3: the text does not meet its constraint" in done.err


@pytest.mark.parametrize("form", [("-q",), ("--json",), ("-q", "-n", "2")])
def test_a_script_notices_an_answer_that_breaks_its_form(
    emlocal: Emlocal, tiny: str, form: tuple[str, ...]
) -> None:
    common = ("generate", "-m", tiny, *form, "--max-tokens", "3", "hello")
    done = emlocal(*common, "--regex", "(the ){40}")
    many = "2 of 2 answers do" if "-n" in form else "the answer does"
    assert done.err == (
        f"error: {many} not match the regular expression: cut off at --max-tokens 3\n"
        "  fix: set a larger --max-tokens\n"
    )
    assert done.code == 1
    assert done.out
    assert emlocal(*common, "--regex", "the").code == 0


def test_a_chat_in_a_script_fails_if_an_answer_breaks_its_form(emlocal: Emlocal, tiny: str) -> None:
    common = ("chat", "-m", tiny, "-q", "--max-tokens", "3")
    done = emlocal(*common, "--regex", "(the ){40}", stdin="one\n")
    assert "error: the answer does not match the regular expression" in done.err
    assert done.code == 1


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--json-schema", "/nowhere.json"), "--json-schema: cannot read /nowhere.json"),
        (("--json-schema", "{"), "the JSON schema is not JSON"),
        (("--json-schema", '{"type":"foo"}'), "the JSON schema cannot be used: Invalid type"),
        (("--json-schema", "/dev/null"), "--json-schema"),
        (("--regex", "("), "the regular expression cannot be used"),
        (("--grammar", "start: foo"), "the grammar cannot be used"),
        (("--regex", "a", "--json-schema", "true"), "json_schema and regex contradict each other"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    emlocal: Emlocal, tiny: str, flags: tuple[str, ...], why: str
) -> None:
    done = emlocal("generate", "-m", tiny, "-q", *flags, "hello")
    assert done.code == 2
    assert why in done.err
    assert "Traceback" not in done.err


def test_a_chat_keeps_to_its_form_and_can_leave_it(emlocal: Emlocal, tiny: str) -> None:
    said = 'one\n/set regex ab?\ntwo\n/set json-schema {"const": 1}\nthree\n/set json-schema ""\nfour\n'
    done = emlocal("chat", "-m", tiny, "-q", "--regex", "the", "--max-tokens", "6", stdin=said)
    first, second, third, *_ = done.out.splitlines()
    assert (first, third) == ("the", "1")
    assert second in ("a", "ab")


def test_a_batch_is_not_resumed_under_another_schema(emlocal: Emlocal, tiny: str, tmp_path: Path) -> None:
    lines, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines.write_text('{"prompt": "hello"}\n', "utf-8")
    common = ("batch", str(lines), "-o", str(out), "-m", tiny, "--parallel", "1")
    assert emlocal(*common, "--regex", "the").code == 0
    assert json.loads(out.read_text("utf-8"))["text"] == "the"
    again = emlocal(*common, "--regex", "a")
    assert again.code == 2
    assert "regex" in again.err
