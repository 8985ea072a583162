"""SciCode's tests with its official targets, compared as its repository (scicode-bench/SciCode) does.

Dicts are compared by key, sympy's symbols by their names (the file of targets holds texts), sparse matrices
as dense ones, everything else with np.allclose. Where the official code fails on lists of several lengths or
of texts, these are compared item by item.

This file's text goes into the sandbox in front of a program: it stands by itself.
"""

import base64
import pickle
import random
import sys
import types
from typing import Any

import numpy as np

Names = dict[str, Any]
RELATIVE, ABSOLUTE = 1e-5, 1e-8  # np.allclose's own


def unpacked(packed: str) -> list[Any]:
    """A step's targets, one a test, from what `TargetFile.packed` wrote."""
    targets: list[Any] = pickle.loads(base64.b64decode(packed))  # emlocal wrote it
    return targets


def close(a: Any, b: Any) -> bool:
    """Whether what the code gave agrees with the target."""
    if isinstance(b, str) and type(a).__module__.startswith("sympy."):
        a = str(a)
    if isinstance(a, dict):
        return dicts_close(a, b)
    if isinstance(a, str):
        return bool(a == b)
    a, b = _dense(a), _dense(b)
    try:
        return bool(np.allclose(a, b, rtol=RELATIVE, atol=ABSOLUTE))
    except (ValueError, TypeError):  # lengths differ, or there are texts or dicts among the items
        if isinstance(a, tuple | list) and isinstance(b, tuple | list):
            return items_close(a, b)
        return bool(a == b)


def items_close(a: Any, b: Any) -> bool:
    """Whether two tuples or lists agree, item by item."""
    return len(a) == len(b) and all(close(x, y) for x, y in zip(a, b, strict=True))


def dicts_close(a: Any, b: Any) -> bool:
    """Whether two dicts have the same keys, symbols by their names, and values that agree."""
    a, b = ({_name(key): value for key, value in one.items()} for one in (a, b))
    return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)


def matrices_close(a: Any, b: Any) -> bool:
    """Whether two sparse matrices agree."""
    return bool(np.allclose(_dense(a), _dense(b), rtol=RELATIVE, atol=ABSOLUTE))


def provide_comparisons() -> None:
    """The module that some tests import, with its names."""
    module = types.ModuleType("scicode.compare.cmp")
    vars(module).update(
        cmp_tuple_or_list=items_close, are_dicts_close=dicts_close, are_csc_matrix_close=matrices_close
    )
    for name in ("scicode", "scicode.compare"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["scicode.compare.cmp"] = module


def run_code(code: str, tests: list[str], targets: list[Any]) -> None:
    """Run an answer's code and a step's tests on its names. Raises what they raise.

    All is one script, as in the official protocol: later tests see names and random numbers as earlier ones
    left them. Only its beginning is seeded, so that a verdict is the same each time.
    """
    random.seed(0)
    np.random.seed(0)
    answer: Names = {"__name__": "answer"}
    exec(code, answer)  # noqa: S102
    for test, target in zip(tests, targets, strict=True):
        answer["target"] = target
        exec(compile(test, "<test>", "exec"), answer)  # noqa: S102


def _name(key: Any) -> Any:
    return str(key) if type(key).__module__.startswith("sympy.") else key


def _dense(value: Any) -> Any:
    return value.toarray() if "sparse" in type(value).__module__ else value
