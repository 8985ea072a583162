"""Gold answers; rewards, votes and judges must agree on what an answer is."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from emlocal.answers.finding import find
from emlocal.answers.gold import answer_of, gold, is_right, label_of
from emlocal.answers.meaning import equivalent, majority
from emlocal.em.rewards import majority_reward, verifier_reward
from emlocal.evaluation.tasks.mathematics import MathJudge, MathTask
from tests.evaluation.data import rows

DATA = Path(__file__).parents[1] / "data"


def read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


LABELLED = read("judged_answers.jsonl")
LABELS = read("reports/labels.jsonl")
JUDGED = read("reports/judged.jsonl")
VOTES = read("reports/votes.jsonl")
ALGEBRA = {
    *(("50\\%", "\\frac{1}{2}"), ("52_8", "52"), ("3\\sqrt{13}", "\\sqrt{117}")),
    *(("\\cot x", "\\frac{\\cos x}{\\sin x}"), ("2k+2", "2(k+1)"), ("11 \\sqrt{5} + 11", "11(1+\\sqrt{5})")),
    *(("\\frac{11+9a}{20}", "\\frac{9a+11}{20}"), ("5x - 7y + 11z + 4 = 0", "-5x+7y-11z-4=0")),
    *(("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}"), ("(a+5)(b+2)", "(b+2)(a+5)")),
    *(("(a+5)(b+2)", "ab+2a+5b+10"), ("\\frac{3\\sqrt{3}}{4}", "\\frac{3}{4}\\sqrt{3}")),
    ("5", "5 \\text{ hours and } 0 \\text{ minutes}"),
}
"""Labelled answers that only math-verify finds equal: docs/evaluation.md lists the kinds."""


@pytest.fixture(scope="module")
def judge() -> Iterator[MathJudge]:
    with MathJudge() as found:
        yield found


@pytest.mark.parametrize(
    ("label", "answer"),
    [
        ("So 3 + 4 = 7.\n#### 7", "7"),
        ("#### $1,450", "$1,450"),
        ("#### x + 1", "x + 1"),
        ("#### 18\nThat took 3 steps.", "18"),
        ("We get \\boxed{(1, 2)}.", "(1, 2)"),
        ("\\boxed{1} and \\boxed{2}", "1, 2"),
        ("### Steps\n#### First\n3 + 4 = \\boxed{7}", "7"),
        ("The answer is (1, 2).", "(1, 2)"),
        ("The final answer is: $\\frac12$", "\\frac12"),
        ("Answer: 18", "18"),
        ("She has 3 pens and 4 books, which is 7.", "7"),
        ("(1, 2)", "(1, 2)"),
        ("$x^2 + 2$", "x^2 + 2"),
        ("10:30 am", "10:30 am"),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
        ("5 million dollars", "5 million dollars"),
        ("The midpoints form a regular hexagon", "The midpoints form a regular hexagon"),
        ("$18", "18"),
        (" ", None),
        ("$$", None),
    ],
)
def test_a_label_is_an_answer_or_holds_one(label: str, answer: str | None) -> None:
    assert gold(label) == answer


@pytest.mark.parametrize("row", LABELS)
def test_labels_of_reports(judge: MathJudge, row: dict[str, str]) -> None:
    assert is_right(row["text"], row["label"]) is row["right"]
    found = find(row["text"])
    assert found is not None
    assert judge.equal(gold(row["label"]) or "", found.text) is row["right"]


@pytest.mark.parametrize("row", JUDGED)
def test_judged_answers_of_reports(judge: MathJudge, row: dict[str, str]) -> None:
    assert judge.equal(row["gold"], row["answer"]) is row["equal"]
    assert is_right(f"\\boxed{{{row['answer']}}}", row["gold"]) is row["equal"]
    assert equivalent(row["gold"], row["answer"]) is row["equal"]


@pytest.mark.parametrize("row", VOTES)
def test_votes_of_reports(judge: MathJudge, row: dict[str, str]) -> None:
    assert equivalent(row["a"], row["b"]) is row["equal"]
    assert judge.equal(row["a"], row["b"])
    assert judge.equal(row["b"], row["a"])
    assert majority(["0", row["a"], row["b"]]) == 1


def test_rewards_votes_and_judge_read_the_same_answers(judge: MathJudge) -> None:
    task = MathTask("x", rows(*({"question": "?", "answer": row["gold"]} for row in LABELLED)))
    only_judge = set()
    for problem, row in zip(task.problems, LABELLED, strict=True):
        found = find(row["text"])
        read_by_eval = task.find(problem, row["text"], {})
        assert problem.answer == gold(row["gold"])
        assert read_by_eval == (None if found is None else (found.text, found.how))
        rewarded = bool(verifier_reward([answer_of(row["text"])], label_of(row["gold"]))[0])
        assert rewarded is is_right(row["text"], row["gold"])
        if found is None:
            assert not rewarded
            continue
        voted = bool(majority_reward([answer_of(row["text"]), label_of(row["gold"])])[0] == 1)
        assert voted is rewarded is equivalent(problem.answer, found.text)
        if judge.equal(problem.answer, found.text) and not rewarded:
            only_judge.add((problem.answer, found.text))
        assert not rewarded or judge.equal(problem.answer, found.text)
    task.close()
    assert only_judge == ALGEBRA
