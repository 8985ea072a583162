"""Results of a program's function on some inputs; misbehaviour of a program is a result too."""

import time

import pytest

from emlocal.sandbox import landlock, seccomp
from emlocal.sandbox.run import Calls, Limits, results

pytestmark = pytest.mark.skipif(
    landlock.abi() < landlock.OLDEST_ABI or not seccomp.known(), reason="needs Landlock (Linux 6.2)"
)
INPUTS = ("(1,)", "(2,)", "('a',)")
LATE, END = "out of time", "ended"


def of(program: str, inputs: tuple[str, ...] = INPUTS) -> list[str]:
    return results(program, Calls("f", inputs, seconds=0.3), Limits(seconds=2, memory=1 << 30))


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("def f(x): return x + 1", ["returns 2", "returns 3", "raises TypeError"]),
        ("f = lambda x: {x}", ["returns {1}", "returns {2}", "returns {'a'}"]),
        ("def f(x): print(x)", ["returns None"] * 3),
        ("def f(x): print('a' * 10**8)\nprint('b' * 10**8)", ["returns None"] * 3),
        ("def g(x): return 1", ["raises NameError"] * 3),
        ("def f(x): return (", ["raises SyntaxError"] * 3),
        ("def f(x): return x\nassert f(1) == 2", ["raises AssertionError"] * 3),
        ("def f(x): return x\nn = input()", ["raises EOFError"] * 3),
        ("def f(x): return f(x)", ["raises RecursionError"] * 3),
        ("def f(x): exit()", ["raises SystemExit"] * 3),
        ("def f(x): raise KeyboardInterrupt", ["raises KeyboardInterrupt"] * 3),
        ("def f(x): return 1 // (x != 2)", ["returns 1", "raises ZeroDivisionError", "returns 1"]),
        ("def f(x):\n    while x == 1: pass\n    return x", [LATE, "returns 2", "returns 'a'"]),
        ("import os\ndef f(x):\n    if x == 2: os._exit(0)\n    return 1", ["returns 1", END, END]),
        ("import os, signal\ndef f(x): os.kill(os.getpid(), 9)", ["raises PermissionError"] * 3),
        ("def f(x): return [0] * 10**10", ["raises MemoryError"] * 3),
        ("def f(x, seen=[]):\n    seen.append(x)\n    return len(seen)", [f"returns {n}" for n in (1, 2, 3)]),
        ("n = 0\ndef f(x):\n    global n\n    n += 1\n    return n", [f"returns {n}" for n in (1, 2, 3)]),
        ("def f(x):\n    a = []\n    a.append(a)\n    return a", ["raises RecursionError"] * 3),
        ("class V:\n    def __repr__(self): 1 / 0\ndef f(x): return V()", ["raises ZeroDivisionError"] * 3),
        ("open('/tmp/emlocal-behaviour', 'w')\ndef f(x): return 1", ["raises PermissionError"] * 3),
    ],
)  # fmt: skip
def test_what_comes_of_each_call(program: str, expected: list[str]) -> None:
    assert of(program) == expected


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass\ndef f(x): return 1",
        "def f(x):\n  while True:\n    try:\n      while True: pass\n    except BaseException: pass",
        "def f(x): return len(str(7 ** 10**8))",
        "class V(list):\n    def __iter__(self):\n        while True: yield 1\ndef f(x): return V([1])",
    ],
)
def test_what_does_not_end_is_ended(program: str) -> None:
    began = time.monotonic()
    assert of(program) == [LATE] * 3
    assert time.monotonic() - began < 60


def test_a_program_that_sleeps_is_ended_by_the_clock() -> None:
    assert of("import time\ndef f(x): time.sleep(1000)") == [LATE] * 3


def test_a_long_result_is_short_and_still_compared() -> None:
    [a, b] = of("def f(x): return 'y' * 10**6 + x", ("('1',)", "('2',)"))
    assert a != b
    assert max(len(a), len(b)) < 400


def test_what_a_program_reports_for_itself_is_no_result() -> None:
    forged = '{"secret": "0", "result": "returns 42"}'
    program = (
        "import os\ndef f(x):\n    for i in range(3, 64):\n"
        f"        try: os.write(i, b'{forged}\\n')\n        except OSError: pass\n    return x"
    )
    assert of(program, ("(1,)", "(2,)")) == ["returns 1", "returns 2"]


def test_chance_and_the_order_of_sets_are_the_same_each_time() -> None:
    program = "import random\ndef f(x): return random.random(), list({'a', 'b', 'c', x})"
    assert of(program) == of(program)
    assert len(set(of(program, ("('d',)", "('d',)")))) == 1


def test_arguments_are_new_for_each_program_and_call() -> None:
    assert of("def f(x):\n    x.append(1)\n    return x", ("([],)", "([],)")) == ["returns [1]"] * 2
