"""The meaning of answers: equal answers have equal keys, and votes count keys."""

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emlocal.answers.finding import extract
from emlocal.answers.meaning import canonical, equivalent, majority
from tests.answers.texts import listed

SAME = r"""
    5 m ≡ 5 ¦ 5 g ≡ 5 ¦ 5 s ≡ 5 ¦ 5 L ≡ 5 ¦ 5 h ≡ 5 ¦ 5 m/s ≡ 5 ¦ 5 m/s^2 ≡ 5 ¦ 5 m^2 ≡ 5 ¦ 5 m s^{-1} ≡ 5
    5 kg·m/s² ≡ 5 ¦ 5 J/(kg K) ≡ 5 ¦ 5 N·m ≡ 5 ¦ 5 g/cm^3 ≡ 5 ¦ 5 μm ≡ 5 ¦ 5mL ≡ 5 ¦ 5 GB ≡ 5 ¦ 5 mi/h ≡ 5
    20 °C ≡ 20 ¦ 20^\circ C ≡ 20 ¦ 20^{\circ}\text{F} ≡ 20 ¦ $5/hour ≡ 5 ¦ \$5/\text{hour} ≡ 5
    5 dollars/hour ≡ 5 ¦ 3 m, 4 cm ≡ 3, 4 ¦ (3 m, 4 m/s) ≡ (3, 4) ¦ 1 000 000 ≡ 1,000,000
    5 \mathrm{~kg} \mathrm{~m} / \mathrm{s}^{2} ≡ 5 ¦ 5 sq ft ≡ 5 ¦ $5$ m ≡ 5 ¦ \frac{1}{2} m ≡ 0.5
    ¥12 ≡ 12 ¦ ₹12 ≡ 12 ¦ €12 ≡ 12 ¦ 12, ≡ 12 ¦ ≈12 ≡ 12 ¦ = 12 ≡ 12 ¦ x \approx 12 ≡ 12
    -\frac{-1}{2} ≡ 0.5 ¦ --5 ≡ 5 ¦ 2.5 x 10^3 ≡ 2500 ¦ 10⁶ ≡ 1000000 ¦ 2.5·10⁻³ ≡ 0.0025 ¦ 3½ ≡ 3.5 ¦ ⅔ ≡ 2/3
    4.\overline{6} ≡ 14/3 ¦ 0.1\overline{6} ≡ 1/6 ¦ x²+3x ≡ x^2 + 3x ¦ √(x+1) ≡ \sqrt{x+1} ¦ α ≡ \alpha
    a₁ ≡ a_1 ¦ ∅ ≡ \varnothing ¦ \textcolor{red}{5} ≡ 5 ¦ \text{A}, \text{B} ≡ A, B ¦ x = \text{east} ≡ east
    \{1,2\} ≡ 1, 2 ¦ \{2,1,1\} ≡ {1,2} ¦ \{1\pm\sqrt{5}\} ≡ 1+√5, 1-√5 ¦ x \not= 3 ≡ x ≠ 3
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
    2k ≡ 2 ¦ 2 k ≡ 2 ¦ 5m ≡ 5 ¦ 2 m g ≡ 2 ¦ 3 n ≡ 3 ¦ x m ≡ x ¦ 1/s ≡ 1 ¦ 1/abc ≡ 1 ¦ 3 pm ≡ 3 ¦ \not= 5 ≡ 5
    5 m + 3 ≡ 8 ¦ 1 2 ≡ 12 ¦ 1 00 ≡ 100 ¦ 0.\overline{3} ≡ 0.3 ¦ 5 \text{ h } 30 \text{ min} ≡ 5 \text{ h } 30
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


def _pairs(table: str) -> list[list[str]]:
    return [[side.strip() for side in pair.split("≡")] for pair in listed(table)]


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
