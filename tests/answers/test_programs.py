"""Programs in models' texts: found, and run."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emlocal.answers.programs import code_of
from tests.processor_time import at_most

REPORTS = Path(__file__).parents[1] / "data/reports"
ROOT = "def f(x):\n    return sqrt(x)"
OWN = "from math import sqrt as root\ndef sqrt(x):\n    return root(x)"
F = "def f(x):\n    return x ** 0.5"


def called(code: str | None) -> Any:
    names: dict[str, Any] = {}
    exec(code or "raise NameError", names)  # noqa: S102
    return names["f"](4)


@pytest.mark.parametrize("row", [json.loads(line) for line in (REPORTS / "code_answers.jsonl").open()])
def test_programs_of_reports(row: dict[str, Any]) -> None:
    code = code_of(row["text"], row["definition"])
    if row["result"] is None:
        assert code is None
        return
    names: dict[str, Any] = {}
    exec(code or "", names)  # noqa: S102
    assert eval(row["call"], names) == row["result"]


@pytest.mark.parametrize(
    "text",
    [
        f"```python\nfrom math import sqrt\n```\nThen:\n```python\n{ROOT}\n```",
        f"```python\n{OWN}\n```\n```python\n{ROOT}\n```",
        f"[PYTHON]\n{F}\n[/PYTHON]\nThat's it.",
        "[PYTHON] def f(x): return x ** 0.5 [/PYTHON]",
        f"It's so:\n\nfrom math import sqrt\n\n{ROOT}\n\nExplanation\nIt's the root.",
        f"I'd write:\n{OWN}\n\n{ROOT}\nThis doesn't fail.",
        f"{F}\n\nUse it:\n```python\nprint(f(9))\n```",
        f"```python\n{F}\n\nprint(f(",  # cut off
        f"```python\n{F}```",
        f"Answer: ~~~py\n{F}\n~~~",
        "1. So:\n\n    def f(x):\n        return x ** 0.5\n\n2. Done.",
        f"Use:\nfrom functools import cache\n@cache\n{F}\nThat's it.",
        f"```python\n{F}\n```\nor shorter, but wrong:\n```python\ndef f(x): return (\n```",
        f"<think>```python\ndef f(x): return 0\n```</think>\n{F}",
        '```python\ndef f(x):\n    """Root.\n    ```\n    f(4)\n    ```\n    """\n    return x ** 0.5\n```\n',
        "It isn't hard.\n" * 150 + f"from math import sqrt\n{ROOT}",
    ],
)
def test_a_right_function_is_found(text: str) -> None:
    assert called(code_of(text, "def f")) == 2


def test_the_last_block_counts_and_without_a_name_the_longest() -> None:
    text = f"```python\n{F}\n```\n```python\ndef f(x): return 1\n```"
    assert called(code_of(text, "def f")) == 1
    assert called(code_of(text)) == 2
    assert called(code_of(F)) == 2


@pytest.mark.parametrize(
    "text", ["", "I would sum.", "```bash\necho def f\n```", "```js\ndef f()\n```", f"<think>\n{F}\n"]
)
def test_no_program(text: str) -> None:
    assert code_of(text, "def f") is None


def test_what_does_not_compile_is_still_what_was_answered() -> None:
    assert code_of("```python\ndef f(x:\n```", "def f") == "def f(x:\n"
    assert code_of("def f(x:", "def f") == "def f(x:"


HOSTILE = ["```python\n" * 20_000, "```python\ndef f():\n" * 10_000, "def f(\n" * 20_000, "[PYTHON]" * 10_000]
HOSTILE += ["def f():\n" + "(" * 90_000, "def f():\n    return " + "1+" * 90_000, "~`" * 50_000, "def f():\0"]
HOSTILE += ["def f():\n" + " x\n" * 30_000 + "'", "it's\n" * 20_000 + F, "def f(): '\\d'\n" * 9_000]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts_take_bounded_time(text: str) -> None:
    with at_most(20):
        code_of(text, "def f")
        code_of(text)


_PIECES = st.sampled_from(
    [
        *("```", "~~~", "```python\n", "\n", "def f(", "x):", "    ", "return 1", "import a", '"""', "'"),
        *("[PYTHON]", "[/PYTHON]", "<think>", "</think>", "class A:", "@a", "(", ")", "é", "\r\n", "\t"),
        *("#", "\0", "\\"),
    ]
)


@given(st.lists(_PIECES, max_size=40).map("".join))
def test_nothing_raises(text: str) -> None:
    code = code_of(text, "def f")
    assert code is None or "f" in code
