"""Runs the cases of math-verify's own tests through emlocal's reader and judge, and prints where they differ.

    pip download --no-binary :all: --no-deps math-verify==0.9.0
    python benchmarks/math_verify_cases.py math_verify-0.9.0.tar.gz

A case has a gold answer, an answer and whether they are equal. Cases with options that emlocal does not use
(precision, strictness, strings to look for) are skipped. docs/evaluation.md lists the intended differences.
"""

import ast
import math
import re
import sys
import tarfile
from collections.abc import Iterator

from emlocal.answers.finding import find
from emlocal.answers.gold import gold
from emlocal.answers.meaning import equivalent
from emlocal.evaluation.tasks.mathematics import MathJudge

_PROSE = re.compile(r"^[^$]*(?<![A-Za-z\\{])[A-Za-z]{3,}")
_SHOWN = 120
_NAMES = (["gold", "pred", "expected"], ["gold", "pred", "result"])


def cases(archive: str) -> Iterator[tuple[str, str, str, bool]]:
    """Yields (test, gold, answer, equal) of each test that takes only a gold answer and an answer."""
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            file = tar.extractfile(member) if "/tests/" in member.name else None
            if file is None or not member.name.endswith(".py"):
                continue
            for node in ast.walk(ast.parse(file.read())):
                if isinstance(node, ast.FunctionDef):
                    for decorator in node.decorator_list:
                        yield from ((node.name, *case) for case in _parametrized(decorator))


def _parametrized(decorator: ast.expr) -> Iterator[tuple[str, str, bool]]:
    if not isinstance(decorator, ast.Call) or len(decorator.args) != 2:
        return
    names, rows = decorator.args
    if not isinstance(names, ast.Constant) or not isinstance(rows, ast.List):
        return
    if str(names.value).replace(" ", "").split(",") not in _NAMES:
        return
    for row in rows.elts:
        code = compile(ast.Expression(row), "a case", "eval")
        gold_text, answer, equal = eval(code, {"math": math})
        yield gold_text, answer, bool(equal)


def _answer(text: str) -> str:
    """Finds the answer as eval does. Most texts, however, are an answer by themselves, without a box."""
    found = find(text)
    if found is None or (found.how == "last-number" and not _PROSE.search(text)):
        return text.strip().strip("$").strip()
    return found.text


def main(archive: str) -> None:
    """Judges all cases."""
    agree, voted, total = 0, 0, 0
    with MathJudge() as judge:
        for test, gold_text, text, equal in cases(archive):
            answer = _answer(text)
            right = gold(gold_text) or ""
            said = judge.equal(right, answer)
            total, agree = total + 1, agree + (said == equal)
            voted += equivalent(right, answer)
            if said != equal:
                print(f"{test}, expects {equal}: {right!r}, {answer!r} (of …{text[-_SHOWN:]!r})")
    print(f"{agree} of {total} agree; {voted} are equal by notation alone")


if __name__ == "__main__":
    main(sys.argv[1])
