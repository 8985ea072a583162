"""Tasks: reading, finding answers, judging them."""

import gzip
import io
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from emlocal.errors import EmlocalError, UsageError
from emlocal.evaluation.tasks import open_task
from emlocal.evaluation.tasks import task as task_module
from emlocal.evaluation.tasks.mathematics import MathJudge, MathTask, gold_of
from emlocal.evaluation.tasks.programs import ProgramTask
from emlocal.evaluation.tasks.scicode import SciCodeTask
from emlocal.evaluation.tasks.task import ids, read_rows
from tests.evaluation.data import HUMANEVAL_ROW, SCICODE_ROW, contained, mark, rows, write

LABELLED = Path(__file__).parents[1] / "data" / "judged_answers.jsonl"
DISAGREEMENTS = {  # docs/evaluation.md lists them, with the reasons
    ("#### 20", "right", "\\boxed{0.2}"),
    ("90^\\circ", "right", "\\boxed{\\frac{\\pi}{2}}"),
    ("(a+5)(b+2)", "wrong", "\\boxed{ab+2a+5b+10}"),
    ("(2,\\infty)", "right", "\\boxed{x > 2}"),
}


# --------------------------------------------------------------------------------------------------- reading


def test_every_form_of_file_is_read_alike(tmp_path: Path) -> None:
    values = [{"question": "1+1?", "answer": "2"}, {"question": "ä?", "answer": "3"}]
    lines = write(tmp_path / "a.jsonl", values)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    (tmp_path / "a.json").write_text(json.dumps(values))
    columns = {name: {str(i): v[name] for i, v in enumerate(values)} for name in values[0]}
    (tmp_path / "columns.json").write_text(json.dumps(columns))
    (tmp_path / "lists.json").write_text(json.dumps({n: list(c.values()) for n, c in columns.items()}))
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "columns.json", "lists.json"):
        assert list(read_rows(tmp_path / name)) == values
    assert read_rows(lines).source.startswith("a.jsonl, sha256 ")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"", "has no problems"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "line 2 is not a JSON object"),
        ("a.jsonl", b"{", "cannot be read"),
        ("a.jsonl", b"\xff\n", "cannot be read"),
        ("a.json", b"[1]", "not a list of JSON objects"),
        ("a.json", b'{"a": [1, 2], "b": [1]}', "cannot be read"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.csv", b'question,answer\n"a,1\n', "cannot be read: line 2: unexpected end"),
        ("a.xlsx", b"a,b", "is not a question file"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=said):
        read_rows(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        read_rows(tmp_path / "nothing.jsonl")


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 1,}\n', encoding="utf-8")
    with pytest.raises(UsageError, match="line 3, character 9"):
        read_rows(tmp_path / "a.jsonl")


def bomb(size: int) -> bytes:
    """Returns packed blanks, a thousand times larger when unpacked."""
    packed = io.BytesIO()
    with gzip.open(packed, "wb") as file:
        for _ in range(size >> 20):
            file.write(b" " * (1 << 20))
    return packed.getvalue()


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(bomb(300 << 20))
    tracemalloc.start()
    with pytest.raises(UsageError, match=r"a\.jsonl\.gz cannot be read: it unpacks to more than 256 MiB"):
        read_rows(tmp_path / "a.jsonl.gz")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 32 << 20


def test_only_regular_files_of_a_size_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "zero.jsonl"):
        with pytest.raises(UsageError, match="is not a regular file"):
            read_rows(tmp_path / name)
    monkeypatch.setattr(task_module, "LARGEST", 1 << 20)
    with pytest.raises(UsageError, match="has more than 1 MiB"):
        read_rows(write(tmp_path / "a.jsonl", [{"a": "x" * (1 << 20)}]))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("NaN", "'answer' is nan: it must be a finite number"),
        ("-Infinity", "'answer' is -inf: it must be a finite number"),
        ("1e400", "'answer' is inf: it must be a finite number"),
        ("[1, 2]", "'answer' is a list whose items are not all texts"),
        ('["1", null]', "'answer' is a list whose items are not all texts"),
        ('"4\\u0000"', r"an answer with the control character U\+0000"),
        ('"4\\u001b[2J"', r"an answer with the control character U\+001B"),
        (
            '"' + "1+" * 501 + '1"',
            r"an answer of 1,003 characters \(at most 1,000 can be compared\) that no answer of a"
            " model can equal",
        ),
        ('"$$"', "has no answer"),
        ('{"a": 1}', "has no answer"),
        ("true", "has no answer"),
        ("[]", "has no answer"),
    ],
)
def test_an_answer_that_no_model_can_give_is_refused(tmp_path: Path, answer: str, said: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(f'{{"question": "a", "answer": 1}}\n\n{{"question": "b", "answer": {answer}}}\n')
    with pytest.raises(UsageError, match=rf"problem 2 \(line 3\).*{said}"):
        open_task("questions", path)
    assert len(open_task("questions", path, 1).problems) == 1


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": "x"}\n{"a": "\\ud800"}\n', encoding="utf-8")
    with pytest.raises(UsageError, match="has half of a surrogate pair"):
        read_rows(tmp_path / "a.jsonl")


def test_a_limit_changes_no_names(tmp_path: Path) -> None:
    """Answers are found by name. One of the file's own ids occurs twice, so they cannot serve as names."""
    values = [{"id": i, "question": q, "answer": "1"} for i, q in (("2", "a"), ("1", "b"), ("1", "c"))]
    path = write(tmp_path / "q.jsonl", values)
    for limit in (1, 2, None):
        task = open_task("questions", path, limit)
        assert [(p.id, p.question) for p in task.problems] == [("1", "a"), ("2", "b"), ("3", "c")][:limit]


def test_the_same_file_is_known_under_another_name(tmp_path: Path) -> None:
    tasks = [
        open_task("gsm8k", write(tmp_path / name, [{"question": "a", "answer": "1"}]))
        for name in ("a.jsonl", "b.jsonl")
    ]
    assert tasks[0].identity == tasks[1].identity
    assert tasks[0].source != tasks[1].source


def test_problems_have_names() -> None:
    assert ids([{"id": "a"}, {"id": 7}]) == ["a", "7"]
    assert ids([{"id": "a"}, {"id": "a"}]) == ["1", "2"]
    assert ids([{"task_id": "HumanEval/0"}, {"task_id": "HumanEval/1"}]) == ["HumanEval/0", "HumanEval/1"]
    assert ids([{"id": "a"}, {}]) == ["1", "2"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"answer": "He has 3 + 4 = 7.\n#### 1,234"}, "1,234"),  # GSM8K
        ({"answer": "\\frac{14}{3}"}, "\\frac{14}{3}"),  # MATH-500
        ({"expected_answer": "p - q"}, "p - q"),
        ({"answer": 27.0}, "27.0"),  # AMC
        ({"answer": "$25$"}, "25"),
        ({"solution": "So \\boxed{1} or rather \\boxed{3.5e8}."}, "3.5e8"),  # Minerva
        ({"final_answer": ["2", "3"]}, "2, 3"),  # OlympiadBench
        ({"final_answer": ["$\\frac{1}{2}$"]}, "\\frac{1}{2}"),
        ({"solution": "no box"}, None),
        ({"answer": ""}, None),
        ({"answer": True}, None),
    ],
)
def test_the_gold_answer_is_found_in_each_set(row: dict[str, Any], expected: str | None) -> None:
    assert gold_of(row) == expected


@pytest.mark.parametrize("field", ["prompt", "question", "problem"])
def test_questions_go_by_several_names(field: str) -> None:
    task = MathTask("x", rows({field: "How many?", "answer": "3"}))
    assert (task.problems[0].question, task.problems[0].answer) == ("How many?", "3")


def test_a_row_without_an_answer_is_refused() -> None:
    with pytest.raises(UsageError, match="problem 2 has no answer"):
        MathTask("x", rows({"prompt": "a", "answer": "1"}, {"prompt": "b"}))


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("gsm9k", {}, "must be one of gsm8k"),
        ("minerva", {}, "needs its file"),
        ("gsm8k", {"limit": 0}, "at least 1"),
        ("humaneval", {"code_seconds": 0.0}, "more than 0"),
    ],
)
def test_what_cannot_be_meant_is_said(tmp_path: Path, name: str, more: dict[str, Any], said: str) -> None:
    data = write(tmp_path / "d.jsonl", [HUMANEVAL_ROW]) if name != "minerva" else None
    with pytest.raises(UsageError, match=said):
        open_task(name, data, **more)


def test_the_hub_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(EmlocalError, match="needs the package datasets"):
        open_task("gsm8k", None)


def test_a_limit_takes_the_first(tmp_path: Path) -> None:
    data = write(tmp_path / "mine.jsonl", [{"prompt": str(i), "answer": i} for i in range(5)])
    task = open_task("questions", data, limit=2)
    assert [p.question for p in task.problems] == ["0", "1"]
    assert task.name == "mine"


# ---------------------------------------------------------------------------------------------- mathematics


@pytest.fixture(scope="module")
def judge() -> Iterator[MathJudge]:
    with MathJudge(seconds=3) as found:
        yield found


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("Mary", "Army", False),
        ("Mary", "mary", True),
        ("Mary", "\\text{Mary}", True),
        ("listen", "silent", False),
        ("the cat", "cat the", False),
        ("True", "true", True),
        ("2024-01-05", "2018", False),
        ("2024-01-05", "2024-01-05", True),
        ("xy", "yx", True),  # a product
        ("\\text{east}", "east", True),
        ("ellipse", "An ellipse", False),
    ],
)
def test_words_are_no_products_of_letters(gold: str, answer: str, right: bool) -> None:
    with MathJudge() as judge:
        assert judge.equal(gold, answer) is right


def test_a_box_that_was_cut_off_holds_no_answer() -> None:
    task = MathTask("x", rows({"question": "?", "answer": "12"}))
    (problem,) = task.problems
    assert task.find(problem, "so \\boxed{12", {}) is None
    assert task.find(problem, "first \\boxed{11}, no, \\boxed{\\frac{12", {}) is None
    assert task.find(problem, "so \\boxed{} or 12", {}) == ("12", "last-number")
    assert task.find(problem, "so \\boxed{12}", {}) == ("12", "boxed")


def test_judging_agrees_with_people_but_for_those_listed() -> None:
    labelled = [json.loads(line) for line in LABELLED.read_text(encoding="utf-8").splitlines()]
    assert len(labelled) == 100
    task = MathTask("x", rows(*({"question": "?", "answer": row["gold"]} for row in labelled)))
    differ = {
        (row["gold"], row["label"], row["text"].removeprefix("Therefore, the final answer is ").rstrip("."))
        for i, row in enumerate(labelled)
        if mark(task, row["text"], i) != row["label"]
    }
    task.close()
    assert differ == DISAGREEMENTS


def test_the_box_is_preferred_to_the_last_number() -> None:
    task = MathTask("x", rows({"question": "?", "answer": "4"}))
    problem = task.problems[0]
    assert task.find(problem, "\\boxed{4}, checked 5 times", {}) == ("4", "boxed")
    assert task.find(problem, "4, not 5", {}) == ("5", "last-number")
    assert task.find(problem, "four", {}) is None
    task.close()


@pytest.mark.parametrize("hostile", ["9^{9^{9^{9}}}", "{" * 900, "\\sqrt{" * 150 + "2" + "}" * 150])
def test_hostile_answers_are_wrong_in_time(judge: MathJudge, hostile: str) -> None:
    assert not judge.equal("5", hostile)
    assert judge.equal("2\\sqrt{2}", "\\sqrt{8}")  # the next comparison works as before


def test_long_answers_are_wrong(judge: MathJudge) -> None:
    assert not judge.equal("5", "5+0" + " " * 2000)


BOUNDS = [
    *("\\leq 5", "\\le 5", "\\leqslant 5", "≤ 5", "≤5", "< 5", "\\lt 5", "\\geq 5", "> 5", "\\gt 5", "≥ 5"),
    *("\\neq 5", "≠ 5", "\\not= 5", "\\ll 5", "\\nleq 5", "\\not\\leq 5", "{\\leq} 5", "(\\leq 5)"),
    *(
        "$\\leq 5$",
        "x \\leq 5",
        "x\\not=5",
        "1, \\leq 5",
        "4 < x \\leq 5",
        "5 \\geq x",
        "\\{\\leq 5\\}",
        "5 \\leq",
    ),
]


@pytest.mark.parametrize("answer", BOUNDS)
def test_a_bound_is_not_a_value(judge: MathJudge, answer: str) -> None:
    assert not judge.equal("5", answer)
    assert not judge.equal("2\\sqrt{2}", answer.replace("5", "\\sqrt{8}"))


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("\\leq 5", "5", False),
        ("\\leq 5", "\\geq 5", False),
        ("\\leq 5", "≤5", True),
        ("x \\not= 5", "5", False),
        ("x \\leq 5", "x≤5", True),
        ("x \\leq 5", "5 \\geq x", True),
        ("x \\leq 5", "x<5", False),
        ("x > 2", "(2,\\infty)", True),
        ("5", "x = 5", True),
        ("5", "\\approx 5", True),
        ("5", "x \\to 5", True),
        ("5", "\\sqrt{25} = 5", True),
        ("120", "5! = 120", True),
        ("120", "5!=120", False),  # read as ≠
        ("(1,2)", "\\left(1, 2\\right)", True),
        ("5", "x -> 5", True),
        ("\\ln 2", "\\ln 2", True),
        ("5", "\\text{five or less}", False),
    ],
)
def test_relations_are_compared_with_relations(judge: MathJudge, gold: str, answer: str, right: bool) -> None:
    assert judge.equal(gold, answer) is right


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("5", "4=5", False),
        ("4", "4=5", False),
        ("5", "x = 4 = 5", False),
        ("5", "5 = 5.0", True),
        ("0.33", "0.333 = 0.33", True),  # rounded
        ("0.5", "50 \\text{ percent}", True),
        ("50", "50 percent", True),
        ("50", "0.5 = 50\\%", True),  # a side with a label is ignored
        ("5", "2+3=5", True),
        ("5", "2+2=5", True),  # the last side counts, as in math-verify
        ("4", "2+2=5", False),
    ],
)
def test_an_answer_that_contradicts_itself_is_wrong(
    judge: MathJudge, gold: str, answer: str, right: bool
) -> None:
    assert judge.equal(gold, answer) is right


def test_lines_and_quotes_in_answers_do_not_disturb(judge: MathJudge) -> None:
    assert not judge.equal("x", 'a\n"b"\n[1, 2]\ud800')
    assert judge.equal("x+1", "1 + x")


# -------------------------------------------------------------------------------------------------- scicode

SQUARES = "```python\ndef squares(x):\n    return [v * v for v in x]\n```"
TOTAL = "```python\ndef total(x):\n    return sum(squares(x)), len(x)\n```"


@contained
@pytest.mark.parametrize(
    ("index", "text", "earlier", "expected"),
    [
        (0, SQUARES, "", "right"),
        (0, SQUARES.replace("v * v", "v * 2"), "", "wrong"),
        (1, TOTAL, SQUARES, "right"),
        (1, TOTAL.replace("len(x)", "0"), SQUARES, "wrong"),
        (1, TOTAL, SQUARES.replace("v * v", "v * 2"), "wrong"),  # its own earlier step counts
        (1, TOTAL, "", "wrong"),
        (1, SQUARES, SQUARES, "no answer"),
    ],
)
def test_steps_build_on_the_models_own(index: int, text: str, earlier: str, expected: str) -> None:
    task = SciCodeTask(rows(SCICODE_ROW))
    assert mark(task, text, index, {"900.1": earlier}) == expected


@contained
def test_gold_code_passes_its_own_tests() -> None:
    task = SciCodeTask(rows(SCICODE_ROW))
    texts = {p.id: f"```python\n{task.gold(p)}\n```" for p in task.problems}
    assert [mark(task, texts[p.id], i, texts) for i, p in enumerate(task.problems)] == ["right", "right"]


def test_a_step_is_asked_with_background_and_what_was_written() -> None:
    task = SciCodeTask(rows(SCICODE_ROW))
    first, second = task.problems
    assert [[p.id for p in stage] for stage in task.stages()] == [["900.1"], ["900.2"]]
    assert task.whole(first) == task.whole(second) == "900"
    asked = task.ask(first, {})
    assert "A square is a number times itself." in asked
    assert asked.endswith("def squares(x):\n    '''Squares of x.'''\n```")
    asked = task.ask(second, {"900.1": SQUARES})
    assert "return [v * v for v in x]" in asked
    assert asked.index("v * v") < asked.index("Sum the squares.")
    assert "def squares(x):\n    '''Squares of x.'''" in task.ask(second, {"900.1": "no idea"})


def test_problems_without_gold_code_are_refused() -> None:
    step = {**SCICODE_ROW["sub_steps"][0], "ground_truth_code": ""}
    with pytest.raises(UsageError, match=r"900\.1 of SciCode has no gold code"):
        SciCodeTask(rows({**SCICODE_ROW, "sub_steps": [step]}))
    with pytest.raises(UsageError, match="not a SciCode problem"):
        SciCodeTask(rows({"problem_id": "3"}))


def test_verdicts_are_known_by_answer_problem_and_judge() -> None:
    slow, quick = (ProgramTask("x", rows(HUMANEVAL_ROW), limits) for limits in (_limits(10.0), _limits(1.0)))
    problem = slow.problems[0]
    assert slow.digest(problem, "a") == slow.digest(problem, "a")
    assert len({slow.digest(problem, "a"), slow.digest(problem, "b"), quick.digest(problem, "a")}) == 3


def _limits(seconds: float) -> Any:
    from emlocal.sandbox.run import Limits

    return Limits(seconds=seconds)
