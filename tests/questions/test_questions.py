"""Question files in each format, read by batch, training and evaluation; no gold answer is in a prompt."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from emlocal.backends.fake import FakeBackend
from emlocal.batch.lines import BadLine, Item, parse_object, read_file
from emlocal.errors import EmlocalError, UsageError
from emlocal.evaluation.tasks import open_task
from emlocal.generation.dialogue import text_of
from emlocal.generation.prompt import prompt_tokens, with_system
from emlocal.questions.files import form_of, opened
from emlocal.settings.resolve import LINE, read_settings
from emlocal.training.prompts import read_prompts
from tests.batch.batches import rows, settings

QUESTIONS = ["A box holds 12 pens.\nHow many pens do 3 boxes hold?", "How many days have two weeks?"]
GOLD = ["36", "14"]
ROWS = [{"question": q, "answer": a} for q, a in zip(QUESTIONS, GOLD, strict=True)]
CSV = f'question,answer\n"{QUESTIONS[0]}",36\n\n{QUESTIONS[1]},14\n'
CONTENT = {
    "q.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "q.JSONL": "".join(json.dumps(row) + "\n" for row in ROWS),
    "q.json": json.dumps(ROWS, indent=1),
    "lines.json": "".join(json.dumps(row) + "\n" for row in ROWS),
    "table.json": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}),
    "q.csv": CSV,
    "q.tsv": CSV.replace(",", "\t"),
}


def in_batch(path: Path) -> list[Item | BadLine]:
    with opened(path) as file:
        return list(read_file(file, form_of(path), str(path)))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("begins", ["", "\ufeff"])
@pytest.mark.parametrize("name", CONTENT)
def test_all_readers_read_all_formats(tmp_path: Path, name: str, begins: str, packed: bool) -> None:
    raw = (begins + CONTENT[name]).encode()
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(raw) if packed else raw)
    prompts = read_prompts(str(path))
    assert [[text_of(m) for m in p.messages] for p in prompts] == [[q] for q in QUESTIONS]
    assert [p.answer for p in prompts] == GOLD
    items = in_batch(path)
    assert [i.prompt for i in items if isinstance(i, Item)] == QUESTIONS
    assert [i.extra for i in items if isinstance(i, Item)] == [{"answer": a} for a in GOLD]
    with_task = open_task("questions", path)
    assert [(p.question, p.answer) for p in with_task.problems] == list(zip(QUESTIONS, GOLD, strict=True))
    with_task.close()


def test_the_line_of_a_cell_is_named(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text(CSV + "\n ,7\n")
    with pytest.raises(UsageError, match=r"q\.csv, line 7: none of messages, prompt"):
        read_prompts(str(tmp_path / "q.csv"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"question,answer\n1,2,3\n", "line 2 has 3 cells; the first line names 2"),
        (b'question\n"open\n', "unexpected end of data"),
        (b"question,question\n1,2\n", "two columns have the name 'question'"),
        (b"question\ncaf\xe9\n", "line 2: byte 0xe9 is not UTF-8"),
        ("question\na\n".encode("utf-16"), "is UTF-16 text"),
        (gzip.compress(b"question\na\n", mtime=0)[:-9], "cannot be read"),
    ],
)
def test_a_broken_table_says_where(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "q.csv"
    path.write_bytes(content)
    for read in (in_batch, read_prompts):
        with pytest.raises(UsageError, match=says):
            read(path)


def test_settings_in_a_table(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text("prompt,temperature,max_tokens,raw,custom_id,stop\nHi,0.5,7,true,12,\nHo,,,,,x\n")
    first, second = in_batch(path)
    assert isinstance(first, Item)
    assert isinstance(second, Item)
    assert (first.overrides["temperature"], first.overrides["max_tokens"]) == (0.5, 7)
    assert (first.raw, first.custom_id) == (True, "12")
    assert {k: v for k, v in second.overrides.items() if v is not None} == {"stop": "x"}


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "q.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert [i.prompt for i in in_batch(path) if isinstance(i, Item)] == QUESTIONS
    assert [p.answer for p in read_prompts(str(path))] == GOLD
    assert [p.answer for p in open_task("questions", path).problems] == GOLD


def test_parquet_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "q.parquet").write_bytes(b"PAR1")
    with pytest.raises(EmlocalError, match="needs the package pyarrow"):
        read_prompts(str(tmp_path / "q.parquet"))


USER = {"role": "user", "content": "What is 9+8?"}
GPT = {"from": "gpt", "value": "17"}
ASKED: list[dict[str, Any]] = [
    {"prompt": [USER], "answer": "17"},
    {"prompt": None, "question": "What is 9+8?"},
    {"messages": None, "problem": "What is 9+8?"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is 9+8?"}]}]},
    {"conversations": [{"from": "human", "value": "What is 9+8?"}, GPT]},
    {"conversations": [USER, {"role": "assistant", "content": "17"}]},
]


@pytest.mark.parametrize("row", ASKED)
def test_a_question_in_each_shape(row: dict[str, Any]) -> None:
    (prompt,) = read_prompts([row])
    assert prompt.messages == (USER,)
    item = parse_object(1, row)
    assert isinstance(item, Item)
    assert (item.messages or ({"role": "user", "content": item.prompt},)) == (USER,)


def test_an_answer_without_text_is_left_out() -> None:
    row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": []}]}
    assert read_prompts([row])[0].messages == (USER,)


def test_a_system_text_of_the_row() -> None:
    system = {"role": "system", "content": "In French."}
    for row in (
        {"prompt": "What is 9+8?"},
        {"messages": [USER]},
        {"conversations": [{"from": "human", "value": USER["content"]}]},
    ):
        assert read_prompts([{**row, "system": "In French."}])[0].messages == (system, USER)
    item = parse_object(1, {"messages": [USER], "system": "In French."})
    assert isinstance(item, Item)
    assert item.messages == (system, USER)
    twice = parse_object(1, {"messages": [system, USER], "system": "In French."})
    assert isinstance(twice, BadLine)
    assert "leave one out" in twice.message


def test_an_evaluation_asks_single_questions(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    row: dict[str, Any] = {"prompt": [{"role": "system", "content": "Be short."}, USER], "answer": "17"}
    path.write_text(json.dumps(row))
    assert open_task("questions", path).problems[0].question == "Be short.\n\nWhat is 9+8?"
    row["prompt"] += [{"role": "assistant", "content": "17"}, USER]
    path.write_text(json.dumps(row))
    with pytest.raises(UsageError, match="has several turns"):
        open_task("questions", path)


OWN = [
    {"examples": ["a", "b"]},
    {"completion_tokens": 12},
    {"sample": 3},
    {"speed": 3},
    {"top": "x"},
    {"tempo": 120},
    {"body": "Dear all, …"},
    {"body": {"subject": "x"}},
]


@pytest.mark.parametrize("column", OWN, ids=[next(iter(column)) for column in OWN])
def test_columns_of_ones_own_are_kept(column: dict[str, Any]) -> None:
    found = parse_object(1, {"prompt": "Hi", **column, "max_tokens": 2})
    assert isinstance(found, Item), found
    assert (found.extra, found.overrides) == (column, {"max_tokens": 2})


def test_null_fields_are_absent() -> None:
    found = parse_object(1, {"prompt": "Hi", "raw": None, "system": None, "messages": None})
    assert found == parse_object(1, {"prompt": "Hi"})
    assert isinstance(found, Item)
    assert found.content() == '[null,"Hi",false,{}]'  # as in earlier versions: their outputs resume


def test_jsonl_is_read_as_it_comes() -> None:
    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            line = b'{"prompt": "Hi"}\n'[: len(buffer)]
            buffer[: len(line)] = line
            return len(line)

    items = read_file(io.BufferedReader(Endless()), "jsonl", "q.jsonl")
    assert [next(items).line for _ in range(3)] == [1, 2, 3]


def test_templates_that_lose_messages() -> None:
    """The system text that a template drops, and content that must be in parts, still reach the model."""
    said = with_system([{"role": "user", "content": "USER-TEXT"}], "SYSTEM-TEXT")
    drops = "{% for m in messages if m.role == 'user' %}[{{ m.content }}]{% endfor %}"
    parts = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    for template in (drops, parts):
        backend = FakeBackend(chat_template=template)
        text = bytes(prompt_tokens(backend, said)).decode()
        assert "SYSTEM-TEXT" in text
        assert "USER-TEXT" in text


def test_lines_of_completions_become_text_completions() -> None:
    lines = [
        {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "Once upon", "max_tokens": 3}},
        {"custom_id": "b", "prompt": "Once upon", "max_tokens": 3},
    ]
    text, chat = sorted(rows(lines, settings(openai=True)), key=lambda row: row["custom_id"])
    body = text["response"]["body"]
    assert body["object"] == "text_completion"
    assert set(body["choices"][0]) == {"index", "text", "finish_reason", "logprobs"}
    assert isinstance(body["choices"][0]["text"], str)
    assert chat["response"]["body"]["object"] == "chat.completion"


def test_a_line_s_system_goes_before_the_common_one() -> None:
    lines = [{"custom_id": "a", "prompt": "x", "system": "be brief"}, {"custom_id": "b", "prompt": "x"}]
    found = {row["custom_id"]: row["prompt_tokens"] for row in rows(lines, settings(system="be very kind"))}
    assert found["a"] == len("[system]be brief\n[user]x\n[assistant]")
    assert found["b"] == len("[system]be very kind\n[user]x\n[assistant]")
    (refused,) = rows(lines[:1], settings(raw=True))
    assert "system goes through the chat template" in refused["error"]


def test_config_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbftemperature = 0.5\n")
    assert read_settings(tmp_path / "run.toml", LINE)["temperature"] == 0.5
