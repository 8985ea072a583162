"""Programs in texts: the requested function, printed examples, and inputs that models write."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from emlocal.methods.programs import Example, Function, asked_for, head_of, joined, printed, written
from emlocal.sandbox.canonical import canonical
from tests.examples import examples

HUMANEVAL = Path("/work/shared/data/humaneval/HumanEval.jsonl.gz")
F = Function("f", "def f(a, b=1)", 1, 2)


BEGUN = "import re\n\ndef g(x):\n    return 1\n\ndef f(a: int, *, b=2) -> str:\n    '''D'''\n"


def block(code: str) -> str:
    return f"Here:\n```python\n{code}\n```\nDone."


@pytest.mark.parametrize(
    ("prompt", "answers", "name"),
    [
        (f"```python\n{BEGUN}```", ["def g(): 1\ndef f(): 2"], "f"),
        ("def f(x):\n    ...\n", ["def help(): 1\ndef f(): 2"] * 2, "f"),
        ("def f(x):\n    pass\n", ["def g(): 1"], "g"),  # no answer defines the requested function
        ("Write a sum.", ["def add(a): 1", "def add(a): 2", "def plus(a): 3"], "add"),
        ("Write a function `plus`.", ["def add(a): 1", "def plus(a): 3"], "plus"),
        ("Write a sum.", ["def help(a): 1\ndef add(a): 2"] * 2, "add"),
        ("Change it:\n```python\ndef old():\n    return 1\n```", ["def new(): 1"] * 3, "new"),
        ("Write it.", ["class A:\n    def f(self): pass\n\ndef g(): pass"], "g"),
        ("Write it.", ["def f(x: return"], "f"),
        ("Write it.", ["No code at all.", ""], None),
        ("Write it.", ["```bash\ndef f\n```"], None),
    ],
)  # fmt: skip
def test_the_function_that_is_asked_for(prompt: str, answers: list[str], name: str | None) -> None:
    found = asked_for(
        prompt, [block(code) if code.startswith(("def", "class")) else code for code in answers]
    )
    assert (found and found.name) == name


def test_its_signature_is_that_of_the_prompt_else_that_of_an_answer() -> None:
    begun = asked_for(f"```python\n{BEGUN}```", [block("def f(): 1")])
    assert begun is not None
    assert replace(begun, head="") == Function("f", "def f(a: int, *, b=2) -> str", 1, 1)
    space: dict[str, object] = {}
    exec(begun.head, space)  # noqa: S102 (as above)
    assert {"re", "g", "f"} <= space.keys()
    found = asked_for("Write f.", [block("def f(a, /, b, c=3): 1")])
    assert found is not None
    assert (found.signature, found.least, found.most, found.head) == ("def f(a, /, b, c=3)", 2, 3, "")
    many = asked_for("Write f.", [block("def f(*numbers): 1")])
    assert many is not None
    assert (many.least, many.takes(100)) == (0, True)
    broken = asked_for("Write f.", [block("def f(a: 1")])
    assert broken is not None
    assert broken.takes(7)


@pytest.mark.parametrize(
    ("prompt", "head"),
    [
        ("f(3) == 9", ""),
        (block("print(f(3))"), ""),
        (block("import os\nN = 3\nx = f(N)\ndef f(n): 1\nprint(f(3))"), "import os\nN = 3\ndef f(n):\n    1"),
        (block("class A: pass") + block("def f(a):"), "class A:\n    pass\ndef f(a):\n    pass"),
        ("Write a function f.", ""),
    ],
)  # fmt: skip
def test_what_a_prompt_gives_and_not_what_it_does_goes_before_answers(prompt: str, head: str) -> None:
    found = asked_for(prompt, [block("def f(a): return 1")])
    assert found is not None
    assert (found.name, found.head.replace("\n\n", "\n").strip()) == ("f", head)


@pytest.mark.parametrize(
    ("text", "arguments", "expected"),
    [
        (">>> f(1, 2)\n3\n", (1, 2), (3,)),
        ("    >>> f([1,\n    ...    2])\n", None, None),
        (">>> f('a')\n'b'\n>>> f(2)\n", ("a",), ("b",)),
        (">>> f(1)\n[1,\n 2]\n\nMore.", (1,), ([1, 2],)),
        (">>> f(1)  # one\n2", (1,), (2,)),
        (">>> f(1)\nTraceback (most recent call last):\n", (1,), None),
        (">>> f(1) == 2\nTrue", (1,), (2,)),
        (">>> f(1) == 2\nFalse", (1,), None),
        (">>> f(3)\n\n4", (3,), None),
        ('>>> f(3)\n""" 4', (3,), None),
        ("f(1, 2) == 3", (1, 2), (3,)),
        ("assert f(1) == 2", (1,), (2,)),
        ("f((1, 2), 'x') ➞ (3, 4)", ((1, 2), "x"), ((3, 4),)),
        ("f(1)==>-5", (1,), (-5,)),
        ("f(1) => 0.5.", (1,), (0.5,)),
        ("f(1) -> None", (1,), (None,)),
        ("f(1) returns 3.", (1,), (3,)),
        ("f(1) should return [1, 2] because", (1,), ([1, 2],)),
        ("f(1) returns true", (1,), (True,)),
        ("f(1)  # returns 'db1111db'", (1,), ("db1111db",)),
        ("print(f(1))  # 7", (1,), (7,)),
        ("f(1) = 2", (1,), (2,)),
        ("f(1) returns 3 and f(2) returns 4", (1,), (3,)),
        # ambiguous
        ("f(1) returns 3 or 4", (1,), None),
        ("f(1) == 1 + 9", (1,), None),
        ("f(1) == 1, 2", (1,), None),
        ("assert f(1) == 2, 'wrong'", (1,), None),
        ("f(1) == x", (1,), None),
        ("f(1) == g(2)", (1,), None),
        ("f(1) ==> ('a')", (1,), None),  # perhaps a tuple, perhaps not
        (r"f('a\n') == 'b'", ("a\n",), None),  # escaped once or twice?
        ("f(1) is positive", (1,), None),
        ("2 * f(1) is odd, like 3", (1,), None),
        ("round(f(1), 2) == 3", (1,), None),
        ("f(1)[0] == 3", (1,), None),
        ("f(1) == 'open", (1,), None),
        ("f(1) == [2", (1,), None),
        # not a call with literals
        ("def f(1)", None, None),
        ("f(n) = n + 1", None, None),
        ("f(a=1) == 2", None, None),
        ("self.f(1) == 2", None, None),
        ("ff(1) == 2", None, None),
        ("f(1", None, None),
        ("f(1e999) == 2", None, None),
        (f"f('{'x' * 2000}') == 2", None, None),
        (f"f({'(' * 500}{')' * 500})", None, None),
    ],
)  # fmt: skip
def test_an_example_that_is_printed(text: str, arguments: object, expected: object) -> None:
    found = printed(text, "f")
    if arguments is None:
        assert found == []
    else:
        assert found[0] == Example(arguments, expected)  # type: ignore[arg-type]


def test_a_call_printed_twice_is_one_example() -> None:
    assert printed("Such as f(1). f(2) == 3. f(1) == 2. f(1) == 9.", "f") == [
        Example((1,), (2,)),
        Example((2,), (3,)),
    ]


@pytest.mark.skipif(not HUMANEVAL.exists(), reason="HumanEval is not here")
def test_humaneval_is_read_as_people_read_it() -> None:
    """Five of its own examples are wrong: those of problems 47, 116 and 130."""
    with gzip.open(HUMANEVAL, "rt") as file:
        rows = [json.loads(line) for line in file]
    found, wrong, without = 0, set(), 0
    for row in rows:
        prompt, whole = block(row["prompt"].strip()), row["prompt"] + row["canonical_solution"]
        function = asked_for(prompt, [block(whole)])
        assert function is not None
        assert function.name == row["entry_point"]
        space: dict[str, object] = {}
        exec(joined(function.head, whole), space)  # noqa: S102 (the set's own programs)
        own = printed(prompt, function.name)
        without += not own
        for each in own:
            found += 1
            if each.expected is not None:
                returned = space[function.name](*each.arguments)  # type: ignore[operator]
                if canonical(returned) != canonical(each.expected[0]):
                    wrong.add(row["task_id"])
    assert (found, without) == (410, 23)
    assert wrong == {"HumanEval/47", "HumanEval/116", "HumanEval/130"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(1, 2)\n(3,)", [(1, 2), (3,)]),
        ("```python\ninputs = [\n    (1, 2),\n    (3, 'x'),  # why\n]\n```", [(1, 2), (3, "x")]),
        ("inputs = [(1,), (2, 3)]", [(1,), (2, 3)]),
        ("[(1,), (2, 3, 4)]", [(1,)]),
        ("1. (1, 2)\n2) (3, 4)\n- (5, 6)\n* `(7, 8)`", [(1, 2), (3, 4), (5, 6), (7, 8)]),
        ("f(1, 2)\nassert f(3) == 4\nprint(f(5))\nx = f(6)", [(1, 2), (3,), (5,), (6,)]),
        ("(1, 2) -> 3\n(4, 5) # 6", [(1, 2), (4, 5)]),
        ("[1, 2]\n'a'\n7", [([1, 2],), ("a",), (7,)]),
        ("(1, 2, 3)", [((1, 2, 3),)]),  # f takes at most two, so this is one argument
        ("(1, 2)\n(1, 2)\n(1,  2)", [(1, 2)]),
        ("(x, 1)\n(os.system('x'),)\n__import__('os')\n(1 + 1,)\n(lambda: 1,)", []),
        ("f(1, 2, 3)\nf()\nf(a=1)\ng(1)", []),
        ("Here are some inputs:\n\n", []),
        ("(1e999, 1)", []),
        ("(" * 900, []),
        ("-" * 990, []),
        ("9" * 990, [(int("9" * 990),)]),
    ],
)
def test_inputs_that_a_model_wrote(text: str, expected: list[tuple[object, ...]]) -> None:
    assert written(text, F, 8) == expected


def test_no_more_inputs_than_are_wanted() -> None:
    assert written("\n".join(f"({n},)" for n in range(50)), F, 8) == [(n,) for n in range(8)]


LITERALS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda v: st.lists(v, max_size=3) | st.tuples(v, v) | st.dictionaries(st.text(max_size=2), v, max_size=2),
    max_leaves=6,
)  # fmt: skip


@examples(300)
@given(st.lists(st.tuples(LITERALS, LITERALS), max_size=6))
def test_tuples_are_read_as_they_were_written(rows: list[tuple[object, ...]]) -> None:
    once = {repr(row): row for row in rows if len(repr(row)) < 900}
    assert [*map(repr, written("\n".join(once), F, 8))] == [*once]


@examples(300)
@given(LITERALS, LITERALS)
def test_an_example_is_read_as_it_was_written(argument: object, expected: object) -> None:
    text = f"f({argument!r}) == {expected!r}"
    if "\\" in text or len(text) > 900:
        return
    [found] = printed(text, "f")
    assert repr(found.arguments) == repr((argument,))
    assert found.expected is not None
    assert canonical(found.expected[0]) == canonical(expected)


@examples(500)
@given(st.text(alphabet="f()[]{}'\"\\,1a\n=#> `", max_size=40))
@example("f('''1''')=='\n'")
def test_no_text_is_too_odd(text: str) -> None:
    for arguments in (*written(text, F, 8), *(each.arguments for each in printed(text, "f"))):
        assert isinstance(arguments, tuple)
    asked_for(text, [text])
    assert isinstance(head_of(text), str)


def test_imports_from_the_future_come_first() -> None:
    program = joined("import a", "from __future__ import annotations\nx = 1")
    assert program == "from __future__ import annotations\nimport a\nx = 1"
