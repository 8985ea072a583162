"""SciCode's main problems: no gold code, and targets from a file in the official layout."""

import base64
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from emlocal.errors import EmlocalError, UsageError
from emlocal.evaluation.tasks import open_task
from emlocal.evaluation.tasks.scicode import SciCodeTask
from emlocal.evaluation.tasks.scicode_h5 import TargetFile
from emlocal.evaluation.tasks.scicode_official import dicts_close, items_close, matrices_close
from emlocal.evaluation.tasks.task import Task
from tests.evaluation.data import (
    HUMANEVAL_ROW,
    SCICODE_ROW,
    contained,
    rows,
    without_gold,
    write,
    write_targets,
)

ROW = without_gold(SCICODE_ROW)
SQUARES = "```python\ndef squares(x):\n    return [v * v for v in x]\n```"
TOTAL = "```python\ndef total(x):\n    return sum(squares(x)), len(x)\n```"
TARGETS: dict[str, Any] = {
    "900.1/test1": {"var1": np.array([1.0, 4.0])},
    "900.1/test2": {"var1": 1.0, "var2": 4.0},  # the target is (1.0, 4.0), and the test uses target[0]
    "900.2/test1": {"var1": 14, "var2": 3},
    "900.2/test2": {"var1": True},
    "900.2/test3": {"var1": 0},  # ignored
    "900.2/test4": {"var1": 0.0},
}
DRAWN = "y = np.random.rand(4)\nassert np.allclose(total(y)[0], target)"
SEEDED = "np.random.seed(1)\ny = np.random.rand(4)\nassert np.allclose(total(y)[0], target)"


def seeded() -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a row and its targets, with a test that seeds its own random numbers, as official ones do."""
    first, second = ROW["sub_steps"]
    tests = [SEEDED if test == DRAWN else test for test in second["test_cases"]]
    y = np.random.RandomState(1).rand(4)
    target = {"900.2/test4": {"var1": np.sum(y**2)}}
    return {**ROW, "sub_steps": [first, {**second, "test_cases": tests}]}, {**TARGETS, **target}


@pytest.fixture
def task(tmp_path: Path) -> Task:
    row, targets = seeded()
    file = write_targets(tmp_path / "test_data.h5", targets)
    return open_task("scicode", write(tmp_path / "all.jsonl", [row]), targets=file)


def mark(task: Task, text: str, index: int = 0, earlier: dict[str, str] | None = None) -> tuple[str, str]:
    problem = task.problems[index]
    found = task.find(problem, text, earlier or {})
    if found is None:
        return "no answer", ""
    right, said = task.check(problem, found[0])
    return "right" if right else "wrong", said


# ---------------------------------------------------------------------------------------- the file of targets


def read(tmp_path: Path, members: dict[str, Any]) -> Any:
    file = TargetFile(write_targets(tmp_path / "t.h5", {"1.1/test1": members}))
    return pickle.loads(base64.b64decode(file.packed("1.1", 1)))[0]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"var1": 2.5}, 2.5),
        ({"var1": 1 + 2j}, 1 + 2j),
        ({"var1": True}, True),
        ({"var1": "Möbius"}, "Möbius"),
        ({"var1": np.bytes_(b"fixed")}, "fixed"),
        ({"var1": 1, "var2": "a", "var3": False}, (1, "a", False)),
        # var10 must not come between var1 and var2
        ({f"var{i}": i for i in range(1, 12)}, tuple(range(1, 12))),
        ({"var1": {"list": {"var1": 1.0, "var2": "a"}}}, [1.0, "a"]),
        ({"var1": {"list": {"var1": {"list": {"var1": 1}}, "var2": {"k": 2}}}}, [[1], {"k": 2}]),
        ({"var1": {"name": "x", "0.5": 2.0, "7": "text"}}, {"name": "x", 0.5: 2.0, "7": "text"}),
        ({"var1": {"a": {"b": 1}}, "var2": 2}, ({"a": {"b": 1}}, 2)),
        ({"var1": {"list": 3}}, {"list": 3}),  # a dict with such a key
    ],
)
def test_each_value_is_read(tmp_path: Path, members: dict[str, Any], expected: Any) -> None:
    found = read(tmp_path, members)
    assert found == expected
    assert isinstance(found, str | tuple | list | dict) == isinstance(expected, str | tuple | list | dict)


def test_arrays_are_read(tmp_path: Path) -> None:
    grid = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = read(
        tmp_path, {"var1": grid, "var2": {"list": {"var1": grid, "var2": grid[0]}}, "var3": {"H": grid}}
    )
    assert np.array_equal(found[0], grid)
    assert found[0].dtype == np.float32
    assert np.array_equal(found[1][1], grid[0])
    assert np.array_equal(found[2]["H"], grid)


@pytest.mark.parametrize("form", ["coo", "csr", "csc", "bsr"])
def test_sparse_matrices_are_read(tmp_path: Path, form: str) -> None:
    dense = np.array([[0.0, 1, 0, 2], [3, 0, 0, 0]])
    matrix = getattr(sparse, f"{form}_matrix")(dense)
    parts = {"coo": ("row", "col"), "bsr": ("indices", "indptr", "blocksize")}.get(
        form, ("indices", "indptr")
    )
    members = {name: np.array(getattr(matrix, name)) for name in ("data", "shape", *parts)}
    alone, within = read(
        tmp_path, {"var1": {"sparse_matrix": members}, "var2": {"3": {"sparse_matrix": members}}}
    )
    assert np.array_equal(alone.toarray(), dense)
    assert alone.format == form
    assert np.array_equal(within["3"].toarray(), dense)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        TargetFile(tmp_path / "nothing.h5")
    (tmp_path / "text.h5").write_text("targets")
    with pytest.raises(UsageError, match="cannot be read as HDF5"):
        TargetFile(tmp_path / "text.h5")
    with pytest.raises(UsageError, match=r"cannot read .*: Is a directory"):
        TargetFile(tmp_path)
    whole = write_targets(tmp_path / "whole.h5", {"1.1/test1": {"var1": np.zeros(9999)}}).read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[:20000])
    with pytest.raises(UsageError, match="cannot be read as HDF5"):
        TargetFile(tmp_path / "cut.h5")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    members = {"data": [1.0], "shape": [1, 1], "row": [7], "col": [0]}
    with pytest.raises(UsageError, match=r"targets of step 1\.1 cannot be read: "):
        read(tmp_path, {"var1": {"sparse_matrix": members}})


def test_the_file_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(EmlocalError, match="needs the package h5py") as refused:
        TargetFile(tmp_path / "t.h5")
    assert refused.value.hint == "pip install h5py"


# --------------------------------------------------------------------------------------------------- the task


@contained
@pytest.mark.parametrize(
    ("index", "text", "earlier", "expected", "said"),
    [
        (0, SQUARES, "", "right", ""),
        (0, SQUARES.replace("v * v", "v * 2"), "", "wrong", "AssertionError"),
        (0, SQUARES.replace("v * v", "v / 0"), "", "wrong", "ZeroDivisionError"),
        (0, "```python\ndef squares(x):\n    return (\n```", "", "wrong", "SyntaxError"),
        (1, TOTAL, SQUARES, "right", ""),
        (1, TOTAL.replace("len(x)", "0"), SQUARES, "wrong", "AssertionError"),
        # builds on its own earlier step
        (1, TOTAL, SQUARES.replace("v * v", "v * 2"), "wrong", "AssertionError"),
        (1, TOTAL, "", "wrong", "NameError"),
        (1, "I do not know.", SQUARES, "no answer", ""),
    ],
)
def test_steps_are_held_against_the_file(
    task: Task, index: int, text: str, earlier: str, expected: str, said: str
) -> None:
    found = mark(task, text, index, {"900.1": earlier})
    assert found[0] == expected
    assert said in found[1]


@contained
def test_every_kind_of_target_reaches_the_tests(tmp_path: Path) -> None:
    matrix = {"data": [5.0], "shape": [2, 2], "row": [0], "col": [1]}
    tests = {
        "assert f('text') == target": {"var1": "a"},
        "assert (f('number') < 9) == target": {"var1": True},
        "from scicode.compare.cmp import are_dicts_close\nassert are_dicts_close(f('dict'), target)": {
            "var1": {"x": "y", "0.5": np.ones(2)}
        },
        "from scicode.compare.cmp import *\nassert are_csc_matrix_close(f('sparse'), target)": {
            "var1": {"sparse_matrix": matrix}
        },
        "from scicode.compare.cmp import cmp_tuple_or_list\nassert cmp_tuple_or_list(f('mixed'), target)": {
            "var1": {"H": {"sparse_matrix": matrix}},
            "var2": {"list": {"var1": [1, 2], "var2": 3}},
            "var3": 1.0,
        },
        "a, b = target\nassert np.allclose(f('number'), a) and b == 'b'": {"var1": 3.0, "var2": "b"},
        "assert f('number') == 3": {"var1": 0},
    }  # fmt: skip
    code = (
        "```python\nimport scipy.sparse, sympy\ndef f(what):\n"
        "    matrix = scipy.sparse.csc_matrix([[0, 5], [0, 0]])\n"
        "    return {'text': 'a', 'number': 3, 'sparse': matrix,\n"
        "        'dict': {sympy.Symbol('x'): sympy.Symbol('y'), 0.5: [1, 1]},\n"
        "        'mixed': ({'H': matrix}, ([1, 2], 3), 1 + 1e-9)}[what]\n```"
    )
    step = {**ROW["sub_steps"][0], "function_header": "def f(what):", "test_cases": list(tests)}
    named = {f"900.1/test{i}": members for i, members in enumerate(tests.values(), 1)}
    file = TargetFile(write_targets(tmp_path / "t.h5", named))
    task = SciCodeTask(rows({**ROW, "sub_steps": [step]}), targets=file)
    assert mark(task, code) == ("right", "")
    assert mark(task, code.replace("[1, 1]", "[1, 2]"))[0] == "wrong"


@contained
def test_large_targets_are_handed_over(tmp_path: Path) -> None:
    step = {
        **ROW["sub_steps"][0],
        "test_cases": ["assert np.allclose(squares(np.arange(1_000_000.)), target)"],
    }
    file = TargetFile(
        write_targets(tmp_path / "t.h5", {"900.1/test1": {"var1": np.arange(1_000_000.0) ** 2}})
    )
    task = SciCodeTask(rows({**ROW, "sub_steps": [step]}), targets=file)
    assert mark(task, "def squares(x):\n    return x * x") == ("right", "")


def test_verdicts_and_source_know_the_file(tmp_path: Path) -> None:
    def of(targets: dict[str, Any]) -> tuple[str, str]:
        file = TargetFile(write_targets(tmp_path / "t.h5", targets))
        task = SciCodeTask(rows(ROW), targets=file)
        return task.digest(task.problems[0], "a"), task.source

    first, again, other = of(TARGETS), of(TARGETS), of({**TARGETS, "900.2/test2": {"var1": False}})
    assert first == again
    assert first[0] != other[0]
    assert first[1].startswith("made up; t.h5, sha256 ")
    assert first[1] != other[1]


def test_gold_code_is_preferred_and_targets_are_needed_for_the_rest_only(tmp_path: Path) -> None:
    file = TargetFile(write_targets(tmp_path / "t.h5", {"1.1/test1": {"var1": 0}}))
    task = SciCodeTask(rows(SCICODE_ROW), targets=file)
    assert "gold" in (task.find(task.problems[0], SQUARES, {}) or ("",))[0]
    with pytest.raises(UsageError, match=r"lacks the targets 900\.1/test1 of SciCode"):
        SciCodeTask(rows(ROW), targets=file)


def test_without_either_both_ways_are_named() -> None:
    with pytest.raises(UsageError, match=r"900\.1 of SciCode has no gold code") as refused:
        SciCodeTask(rows(ROW))
    assert "problems_dev.jsonl" in refused.value.hint
    assert "--targets" in refused.value.hint


def test_targets_are_for_scicode(tmp_path: Path) -> None:
    data = write(tmp_path / "h.jsonl", [HUMANEVAL_ROW])
    with pytest.raises(UsageError, match="--targets works with --task scicode"):
        open_task("humaneval", data, targets=tmp_path / "t.h5")
    with pytest.raises(UsageError, match="there is no file"):
        open_task("scicode", write(tmp_path / "all.jsonl", [ROW]), targets=tmp_path / "t.h5")


# ------------------------------------------------------------------------------------------------ given steps

BLOCK = "class Block:\n    size = 2\n\n\nclass EnlargedBlock:\n    size = 3\n"


def given_row() -> dict[str, Any]:
    first, second = (dict(step) for step in ROW["sub_steps"])
    first |= {"step_number": "62.1", "function_header": "class EnlargedBlock:\n    pass"}
    second |= {
        "step_number": "62.2",
        "function_header": "def size():\n    '''Of both.'''",
        "test_cases": ["assert np.allclose(size(), target)"],
    }
    return {**ROW, "problem_id": "62", "sub_steps": [first, second]}


@contained
def test_given_steps_are_not_asked_and_their_code_is_there(tmp_path: Path) -> None:
    data = write(tmp_path / "all.jsonl", [given_row()])
    (tmp_path / "far").mkdir()
    file = write_targets(tmp_path / "far" / "test_data.h5", {"62.2/test1": {"var1": 5}})
    with pytest.raises(UsageError, match=r"62\.1 of SciCode is given to the model, but its code is missing"):
        open_task("scicode", data, targets=file)
    (tmp_path / "far" / "62.1.txt").write_text(BLOCK)  # beside the targets, or
    (tmp_path / "62.1.txt").write_text(BLOCK)  # beside the problems
    task = open_task("scicode", data, targets=file)
    assert [problem.id for problem in task.problems] == ["62.2"]
    assert [[problem.id for problem in stage] for stage in task.stages()] == [["62.2"]]
    assert f"```python\n{BLOCK.strip()}\n```" in task.ask(task.problems[0], {})
    assert "62.1 given, sha256 " in task.source
    assert mark(task, "def size():\n    return Block.size + EnlargedBlock.size") == ("right", "")


def test_a_given_steps_own_gold_code_is_taken() -> None:
    row = given_row()
    row["sub_steps"][0]["ground_truth_code"] = BLOCK
    row["sub_steps"][1]["ground_truth_code"] = "def size():\n    return 5"
    task = SciCodeTask(rows(row))
    assert [problem.id for problem in task.problems] == ["62.2"]
    assert BLOCK.strip() in task.ask(task.problems[0], {})


# -------------------------------------------------------------------------------------------- the comparisons


@pytest.mark.parametrize(
    ("a", "b", "agree"),
    [
        ((1.0, [2, 3]), (1.0, np.array([2, 3])), True),
        ((1.0,), (1.0, 2.0), False),
        ([[1], [2, 3]], [np.array([1]), np.array([2, 3])], True),
        ([[1], [2, 3]], [np.array([1]), np.array([2, 4])], False),
        (("a", "b"), ("a", "c"), False),
        (["a", ["b", 1]], ["a", ["b", 1]], True),
        ((True, 1), (np.True_, 1), True),
        ((np.nan,), (np.nan,), False),  # as in np.allclose
        (({"a": [1]},), ({"a": 2},), False),
        ((sparse.csr_matrix([[1]]),), (sparse.coo_matrix([[1]]),), True),
    ],
)
def test_items_are_compared(a: Any, b: Any, agree: bool) -> None:
    assert items_close(a, b) is agree


def test_dicts_and_matrices_are_compared() -> None:
    assert dicts_close({"a": 1.0, 2: "x"}, {"a": 1.0 + 1e-9, 2.0: "x"})
    assert not dicts_close({"a": 1.0}, {"a": 1.0, "b": 2.0})
    assert not dicts_close({"a": "x"}, {"a": "y"})
    assert matrices_close(sparse.csc_matrix([[1, 2]]), sparse.csr_matrix([[1, 2]]))
    assert not matrices_close(sparse.csc_matrix([[1, 2]]), sparse.csr_matrix([[1, 3]]))
