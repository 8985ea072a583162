"""Counts how the answers of an evaluation ended: by themselves or cut off, and how many of the latter loop.

Reads answers only. A text loops if more than half of its sequences of four words occurred before. (Training's
guards measure repetition in the same way, in tokens.) Each method is compared with the first, paired by
question. p is McNemar's, not adjusted for multiple comparisons. For methods with one text a question, not for
votes.

    python benchmarks/endings.py gsm8k-smollm2 --methods sample,em-inf,greedy
"""

import argparse
import json
from pathlib import Path

from common import report

from emlocal.evaluation.report.texts import p_value
from emlocal.evaluation.results import share_cut_off
from emlocal.evaluation.runner import answers_path
from emlocal.evaluation.statistics import mcnemar
from emlocal.training.rollouts import repetition

LOOP = 0.5


def cut_off(folder: Path, method: str) -> dict[str, str]:
    """Returns the texts that were cut off, by the answers' ids."""
    lines = answers_path(folder, method).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["custom_id"]: row["text"] for row in rows if share_cut_off(row)}


def loops(text: str) -> bool:
    """Whether the text repeats itself."""
    numbers: dict[str, int] = {}
    return repetition([numbers.setdefault(word, len(numbers)) for word in text.split()]) > LOOP


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", required=True)
    chosen = parser.parse_args()
    found = {name: cut_off(chosen.folder, name) for name in chosen.methods.split(",")}
    first = next(iter(found.values()))
    rows = []
    for name, texts in found.items():
        p = "" if texts is first else p_value(mcnemar(len(texts.keys() - first), len(first.keys() - texts)))
        rows.append((f"`{name}`", len(texts), p, sum(map(loops, texts.values()))))
    report({}, ("method", "cut off", "p", "of these loops"), rows, as_json=False)


if __name__ == "__main__":
    main()
