"""Writes sums of every difficulty with their answers, as questions for `emlocal eval` and `emlocal batch`.

Half of them serve to calibrate (dev.jsonl), the others to test (test.jsonl).

    python benchmarks/sums.py FOLDER --questions 200
"""

import argparse
import json
from collections.abc import Iterator
from operator import add, mul, sub
from pathlib import Path
from random import Random

_DO = {"+": add, "-": sub, "*": mul}


def sums(n: int, seed: int) -> Iterator[tuple[str, int]]:
    """Yields n different questions and their answers; half are products of numbers below 100."""
    random, seen = Random(seed), set[str]()
    while len(seen) < n:
        sign = random.choice("+-**")
        low, high = (2, 99) if sign == "*" else (100, 9999)
        a, b = random.randint(low, high), random.randint(low, high)
        if sign == "-" and a < b:
            a, b = b, a
        question = f"What is {a} {sign} {b}? Say the number alone."
        if question not in seen:
            seen.add(question)
            yield question, _DO[sign](a, b)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    lines = [
        json.dumps({"question": q, "answer": str(a)}) + "\n" for q, a in sums(given.questions, given.seed)
    ]
    given.folder.mkdir(parents=True, exist_ok=True)
    half = len(lines) // 2
    (given.folder / "dev.jsonl").write_text("".join(lines[:half]))
    (given.folder / "test.jsonl").write_text("".join(lines[half:]))


if __name__ == "__main__":
    main()
