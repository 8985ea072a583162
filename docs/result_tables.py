"""Writes the tables of evaluations in docs/results.md, and the results in README.md.

python docs/result_tables.py        (tests fail when the pages differ from what this writes)

A table stands between <!-- table FOLDER --> and <!-- end of table -->; its figures are from
docs/results/FOLDER/results.json. Methods are compared with greedy decoding, and with sampling at the settings
that they draw with: em-inf with sample, em-inf:paper with sample:1. All comparisons of a table are adjusted
together (Holm).

The README's results stand between <!-- results … --> and <!-- end of results -->. Figures that are in no
results.json are read from the hand-written tables of docs/results.md and docs/performance.md.
"""

import json
import re
import textwrap
from pathlib import Path
from typing import Any

from emlocal.evaluation.report.texts import difference, entropy, flops, markdown_table, p_value, share
from emlocal.evaluation.results import Comparison, Estimate, compare_pairs

HERE = Path(__file__).parent
PAGE = HERE / "results.md"
SPEED = HERE / "performance.md"
README = HERE.parent / "README.md"
DRAWN_AS = {
    "em-inf": "sample",
    "adaptive-temperature": "sample",
    "em-inf:paper": "sample:1",
    "self-consistency:4": "sample",
    "em-inf+self-consistency:4": "self-consistency:4",
    "sequential-refinement": "sample",
}
"""The method that each method adds something to; compared if the table has both."""
BRIEF = {"HumanEval": "humaneval-qwen", "GSM8K": "gsm8k-qwen", "MATH-500": "math-qwen"}
"""The evaluations of the README's results."""
CHANCE = 0.05
"""Adjusted p-values above this are "within chance"."""
_TOGETHER = re.compile(r" (?=%|=)|(?<==) |(?<=,) (?=[+−\d.]+\])")
"""Spaces at which the README's lines do not end."""
_RESULTS = re.compile(r"(<!-- results[^>]* -->\n).*?(<!-- end of results -->)", re.DOTALL)
_TABLE = re.compile(r"(<!-- table ([\w.-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def page() -> str:
    """Returns the text of docs/results.md."""
    text = PAGE.read_text(encoding="utf-8")
    return _TABLE.sub(lambda found: found[1] + table(HERE / "results" / found[2]) + found[3], text)


def readme() -> str:
    """Returns the whole README.md with new results."""
    return _RESULTS.sub(lambda found: found[1] + brief() + found[2], README.read_text(encoding="utf-8"))


def brief() -> str:
    """Returns the README's results, five items of a list in Markdown.

    Raises ValueError where a figure no longer supports its sentence.
    """
    read = {task: _read(HERE / "results" / folder) for task, folder in BRIEF.items()}
    sampling, greedy = [], []
    for task, (results, found) in read.items():
        accuracy = _percent(results)
        one = found["em-inf", "sample"]
        sampling.append(
            f"{task} {accuracy['sample']} → {accuracy['em-inf']} % ({_interval(one)}, "
            f"p = {p_value(one.p_holm)}, n = {len(results['problems'])})"
        )
        greedy.append(f"{accuracy['greedy']} % on {task}")
        better = [
            name
            for (name, base), one in found.items()
            if base == "greedy" and one.p_holm < CHANCE and one.difference.value > 0
        ]
        _check(not better, f"{better} are better than greedy decoding on {task}")
    votes = _percent(read["GSM8K"][0])
    _check(
        read["GSM8K"][1]["em-inf+self-consistency:4", "self-consistency:4"].p_holm > CHANCE, "votes differ"
    )
    page = PAGE.read_text(encoding="utf-8")
    plain, gained = _cells(page, "method | a sample", "`self-consistency:4`", "`em-inf+self-consistency:4`")
    trained = "temperature | adapter | labels"
    before, em_ft, em_rl, other_rl, labelled, greedy_before, greedy_after = _cells(
        page, trained, "1 | none", "1 | EM-FT", "1 | paper-token", "1 | paper-sequence", "1 | rloo",
        "greedy | none", "greedy | EM-FT",
    )  # fmt: skip
    speed = SPEED.read_text(encoding="utf-8")
    small, large = _cells(speed, "model | V | bare loop", "SmolLM2-135M", "Qwen2.5-Coder-0.5B")
    items = [
        f"**EM-INF against sampling** (temperature 0.8): {', '.join(sampling)}.",
        f"**Greedy decoding costs as little and does as well**: {', '.join(greedy)}. No method was "
        "better than it beyond chance. For a single answer use `--temp 0`.",
        f"**Votes**: on GSM8K, four plain samples reach {votes['self-consistency:4']} %, four with EM-INF "
        f"{votes['em-inf+self-consistency:4']} % (within chance). A vote gains {_points(plain[4])} "
        f"points over one of its samples, with EM-INF {_points(gained[4])}.",
        f"**Training**, 200 questions of GSM8K at temperature 1: EM-FT {before[3]} → {em_ft[3]} "
        f"({_trained(em_ft[5])}, not adjusted), EM-RL {em_rl[3]} or {other_rl[3]}, RLOO with labels "
        f"{labelled[3]}. Only EM-FT's gain is beyond chance. Greedy answers: {greedy_before[3]} → "
        f"{greedy_after[3]}, within chance.",
        f"**Speed** of llama.cpp with EM-INF, relative to without: {_plain(small[6])} (SmolLM2-135M), "
        f"{_plain(large[6])} (Qwen).",
    ]
    return "\n".join(_wrapped(item) for item in items) + "\n"


def _percent(results: dict[str, Any]) -> dict[str, str]:
    """Returns the accuracy of each method, in percent."""
    return {method["name"]: f"{100 * method['accuracy']['value']:.1f}" for method in results["methods"]}


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(f"the README's sentence no longer holds: {otherwise}")


def _cells(page: str, head: str, *begins: str) -> list[list[str]]:
    """Returns rows of the first table with this head, as cells: the first that has each beginning."""
    table = page[page.index(f"| {head}") :].partition("\n\n")[0].splitlines()
    rows = [next(line for line in table if line.startswith(f"| {begin} ")) for begin in begins]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def _interval(one: Comparison) -> str:
    """ "+3.1 points [−0.6, +6.9]"."""
    value, interval = difference(one).rstrip(")").split(" (")
    return f"{value} points [{interval.replace(' to ', ', ')}]"


def _points(cell: str) -> str:
    return cell.partition(" [")[0]


def _trained(cell: str) -> str:
    return cell.replace(" [", " points [")


def _plain(cell: str) -> str:
    return cell.replace("*", "")


def _wrapped(item: str) -> str:
    item = _TOGETHER.sub("\N{NO-BREAK SPACE}", item)
    lines = textwrap.fill(item, 118, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    return lines.replace("\N{NO-BREAK SPACE}", " ")


def table(folder: Path) -> str:
    """Returns the table of an evaluation in Markdown. Columns that would be empty are left out."""
    results, compared = _read(folder)
    methods = {method["name"]: method for method in results["methods"]}
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


def _read(folder: Path) -> tuple[dict[str, Any], dict[tuple[str, str], Comparison]]:
    """Reads an evaluation's results.json, and compares its methods: by (method, reference)."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    right = {method["name"]: method["right"] for method in results["methods"]}
    pairs = [(name, "greedy") for name in right if name != "greedy" and "greedy" in right]
    pairs += [(name, base) for name in right if (base := _base(name)) in right]
    found = compare_pairs(right, pairs, _sizes(results), results["settings"]["seed"])
    return results, {(one.name, one.reference): one for one in found}


def _base(name: str) -> str:
    """Names the method that this one adds something to: em-inf:em_steps=3 to sample, as em-inf does."""
    return DRAWN_AS.get("em-inf" if name.startswith("em-inf:em_") else name, "")


def _accuracy(method: dict[str, Any]) -> dict[str, str]:
    value, interval = share(Estimate(**method["accuracy"])).rstrip(")").split(" (")
    return {"accuracy %": value, "95 %": interval}


def _difference(one: Comparison | None, head: str, p: str, *, named: bool = False) -> dict[str, str]:
    """Returns the cells of the difference and of p, adjusted for the whole table.

    They are empty without a comparison.
    """
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
    """Returns the number of questions in each whole problem; SciCode's steps are named PROBLEM.STEP."""
    wholes = results["methods"][0]["right"]
    if len(wholes) == len(results["problems"]):
        return dict.fromkeys(wholes, 1)
    names = [str(problem["id"]).rpartition(".")[0] for problem in results["problems"]]
    return {whole: names.count(whole) for whole in wholes}


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(), encoding="utf-8")
    print(PAGE, README)
