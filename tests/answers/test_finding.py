"""Answers found in completions: GSM8K's and MATH-500's forms, and none inside thoughts."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from emlocal.answers.finding import Found, answer_start, check_pattern, extract, find
from emlocal.answers.meaning import canonical, equivalent
from emlocal.errors import UsageError
from tests.answers.texts import GSM8K, HOSTILE, MATH500, PIECES, listed
from tests.processor_time import at_most

REPORTS = Path(__file__).parents[1] / "data/reports"


@pytest.mark.parametrize("gold", listed(MATH500))
def test_math_answers_are_extracted_and_equal_themselves(gold: str) -> None:
    for solution in (f"So $x = \\boxed{{7}}$, hence \\boxed{{{gold}}}.", f"\\fbox{{ {gold} }} \\}} done {{"):
        found = extract(solution, "boxed")
        assert found == gold
        assert equivalent(found, gold)


@pytest.mark.parametrize("gold", GSM8K)
@pytest.mark.parametrize(
    "solution", ["2+2=<<4>>4\n#### {}", "First 7; the answer is {}.", "**${}**.", "={}%"]
)
def test_gsm8k_answers_are_extracted_and_equal_themselves(gold: str, solution: str) -> None:
    found = extract(solution.format(gold), "last-number")
    assert found is not None
    assert equivalent(found, gold)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed 5 is it", "5"),
        (r"$\boxed5$", "5"),
        (r"\boxed{\frac{1}{2", None),
        (r"first \boxed{1}, then \boxed{2", None),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{}", None),
        (r"\boxedfoo{3}", None),
        (r"\boxed", None),
        ("18", None),
    ],
)
def test_the_last_closed_box(text: str, answer: str | None) -> None:
    assert extract(text, "boxed") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("it is 1,234.5.", "1,234.5"),
        ("x = -3, so", "-3"),
        ("10-3", "3"),
        ("3/4 of it", "3/4"),
        ("12% up", "12%"),
        ("costs -$18", "-$18"),
        ("about 1e-3", "1e-3"),
        ("is .5", ".5"),
        (r"is $-\frac{3}{4}$", r"-\frac{3}{4}"),
        ("1,2", "2"),
        ("5 x2 H2O", "5"),
        ("#### 18\nThat took 3 steps.", "18"),
        ("#### 1. Count\n4 + 5\n#### 2) Sum\n9", "9"),
        ("#### $1,450,000", "$1,450,000"),
        ("#### 18.", "18"),
        ("none at all", None),
        ("", None),
    ],
)
def test_the_last_number(text: str, answer: str | None) -> None:
    assert extract(text, "last-number") == answer


def test_a_pattern_finds_its_first_group_or_itself_in_the_last_match() -> None:
    assert extract("answer: A\nanswer: B ", "regex", r"answer: (.+)") == "B"
    assert extract("A 1 B 2", "regex", r"A (\d)|B (\d)") == "2"
    assert extract("7 8", "regex", r"\d") == "8"
    assert extract("none", "regex", r"\d") is None
    assert extract("  all of it\n", "none") == "all of it"
    assert extract(" \n", "none") is None


@pytest.mark.parametrize(("how", "pattern"), [("regex", None), ("regex", "("), ("boxed", "x"), ("none", "")])
def test_patterns_that_cannot_be_meant(how: Any, pattern: str | None) -> None:
    with pytest.raises(UsageError) as error:
        check_pattern(how, pattern)
    assert "--extract-pattern" in error.value.message + error.value.hint


def test_patterns_that_can() -> None:
    check_pattern("regex", "answer: (.+)")
    check_pattern("boxed", None)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_take_bounded_time(text: str) -> None:
    with at_most(20):
        extract(text, "boxed")
        extract(text, "last-number")
        assert equivalent(text, text)


@given(st.one_of(st.lists(PIECES, max_size=60).map("".join), st.text()))
@example("1/0")
@example("0" * 200)
def test_nothing_raises(text: str) -> None:
    for how in ("boxed", "last-number", "none"):
        found = extract(text, how)
        assert found is None or equivalent(found, found)
    assert hash(canonical(text)) == hash(canonical(text))
    assert canonical(f"  {text}\n") == canonical(text)


@given(st.lists(PIECES, max_size=60).map("".join))
@example(r"\boxed{ 1 } and \boxed{2}")
def test_the_place_of_an_answer(text: str) -> None:
    found = find(text)
    if found is None:
        return
    assert found.text == found.text.strip()
    place = text[found.start : found.end]
    assert place == found.text or (found.how == "boxed" and r"box" in place)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2.5 × 10^3 kg", "2500"),
        ("$1.5\\times10^{-3}$", "0.0015"),
        ("2.5 x 10^(3) m", "2500"),
        ("about 10⁶.", "1000000"),
        ("3 1/2 hours", "7/2"),
        ("-3 1/2.", "-7/2"),
        ("$3\\frac{1}{2}$", "7/2"),
        ("3½ cups", "7/2"),
        ("$\\dfrac12$", "1/2"),
        ("1.2 billion people", "1200000000"),
        ("costs $2.5 million.", "2500000"),
        ("9.8 m/s^2", "9.8"),
        ("25 cm²", "25"),
        ("12 for all $x^2$ and $x_{10}$", "12"),
        ("it is 204_5", "204_5"),
        ("1024 = 2^10", "2^10"),
        ("2.5 1/2", "1/2"),
        ("10 5", "5"),
    ],
)
def test_numerals_are_found_whole(text: str, answer: str) -> None:
    found = find(text)
    assert found is not None
    assert found.how == "last-number"
    assert canonical(found.text) == canonical(answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1} and \boxed{2}", "1, 2"),
        (r"$x=\boxed{1}$ or $x = \boxed{2}$.", "1, 2"),
        (r"$\boxed{a}\quad\text{and}\quad\boxed{b}, \boxed{c}$", "a, b, c"),
        (r"\boxed{1} papers and \boxed{2} bins", "1, 2"),
        (r"\boxed{(3, 3)} \text{ for part (a) and } \boxed{(1, 1)}", "(3, 3), (1, 1)"),
        (r"\boxed{840}. Again: \boxed{840}", "840"),
        (r"\boxed{0.5}, \boxed{1/2}", "0.5"),
        (r"\boxed{\boxed{1}, \boxed{2}}", "1, 2"),
        (r"\boxed{3}. Wait, no. \boxed{4}", "4"),
        (r"\boxed{3}, not \boxed{4}", "4"),
        ("Step 1: \\boxed{3}\n\nThe answer is \\boxed{4}", "4"),
        (r"\boxed{200} So, after all, 0.05 \cdot 2 = \boxed{255}", "255"),
    ],
)
def test_boxes_that_stand_together_are_one_answer(text: str, answer: str) -> None:
    found = find(text)
    assert found is not None
    assert found.text == answer


def test_the_place_of_several_boxes() -> None:
    text = r"So \boxed{ 1 } and \boxed{2}."
    assert find(text) == Found("1, 2", "boxed", text.index("1"), text.index("2") + 1)
    assert find(text + r" \boxed{3") is None
    assert find("a <think>1</think>the 12.") == Found("12", "last-number", 22, 24)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"<think>First \boxed{3}, no.</think> It is 4.", "4"),
        (r"so \boxed{3}</think>\boxed{4}", "4"),  # the prompt opened the thoughts
        (r"<think>one \boxed{1}</think> and <think>\boxed{2}</think> \boxed{3}", "3"),
        (r"[THINK]\boxed{3}[/THINK]4", "4"),
        (r"<|channel|>analysis<|message|>3?<|end|><|start|>assistant<|channel|>final<|message|>4", "4"),
        (r"<|channel>thought" + "\n" + r"\boxed{3}<channel|>4", "4"),
        (r"<think></think>\boxed{4}", "4"),
        (r"<think>Maybe \boxed{3}, but", None),
        (r"\boxed{3}</think>so<think>\boxed{2}", None),
        (r"<|channel|>analysis<|message|>\boxed{3}", None),
        (r"[THINK]3", None),
        (r"<think>\boxed{3}</think>I do not know.", None),
    ],
)
def test_thoughts_are_no_answer(text: str, answer: str | None) -> None:
    found = find(text)
    assert (found.text if found else None) == answer
    assert extract(text, "none") != text


def test_where_an_answer_starts() -> None:
    assert answer_start("4") == 0
    assert answer_start("<think>4</think>5") == 16
    assert answer_start("<think>4") is None


@pytest.mark.parametrize("row", [json.loads(line) for line in (REPORTS / "extracted.jsonl").open()])
def test_answers_of_reports(row: dict[str, str | None]) -> None:
    found = find(row["text"] or "")
    assert (found and canonical(found.text)) == (row["answer"] and canonical(row["answer"]))
