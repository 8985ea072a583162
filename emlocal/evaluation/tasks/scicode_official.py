"""SciCode's tests with official targets, compared as in its repository (scicode-bench/SciCode).

Dicts are compared by key, sympy's symbols by name (the file of targets holds texts), sparse matrices as dense
ones, and everything else with np.allclose. The official code fails on lists of unequal lengths and on lists
of texts; these are compared item by item here.

The text of this file goes into the sandbox before a program, so it imports nothing of emlocal.
"""

import base64
import pickle
import random
import sys
import types
from typing import Any

import numpy as np

Names = dict[str, Any]
RELATIVE, ABSOLUTE = 1e-5, 1e-8  # defaults of np.allclose


def unpacked(packed: str) -> list[Any]:
    """Returns a step's targets, one for each test, from the text that `TargetFile.packed` returned."""
    targets: list[Any] = pickle.loads(base64.b64decode(packed))  # emlocal wrote this text
    return targets


def close(a: Any, b: Any) -> bool:
    """Whether the value that the code computed agrees with the target."""
    if isinstance(b, str) and type(a).__module__.startswith("sympy."):
        a = str(a)
    if isinstance(a, dict):
        return dicts_close(a, b)
    if isinstance(a, str):
        return bool(a == b)
    a, b = _dense(a), _dense(b)
    try:
        return bool(np.allclose(a, b, rtol=RELATIVE, atol=ABSOLUTE))
    except (ValueError, TypeError):  # lengths differ, or some items are texts or dicts
        if isinstance(a, tuple | list) and isinstance(b, tuple | list):
            return items_close(a, b)
        return bool(a == b)


def items_close(a: Any, b: Any) -> bool:
    """Whether two tuples or lists agree, item by item."""
    return len(a) == len(b) and all(close(x, y) for x, y in zip(a, b, strict=True))


def dicts_close(a: Any, b: Any) -> bool:
    """Whether two dicts have the same keys, with symbols by name, and values that agree."""
    a, b = ({_name(key): value for key, value in one.items()} for one in (a, b))
    return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)


def matrices_close(a: Any, b: Any) -> bool:
    """Whether two sparse matrices agree."""
    return bool(np.allclose(_dense(a), _dense(b), rtol=RELATIVE, atol=ABSOLUTE))


def provide_comparisons() -> None:
    """Creates the module that some tests import, with its names."""
    module = types.ModuleType("scicode.compare.cmp")
    vars(module).update(
        cmp_tuple_or_list=items_close, are_dicts_close=dicts_close, are_csc_matrix_close=matrices_close
    )
    for name in ("scicode", "scicode.compare"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["scicode.compare.cmp"] = module


def run_code(code: str, tests: list[str], targets: list[Any]) -> None:
    """Runs an answer's code, then a step's tests on its names. Raises what they raise.

    All run as one script, as in the official protocol: a test sees the names and the random state that
    earlier tests left. Only the start is seeded, so the verdict is the same each time.
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
