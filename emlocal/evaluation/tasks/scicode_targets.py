"""SciCode's tests without its file of targets: the gold code computes each test's `target`.

A test compares a value of the model's code with `target`: np.allclose(f(x), target), f(x)[0] with target[0],
(f(x) < 1) == target. So the target is the other side of that comparison, computed with the gold code.

The text of this file goes into the sandbox before a program, so it imports nothing of emlocal.
"""

import ast
import random
import sys
import types
from typing import Any

import numpy as np

Names = dict[str, Any]
RELATIVE, ABSOLUTE = 1e-5, 1e-8  # defaults of np.allclose


def close(a: Any, b: Any) -> bool:
    """Whether two nested values agree within np.allclose's tolerances.

    They may be tuples, lists, dicts, sparse matrices and arrays.
    """
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(close(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, str):
        return bool(a == b)
    if "sparse" in type(a).__module__:
        a, b = a.toarray(), b.toarray()
    return bool(np.allclose(a, b, rtol=RELATIVE, atol=ABSOLUTE, equal_nan=True))


def provide_comparisons() -> None:
    """Creates the module that some tests import, with its names."""
    module = types.ModuleType("scicode.compare.cmp")
    for name in ("cmp_tuple_or_list", "are_dicts_close", "are_csc_matrix_close"):
        vars(module)[name] = close
    for name in ("scicode", "scicode.compare"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["scicode.compare.cmp"] = module


def run_tests(tests: list[str], gold: Names, answer: Names) -> None:
    """Runs a step's tests on the answer's names, with targets from the gold names. Raises what a test raises.

    Later tests use names that earlier ones set, as in one script.
    """
    for test in tests:
        tree = ast.parse(test)
        if any(_mentions_target(statement) for statement in tree.body):
            answer["target"] = target_of(tree, gold)
        _seed()
        exec(compile(tree, "<test>", "exec"), answer)  # noqa: S102


def target_of(test: ast.Module, gold: Names) -> Any:
    """Computes a test's target. The names that the test sets are set in `gold`.

    Raises ValueError for a test of another form.
    """
    _seed()
    found: list[Any] = []
    for statement in test.body:
        if isinstance(statement, ast.Assert) and _mentions_target(statement):
            found.append(_other_side(statement.test, gold))
        else:
            exec(compile(ast.Module([statement], []), "<gold>", "exec"), gold)  # noqa: S102
    if len(found) != 1:
        raise ValueError(f"{len(found)} asserts hold something against target")
    return found[0]


def _other_side(expression: ast.expr, gold: Names) -> Any:
    """Returns the value compared with `target`; for comparisons with `target[i]`, a dict of these by i."""
    parts: dict[Any, Any] = {}
    for node in ast.walk(expression):
        sides: list[ast.expr] = []
        if isinstance(node, ast.Call):
            sides = list(node.args)
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        for i, side in enumerate(sides):
            other = sides[1 - i] if len(sides) > 1 and i < 2 else None
            if other is None or _mentions_target(other):
                continue
            if _is_target(side):
                return _value(other, gold)
            if isinstance(side, ast.Subscript) and _is_target(side.value):
                parts[ast.literal_eval(side.slice)] = _value(other, gold)
    if not parts:
        raise ValueError("nothing stands beside target")
    return parts


def _value(expression: ast.expr, names: Names) -> Any:
    return eval(compile(ast.Expression(expression), "<gold>", "eval"), names)


def _mentions_target(node: ast.AST) -> bool:
    return any(map(_is_target, ast.walk(node)))


def _is_target(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "target"


def _seed() -> None:
    """Seeds both generators, so that gold code and answer draw the same random numbers."""
    random.seed(0)
    np.random.seed(0)
