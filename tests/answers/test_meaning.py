"""Answers: found in completions as GSM8K and MATH-500 are answered, compared, and voted on."""

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from emlocal.answers.finding import check_pattern, extract
from emlocal.answers.meaning import canonical, equivalent, majority
from emlocal.errors import UsageError
from tests.processor_time import at_most

# Gold answers as the two test sets write them, each form that occurs.
GSM8K = ["18", "-10", "-3", "1,450,000", "1,600", "10,800", "114,200", "2,125", "65,960", "0", "70000"]
MATH500 = r"""
    (-1,6) ¦ (-\infty, 0] ¦ (-\infty, 2) \cup (3, \infty) ¦ (-\sqrt{3}, \sqrt{3}) ¦ (1,-16,-4,43)
    (2,12) \cup (12,102) ¦ (3,4] ¦ (a+5)(b+2) ¦ -13x+3 ¦ -2 + 7i ¦ -2,1 ¦ -\frac{24}{25} ¦ .0000672
    -\frac{\pi}{6} ¦ -\sqrt{3} ¦ 1 \pm \sqrt{19} ¦ 10,\!080 ¦ 106^\circ ¦ 11,\! 111,\! 111,\! 100
    11 \sqrt{5} + 11 ¦ 11\sqrt2 ¦ 137 \frac{1}{2} ¦ 15\mbox{ cm}^2 ¦ 1\frac{4}{5} ¦ 204_5 ¦ 2k+2 ¦ 4210_{5}
    3 \pm 2 \sqrt{2} ¦ 3, 5, 7 ¦ 3R^2 ¦ 5.4 \text{ cents} ¦ 58,500 ¦ 6r^2-4r-24 ¦ \$18.90
    5x - 7y + 11z + 4 = 0 ¦ \$32,\!348 ¦ 864 \mbox{ inches}^2 ¦ \begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}
    \begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix} ¦ \cot x ¦ \dfrac{17}{50} ¦ \frac 34 ¦ \frac14 ¦ \frac9{19}
    \frac{11+9a}{20} ¦ \frac{20000}{\pi} ¦ \frac{270}7\text{ degrees} ¦ \text{Evelyn} ¦ \frac{3\sqrt{3}}{4}
    \left( 3, \frac{\pi}{2} \right) ¦ \left(\frac{3}{5},\frac{8}{3}\right] ¦ p - q
    \left[ \frac{\pi^2}{8}, \frac{5 \pi^2}{4} \right] ¦ \text{(B)} ¦ \{1\pm\sqrt{5},-2\} ¦ y = 2x + 3
    x \in [-2,7] ¦ x=5 ¦ x^8 + x^7 + x^6 + x^5 + x^4 + x^3 + x^2 + x + 1 ¦ \pi ¦ 2\sqrt{113}
"""

SAME = r"""
    1,000 ≡ 1000 ¦ 0.5 ≡ 1/2 ¦ 0.5 ≡ \frac{1}{2} ¦ 1/2 ≡ \dfrac12 ¦ 3.0 ≡ 3 ¦ .5 ≡ 0.50 ¦ $18 ≡ 18
    \$18.00 ≡ 18 ¦ -$5 ≡ -5 ¦ 18 dollars ≡ 18 ¦ 18. ≡ 18 ¦ **18** ≡ 18 ¦ 12% ≡ 12 ¦ 12\% ≡ 12 ¦ 5 apples ≡ 5
    5\text{ m} ≡ 5 ¦ 5 km ≡ 5 km/h ¦ 5cm ≡ 5 ¦ 15\mbox{ cm}^2 ≡ 15 ¦ 90^{\circ} ≡ 90 ¦ 90° ≡ 90
    90 degrees ≡ 90 ¦ x = 5 feet ≡ 5 ¦ 2.5 million ≡ 2500000 ¦ \$3 \text{ thousand} ≡ 3,000
    6.72e-5 ≡ 6.72 \times 10^{-5} ¦ 1e3 ≡ 10^3 ¦ 1\frac45 ≡ 9/5 ¦ 137 1/2 ≡ 137.5 ¦ -1\frac{1}{2} ≡ -1.5
    −3 ≡ -3 ¦ -\frac{1}{2} ≡ \frac{-1}{2} ¦ \frac{-1}{2} ≡ \frac{1}{-2} ¦ (5) ≡ 5 ¦ {5} ≡ 5
    10,\!080 ≡ 10{,}080 ¦ \frac{1,000}{2} ≡ 500 ¦ \(7\) ≡ $7$ ¦ +4 ≡ 4 ¦ 007 ≡ 7 ¦ A ≡ (A) ¦ a ≡ \text{(A)}
    A. ≡ \textbf{A} ¦ Evelyn ≡ \text{evelyn} ¦ Yes ≡ yes. ¦ x=5 ≡ 5 ¦ x \in [-2,7] ≡ [-2, 7]
    y = 2x+3 ≡ 2x + 3 ¦ f(x) = x^2 ≡ x^{2} ¦ x=1,x=2 ≡ 1, 2 ¦ 11\sqrt2 ≡ 11 \sqrt{2} ¦ 2√3 ≡ 2\sqrt{3}
    2*sqrt(3) ≡ 2\sqrt 3 ¦ 2pi ≡ 2\pi ¦ π ≡ \pi ¦ \frac{\sqrt{3}}{2} ≡ sqrt(3)/2 ¦ \frac{\pi}{6} ≡ \pi/6
    \dfrac{x+1}{2} ≡ (x+1)/2 ¦ 1+2i ≡ 2i + 1 ¦ 11+11\sqrt5 ≡ 11 \sqrt{5} + 11 ¦ x^2-1 ≡ -1 + x**2
    \frac12+x ≡ x+0.5 ¦ \left( 3, \frac{\pi}{2} \right) ≡ (3,\pi/2) ¦ (1/2, 2) ≡ (0.5,2.0)
    (-\infty,0] ≡ (-∞, 0] ¦ \{1, 2\} ≡ \left\{2,1\right\} ¦ 1,-2 ≡ -2, 1 ¦ 3 and 5 ≡ 3, 5
    1 \text{ or } 2 ≡ 2,1 ¦ 1 \pm \sqrt{19} ≡ 1-\sqrt{19}, 1+\sqrt{19} ¦ \pm 2 ≡ 2, -2 ¦ \{\pm 1\} ≡ \{1,-1\}
    \frac{1 \pm \sqrt{5}}{2} ≡ \frac{1+\sqrt5}{2}, \frac{1-\sqrt5}{2} ¦ 4210_{5} ≡ 4210_5
    (1,2) \cup (3,4] ≡ (3, 4]\cup(1, 2) ¦ x \leq 3 ≡ x <= 3 ¦ 2 \cdot 3^n ≡ 2*3^n
    \begin{pmatrix} 1/2 \\ 3 \end{pmatrix} ≡ \begin{bmatrix}0.5\\[2pt]\frac62\end{bmatrix}
"""

DIFFERENT = r"""
    1 ≡ 2 ¦ 1 ≡ -1 ¦ 1,000 ≡ 1 ¦ 0.333 ≡ 1/3 ¦ 50% ≡ 1/2 ¦ 1/2 ≡ 2 ¦ 18 ≡ 180 ¦ 5 million ≡ 5 ¦ 3 pm ≡ 3 am
    2k ≡ 2 ¦ 204_5 ≡ 204 ¦ 204_5 ≡ 204_6 ¦ 5 mod 3 ≡ 5 ¦ 1/0 ≡ 1 ¦ 0/1 ≡ 1/0 ¦ A ≡ B ¦ (A) ≡ (B) ¦ east ≡ west
    ≡ 0 ¦ yes ≡ no ¦ \pi ≡ 3.14159 ¦ 12\pi ≡ 12 ¦ \frac{\pi}{6} ≡ \frac{6}{\pi} ¦ 2^3 ≡ 23 ¦ 2^{10} ≡ 2^10 \pi
    (1,2) ≡ (2,1) ¦ (1,2) ≡ [1,2] ¦ (1,2] ≡ [1,2) ¦ (1,2) ≡ 1,2 ¦ \{1,2\} ≡ (1,2) ¦ 1,2 ≡ 1,2,2
    (100,200) ≡ 100200 ¦ (100,200) ≡ 100,200 ¦ 1,2,3 ≡ 123 ¦ 1, 000 ≡ 1,000 ¦ p-q ≡ q-p ¦ x^2 ≡ x2 ¦ 2R ≡ 2r
    x=1,y=2 ≡ x=2,y=1 ¦ x<3 ≡ x>3 ¦ x=3 ≡ x \neq 3 ¦ \sqrt{2} ≡ 2 ¦ \sqrt{12} ≡ \sqrt{1}2
    \frac{1}{2}3 ≡ \frac{1}{23} ¦ \frac{1}{2x} ≡ 1/2x ¦ 2\frac{1}{x} ≡ \frac{21}{x}
    (\frac ab)^2 ≡ \frac{a}{b^2} ¦ 2^{\frac12} ≡ \frac{2^1}{2} ¦ 1 2 ≡ 12 ¦ 1.2.3 ≡ 1.23 ¦ 1+2i ≡ 1-2i
    1e400 ≡ 1e401 ¦ 1e999999999 ≡ 1e999999998 ¦ 1 \pm x ≡ 1 + x ¦ (1,2) \cup (3,4) ≡ (1,4)
    \begin{pmatrix}1\\2\end{pmatrix} ≡ (1,2)
"""


def _listed(table: str) -> list[str]:
    return [entry.strip() for entry in table.replace("\n", "¦").split("¦") if entry.strip()]


def _pairs(table: str) -> list[list[str]]:
    return [[side.strip() for side in pair.split("≡")] for pair in _listed(table)]


@pytest.mark.parametrize("gold", _listed(MATH500))
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


@pytest.mark.parametrize(("a", "b"), _pairs(SAME))
def test_same(a: str, b: str) -> None:
    assert canonical(a) == canonical(b)
    assert equivalent(b, a)


@pytest.mark.parametrize(("a", "b"), _pairs(DIFFERENT))
def test_different(a: str, b: str) -> None:
    assert canonical(a) != canonical(b)


@pytest.mark.parametrize(
    ("answers", "index"),
    [
        ([], None),
        ([None, None], None),
        (["3"], 0),
        ([None, "1", "0.5", None, "1/2"], 2),
        (["1", "2", "2.0", "1.0"], 0),
        (["2", "1", "1.0", "2.00", "1,000"], 0),
        ([None, None, None, "x"], 3),
        (["0.5", r"\frac12", "1/2", "2", "2"], 0),
    ],
)
def test_majority(answers: list[str | None], index: int | None) -> None:
    assert majority(answers) == index


HOSTILE = [
    *[
        "9" * 100_000,
        "1e999999999",
        "1e" + "9" * 900,
        "1,111" + ",111" * 50_000 + "1",
        "0" * 199 + "." + "1" * 799,
    ],
    *["{" * 500, "(" * 999, "[" * 499 + "]" * 499, "(" * 499 + "1" + ")" * 499, "{" * 499 + "1" + "}" * 499],
    *[
        "(),[" * 249,
        "1," * 499,
        "1/" * 499,
        "x^" * 499,
        "-" * 999,
        "1" + "+-" * 499,
        "\\" * 999,
        "٣",
        "²",
        "1e٣",
    ],
    *[
        r"\frac{" * 160,
        r"\frac11" * 140,
        r"\frac{\frac" * 90,
        r"\sqrt[" * 160,
        r"\pm 1," * 160,
        r"\text{ a}" * 110,
    ],
    *[
        r"\boxed{" * 20_000,
        "#### " * 20_000,
        "#### 1" * 20_000 + ":x",
        "$" * 100_000,
        "$-" * 50_000,
        " " * 100_000,
    ],
    *[
        "a" * 999,
        "a" + " " * 998 + "b",
        "1 " + "ab " * 330 + "!",
        "1 " + "abc-" * 240 + "!",
        r"\frac{11" * 20_000,
    ],
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_take_bounded_time(text: str) -> None:
    with at_most(20):
        extract(text, "boxed")
        extract(text, "last-number")
        assert equivalent(text, text)


_PIECES = st.sampled_from(
    [
        *r"{}()[],.$%+-*/^_=<>&;|\ 0123456789abxAB",
        *"∪π√⟦⟧½\0\n",
        "\\\\",
        "and ",
        " pm",
        "1,000",
        "e99",
        " million",
    ]
    + [
        rf"\{name} "
        for name in ["frac", "sqrt", "text", "boxed", "left", "pm", "cup", "in", "circ", "matrix("]
    ]
    + [r"\text{", r"\begin{pmatrix}", r"\end{pmatrix}", r"\boxed{", "#### ", r"\{", r"\}", r"\frac{1}{2}"]
)


@given(st.one_of(st.lists(_PIECES, max_size=60).map("".join), st.text()))
@example("1/0")
@example("0" * 200)
def test_nothing_raises(text: str) -> None:
    for how in ("boxed", "last-number", "none"):
        found = extract(text, how)
        assert found is None or equivalent(found, found)
    assert hash(canonical(text)) == hash(canonical(text))
    assert canonical(f"  {text}\n") == canonical(text)


@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6))
def test_a_fraction_is_itself_in_all_its_forms(over: int, under: int) -> None:
    value = Fraction(over, under)
    whole, rest = divmod(abs(value), 1)
    sign = "-" if value < 0 else ""
    mixed = rf"{sign}{whole}\frac{{{rest.numerator}}}{{{rest.denominator}}}"
    latex = rf"\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    forms = [
        f"{over}/{under}",
        rf"\frac{{{over}}}{{{under}}}",
        f"{sign}{latex}",
        f"$x = {value}$",
        f"{value} miles",
    ]
    forms += [mixed, f"{sign}{whole} {rest}"] if rest else []
    assert {canonical(form) for form in forms} == {("number", value)}


@given(st.decimals(-(10**9), 10**9, places=4))
def test_a_decimal_is_itself_in_all_its_forms(value: Any) -> None:
    forms = [
        f"{value}",
        f"{value:,}",
        f"${value:,}",
        f"{value}00",
        f"{value:.20e}",
        f"{value}%",
        rf"{value}^\circ",
    ]
    forms += [f"{value:,}".replace(",", r",\!"), f"{value:,}".replace(",", "{,}"), rf"\text{{{value} cm}}"]
    assert {canonical(form) for form in forms} == {("number", Fraction(value))}
    found = extract(f"so 3 of {value:,}.", "last-number")
    assert found is not None
    assert canonical(found) == ("number", Fraction(value))
