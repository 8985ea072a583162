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

from emlocal.evaluation.report.texts import difference, entropy, flops, markdown_table, p_value, share
from emlocal.evaluation.results import Comparison, Estimate, compare_pairs

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


def page() -> str:
    """The whole of docs/results.md."""
    text = PAGE.read_text(encoding="utf-8")
    return _TABLE.sub(lambda found: found[1] + table(HERE / "results" / found[2]) + found[3], text)


def table(folder: Path) -> str:
    """The table of an evaluation's results.json, in Markdown. Columns that would be empty are left out."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    methods = {method["name"]: method for method in results["methods"]}
    pairs = [(name, "greedy") for name in methods if name != "greedy" and "greedy" in methods]
    pairs += [(name, base) for name in methods if (base := _base(name)) in methods]
    right = {name: method["right"] for name, method in methods.items()}
    found = compare_pairs(right, pairs, _sizes(results), results["settings"]["seed"])
    compared = {(one.name, one.reference): one for one in found}
    rows = [
        {
            "method": f"`{name}`",
            **_accuracy(method),
            **_difference(compared.get((name, "greedy")), "against greedy", "p"),
            **_difference(compared.get((name, _base(name))), "against", "p ", named=True),
            **_rest(method),
        }
        for name, method in methods.items()
    ]
    heads = [head for head in rows[0] if any(row[head] for row in rows)]
    cells = [[row[head] for head in heads] for row in rows]
    return "\n".join(markdown_table([head.strip() for head in heads], cells)) + "\n"


def _base(name: str) -> str:
    """What the method adds something to: em-inf:em_steps=3 to sample, as em-inf does."""
    return DRAWN_AS.get("em-inf" if name.startswith("em-inf:em_") else name, "")


def _accuracy(method: dict[str, Any]) -> dict[str, str]:
    value, interval = share(Estimate(**method["accuracy"])).rstrip(")").split(" (")
    return {"accuracy %": value, "95 %": interval}


def _difference(one: Comparison | None, head: str, p: str, *, named: bool = False) -> dict[str, str]:
    """Its cell, and that of p, adjusted for all of the table; empty where nothing is compared."""
    if one is None:
        return {head: "", p: ""}
    return {head: (f"`{one.reference}`: " if named else "") + difference(one), p: p_value(one.p_holm)}


def _rest(method: dict[str, Any]) -> dict[str, str]:
    cost = method["cost"]
    without = method["guessed"] + method["no_answer"]
    return {
        "no box": f"{without:,}" if without else "",
        "cut off": f"{method['cut_off']:,}",
        "read + written": f"{cost['read']:,.0f} + {cost['written']:,.0f}",
        "FLOPs": flops(cost["flops"]),
        "entropy": entropy(method["entropy_before"], method["entropy_after"]),
    }


def _sizes(results: dict[str, Any]) -> dict[str, int]:
    """Questions in each whole problem: SciCode's steps are named PROBLEM.STEP."""
    wholes = results["methods"][0]["right"]
    if len(wholes) == len(results["problems"]):
        return dict.fromkeys(wholes, 1)
    names = [str(problem["id"]).rpartition(".")[0] for problem in results["problems"]]
    return {whole: names.count(whole) for whole in wholes}


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
