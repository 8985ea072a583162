"""Write the tables of evaluations in docs/results.md, from the results.json of each in docs/results/.

python docs/result_tables.py        (a test fails when docs/results.md is not what this writes)

A table stands between <!-- table FOLDER --> and <!-- end of table -->. Methods are held against greedy
decoding, and against sampling with the settings that they draw with: em-inf against sample, em-inf:paper
against sample:1. All comparisons of a table are adjusted together (Holm).
"""

import json
import re
from pathlib import Path
from typing import Any

from emlocal.evaluation.report.texts import difference, flops, p_value, share
from emlocal.evaluation.results import Estimate, compare_pairs

HERE = Path(__file__).parent
PAGE = HERE / "results.md"
DRAWN_AS = {
    "em-inf": "sample",
    "adaptive-temperature": "sample",
    "em-inf:paper": "sample:1",
    "self-consistency:4": "sample",
    "em-inf+self-consistency:4": "self-consistency:4",
    "sequential-refinement": "sample",
}
"""What a method adds something to, where the table has both."""
_TABLE = re.compile(r"(<!-- table ([\w.-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
_HEADS = (
    "method", "accuracy %", "95 %", "against greedy", "p (Holm)", "against sampling", "p (Holm)",
    "cut off", "tokens", "FLOPs", "entropy, nats",
)  # fmt: skip


def page() -> str:
    """The whole of docs/results.md."""
    text = PAGE.read_text(encoding="utf-8")
    return _TABLE.sub(lambda found: found[1] + table(HERE / "results" / found[2]) + found[3], text)


def table(folder: Path) -> str:
    """The table of an evaluation's results.json, in Markdown."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    methods = {method["name"]: method for method in results["methods"]}
    pairs = [(name, "greedy") for name in methods if name != "greedy"]
    pairs += [(name, base) for name, base in DRAWN_AS.items() if name in methods and base in methods]
    right = {name: method["right"] for name, method in methods.items()}
    found = compare_pairs(right, pairs, _sizes(results), results["settings"]["seed"])
    compared = {(one.name, one.reference): one for one in found}
    lines = [_line(_HEADS), "|" + "---|" * len(_HEADS)]
    for name, method in methods.items():
        accuracy = Estimate(**method["accuracy"])
        cells = [f"`{name}`", *share(accuracy).rstrip(")").split(" (")]
        for against in ("greedy", DRAWN_AS.get(name, "")):
            one = compared.get((name, against))
            cells += ["", ""] if one is None else [difference(one), p_value(one.p_holm)]
        cost, before, after = method["cost"], method["entropy_before"], method["entropy_after"]
        changed = abs(before - after) >= 0.005
        cells += [f"{method['cut_off']:,}", f"{cost['written']:,.0f}", flops(cost["flops"])]
        cells.append(f"{before:.2f} → {after:.2f}" if changed else f"{before:.2f}")
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _sizes(results: dict[str, Any]) -> dict[str, int]:
    """Questions in each whole problem: SciCode's steps are named PROBLEM.STEP."""
    wholes = results["methods"][0]["right"]
    if len(wholes) == len(results["problems"]):
        return dict.fromkeys(wholes, 1)
    names = [str(problem["id"]).rpartition(".")[0] for problem in results["problems"]]
    return {whole: names.count(whole) for whole in wholes}


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
