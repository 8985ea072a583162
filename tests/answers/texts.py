"""Gold answers in the forms of two test sets, and texts that cost too much to compare."""

from hypothesis import strategies as st

# Gold answers of the two test sets, one of each form that occurs.
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


def listed(table: str) -> list[str]:
    return [entry.strip() for entry in table.replace("\n", "¦").split("¦") if entry.strip()]


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

PIECES = st.sampled_from(
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
