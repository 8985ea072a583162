"""Files of prompts as people write them: good lines, bad lines, and their errors."""

import json
import sys
import tracemalloc
from pathlib import Path

import pytest

from emlocal.errors import EmlocalError, UsageError
from emlocal.text import MAX_LINE_BYTES
from emlocal.training.prompts import Prompt, read_prompts

UNICODE = "naïve café — 2 × 3 = 6, 日本語, 👩‍👩‍👧‍👦"


def written(tmp_path: Path, raw: bytes | str, name: str = "p.jsonl") -> str:
    path = tmp_path / name
    path.write_bytes(raw.encode() if isinstance(raw, str) else raw)
    return str(path)


def said(prompts: list[Prompt]) -> list[str]:
    return [prompt.messages[-1]["content"] for prompt in prompts]


def test_the_forms_of_a_line(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a"},
        {"question": "b", "answer": 7},
        {"problem": "c", "solution": "not looked at"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": UNICODE}]},
    ]
    prompts = read_prompts(written(tmp_path, "\n".join(map(json.dumps, lines))))
    assert said(prompts) == ["a", "b", "c", UNICODE]
    assert [p.answer for p in prompts] == [None, "7", None, None]
    assert prompts[3].messages[0] == {"role": "system", "content": "s"}
    assert [p.where for p in prompts][:2] == ["p.jsonl, line 1", "p.jsonl, line 2"]


def test_an_answer_at_the_end_of_messages_is_not_part_of_the_prompt(tmp_path: Path) -> None:
    turns = [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("assistant", "5")]
    line = json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})
    (prompt,) = read_prompts(written(tmp_path, line))
    assert [m["content"] for m in prompt.messages] == ["1", "2", "3"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n\n", "\ufeff  \n"])
def test_bom_crlf_and_blank_lines(tmp_path: Path, start: str, end: str) -> None:
    text = (start + '{"prompt": "a b"}\n   \n\n{"prompt": "' + UNICODE + '"}\n').replace("\n", end)
    prompts = read_prompts(written(tmp_path, text))
    assert said(prompts) == ["a b", UNICODE]
    assert prompts[1].where == f"p.jsonl, line {4 + start.count(chr(10))}"
    plain = (start + "a b\n   \n\n" + UNICODE + "\n").replace("\n", end)
    assert said(read_prompts(written(tmp_path, plain, "p.txt"))) == ["a b", UNICODE]


def test_a_line_of_a_megabyte(tmp_path: Path) -> None:
    long = "word " * 200_000
    prompts = read_prompts(written(tmp_path, json.dumps({"prompt": long}) + '\n{"prompt": "b"}'))
    assert said(prompts) == [long, "b"]
    assert said(read_prompts(written(tmp_path, long + "\nb", "p.txt"))) == [long.strip(), "b"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: not JSON"),
        ("plain text", "line 2: not JSON"),
        ('{"prompt": "a"} {"prompt": "b"}', "line 2: not JSON (Extra data"),
        ('["a"]', "line 2: not a JSON object"),
        ('"a"', "line 2: not a JSON object"),
        ("null", "line 2: not a JSON object"),
        ("[" * 100_000, "line 2: not JSON"),
        ("{}", "line 2: none of messages, prompt, conversations, question, problem is there"),
        ('{"text": "a"}', "line 2: none of messages"),
        ('{"prompt": ""}', "line 2: the prompt is empty"),
        ('{"prompt": " \\n"}', "line 2: the prompt is empty"),
        ('{"prompt": 7}', "line 2: prompt is a number; it must be a text"),
        ('{"prompt": null}', "line 2: none of messages"),
        ('{"prompt": ["a"]}', "line 2: prompt[0] is a text; it must be an object"),
        ('{"question": ["a"]}', "line 2: question is a list; it must be a text"),
        ('{"messages": []}', "line 2: messages is empty"),
        ('{"messages": "hi"}', "line 2: messages is a text; it must be a list"),
        ('{"messages": [{"role": "user"}]}', "line 2: messages[0].content is null"),
        ('{"messages": [{"role": "king", "content": "a"}]}', 'line 2: messages[0].role is "king"'),
        ('{"messages": [{"role": "user", "content": null}]}', "line 2: messages[0].content is null"),
        ('{"conversations": [{"from": "cat", "value": "a"}]}', 'line 2: conversations[0].from is "cat"'),
        ('{"prompt": "a", "system": 5}', "line 2: system is a number; it must be a text"),
        ('{"messages": [{"role": "system", "content": "a"}]}', 'line 2: "messages" has no user message'),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "has only the assistant's messages"),
        ('{"prompt": "\\ud83d"}', "line 2: the text has half of a surrogate pair"),
        (b'{"prompt": "caf\xe9"}', "line 2: not UTF-8"),
        (b"\x00\xff\xfe", "line 2: not UTF-8"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_used(tmp_path: Path, line: str | bytes, says: str) -> None:
    raw = line.encode() if isinstance(line, str) else line
    with pytest.raises(UsageError) as caught:
        read_prompts(written(tmp_path, b'{"prompt": "good"}\n' + raw + b"\n"))
    assert says in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 200


def test_what_is_no_text_is_told_how_to_be(tmp_path: Path) -> None:
    for name, hint in (("p.txt", "UTF-8 text"), ("p.jsonl", '{"prompt": "…"}')):
        with pytest.raises(UsageError) as caught:
            read_prompts(written(tmp_path, b"\xff\xff", name))
        assert hint in str(caught.value.hint)


def test_a_line_without_end_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    with path.open("wb") as file:
        file.truncate(8 * MAX_LINE_BYTES)  # zeros, without a newline
        file.seek(0, 2)
        file.write(b"\nshort\n")
    tracemalloc.start()
    with pytest.raises(UsageError, match="line 1: the line has more than 67,108,864 bytes"):
        read_prompts(str(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * MAX_LINE_BYTES


def test_many_bad_lines_are_counted(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"line 1: not JSON.*line 3: not JSON.*; and 1,002 more"):
        read_prompts(written(tmp_path, "x\n" * 1005))


def test_limit_reads_no_further(tmp_path: Path) -> None:
    source = written(tmp_path, '{"prompt": "a"}\n{"prompt": "b"}\nbroken')
    assert said(read_prompts(source, limit=2)) == ["a", "b"]
    assert said(read_prompts(written(tmp_path, "a\n\nb\nc", "p.txt"), limit=2)) == ["a", "b"]


@pytest.mark.parametrize("content", ["", "\n", "  \n\r\n\n", "\ufeff"])
@pytest.mark.parametrize("name", ["p.jsonl", "p.txt"])
def test_empty_files(tmp_path: Path, content: str, name: str) -> None:
    with pytest.raises(UsageError, match="has no prompts"):
        read_prompts(written(tmp_path, content, name))


def test_what_is_no_file_of_prompts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        read_prompts(str(tmp_path))
    with pytest.raises(UsageError, match="there is no file"):
        read_prompts(str(tmp_path / "none.jsonl"))
    for name in ("data/none.jsonl", "data/none.csv"):
        with pytest.raises(UsageError, match=f"there is no file {name}"):
            read_prompts(name)
    with pytest.raises(UsageError, match="there is no file -"):
        read_prompts("-")
    if sys.platform != "win32":
        with pytest.raises(UsageError, match="/dev/null has no prompts"):
            read_prompts("/dev/null")


def test_a_hub_dataset_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(EmlocalError, match="need the package datasets") as caught:
        read_prompts("openai/gsm8k:train")
    assert caught.value.hint == "pip install datasets"
