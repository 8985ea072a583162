"""Measures what guessed tokens bring: speed, share of right guesses, and how often the text is the same.

Tasks are 20 edits of a given text, and questions of GSM8K. Each is answered greedily, and at temperature 0.8
with EM off and with EM's default step; each of these without guesses, with `lookup` and with `auto`, one
directly after the other in turning order. `ratio` is the median, over the tasks, of the decoding speed
relative to no guesses. Texts can differ because a pass of several rows rounds differently. For the first
different token of each answer, `gaps` has how near the draw was: the difference of the two tokens' logits
(greedy), or the least change of the uniform number, up to 0.1, within which both tokens are drawn.
"""

import json
import statistics
from dataclasses import replace
from typing import Any

from common import ROOT, arguments, report, running_on, say

CODE = {
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n"
    "    return total / len(values)": (
        "Rewrite this function with `values` renamed to `numbers`.",
        "Rewrite this function with `total` renamed to `running_sum`.",
        "Add a docstring to this function, and print the whole function.",
        "Add type hints to this function, and print the whole function.",
        "Make this function return 0 for an empty list, and print the whole function.",
    ),
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
    "        self.items.append(item)\n\n    def pop(self):\n        return self.items.pop()\n\n"
    "    def peek(self):\n        return self.items[-1]": (
        "Rename the class to `Pile`, and print the whole class.",
        "Rename `item` to `element` everywhere, and print the whole class.",
        "Add a method `is_empty`, and print the whole class.",
        "Add a docstring to each method, and print the whole class.",
        "Rename `peek` to `top`, and print the whole class.",
    ),
}
PROSE = {
    "The harbour were quiet in the early morning. Fishing boats leaves before sunrise, and the gulls follows"
    " them out to sea. By noon the market are full of people which buy fish, bread and flowers.": (
        "Correct the grammar of this paragraph.",
        "Rewrite this paragraph in the past tense.",
        "Repeat this paragraph, but replace `harbour` by `port`.",
        "Repeat this paragraph, and add one sentence at the end.",
        "Repeat this paragraph with each sentence on a line of its own.",
    ),
    "Name: Anna Berg\nCity: Oslo\nAge: 34\nRole: Engineer\n\nName: Paul Stein\nCity: Bonn\nAge: 51\n"
    "Role: Teacher\n\nName: Maria Lopez\nCity: Madrid\nAge: 28\nRole: Doctor": (
        "Repeat this list with `City` renamed to `Town`.",
        "Repeat this list without the ages.",
        "Write this list as JSON.",
        "Write this list as a Markdown table.",
        "Repeat this list, and add a fourth person of your own.",
    ),
}
EDITS = [f"{what}\n\n{text}" for texts in (CODE, PROSE) for text, asked in texts.items() for what in asked]
MODES = ("off", "lookup", "auto")


def tasks(kind: str, n: int) -> list[str]:
    """Returns n prompts of a kind, spread over all there are."""
    if kind == "edits":
        return EDITS[:: max(1, len(EDITS) // n)][:n]
    found = (folder / "shared" / "data" / "gsm8k" / "train.jsonl" for folder in ROOT.parents)
    path = next(path for path in found if path.exists())
    with path.open() as lines:
        return [json.loads(line)["question"] for line, _ in zip(lines, range(n), strict=False)]


def answer(backend: Any, mode: str, prompt: list[int], request: Any) -> dict[str, Any]:
    """Returns tokens, seconds, passes, and guesses fed and right."""
    from emlocal.generation import Job, Scheduler
    from emlocal.generation.speculation import speculation_of

    speculation = speculation_of(mode, backend, say)  # type: ignore[arg-type]
    runner = Scheduler(backend, 1, speculation)
    handle = runner.submit(Job(prompt, [request], at_once=True))
    while not runner.idle:
        runner.step()
    runner.close()
    return {
        "tokens": [draw.token for draw in handle.result()[0].draws],
        "seconds": handle.timings.generation_seconds,
        "passes": handle.forward_passes,
        "fed": speculation.fed if speculation else 0,
        "right": speculation.right if speculation else 0,
    }


def gap(backend: Any, prompt: list[int], request: Any, one: list[int], other: list[int]) -> float:
    """Returns how near the first differing draw of two answers was; see the module."""
    from emlocal.backends.base import Feed, Row

    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    if at is None:
        return 0.0
    sequence = backend.open()
    backend.forward([Feed(sequence, [*prompt, *one[:at]])])
    row, found = backend.logits(sequence), 1.0
    if request.params.temperature == 0:
        found = abs(float(row[one[at]] - row[other[at]]))
    else:
        u = request.uniforms[at]
        drawn: set[int] = set()
        for change in [0.0, *(10 ** (power / 40) for power in range(-240, -39))]:  # steps of 6 %
            near = [min(max(u + sign * change, 0.0), 1 - 2**-53) for sign in (-1, 1)]
            drawn |= {backend.sample([Row(sequence, request.params, v)])[0].token for v in near}
            if {one[at], other[at]} <= drawn:
                found = change
                break
    backend.release(sequence)
    return found


def measure(running: Any, kind: str, n: int, tokens: int) -> list[dict[str, Any]]:
    """Returns a record for each setting and mode."""
    from emlocal.em.steps import EMInf
    from emlocal.generation import Request
    from emlocal.measure import question_tokens
    from emlocal.sampling import SamplingParams, Uniforms

    backend, plain = running.backend, SamplingParams()
    settings = {
        "greedy": replace(plain, temperature=0.0),
        "T 0.8, EM off": plain,
        "T 0.8, EM default": replace(plain, em=EMInf()),
    }
    found = []
    for name, params in settings.items():
        done: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
        gaps = []
        for i, text in enumerate(tasks(kind, n)):
            say(f"{kind}, {name}, {i + 1} of {n}")
            prompt, request = question_tokens(backend, text), Request(params, Uniforms(1, i), tokens)
            for mode in (*MODES[i % 3 :], *MODES[: i % 3]):
                done[mode].append(answer(backend, mode, prompt, request))
            one, other = done["off"][-1]["tokens"], done["lookup"][-1]["tokens"]
            if one != other:
                gaps.append(gap(backend, prompt, request, one, other))
        for mode, answers in done.items():
            speed = [
                (len(a["tokens"]) / a["seconds"]) / (len(b["tokens"]) / b["seconds"])
                for a, b in zip(answers, done["off"], strict=True)
                if min(a["seconds"], b["seconds"]) > 0 and min(len(a["tokens"]), len(b["tokens"])) > 8
            ]
            same = sum(a["tokens"] == b["tokens"] for a, b in zip(answers, done["off"], strict=True))
            fed, right = (sum(a[key] for a in answers) for key in ("fed", "right"))
            found.append(
                {
                    "tasks": kind,
                    "setting": name,
                    "mode": mode,
                    "ratio": round(statistics.median(speed), 3) if speed else None,
                    "tokens a pass": round(
                        sum(len(a["tokens"]) for a in answers) / sum(a["passes"] for a in answers), 2
                    ),
                    "fed": fed,
                    "right": f"{right / fed:.0%}" if fed else "",
                    "same": f"{same}/{len(answers)}",
                    "gaps": " ".join(f"{each:.1g}" for each in sorted(gaps)) if mode == "lookup" else "",
                }
            )
    return found


def main() -> None:
    chosen = arguments(__doc__ or "", ["edits", "gsm8k", "passes"], n=20, tokens=200)
    results: dict[str, Any] = {}
    rows: list[list[object]] = []
    for model in chosen.model:
        with running_on(model) as running:
            if "passes" in chosen.part:
                from emlocal.measure import pass_costs

                costs = pass_costs(running.backend, 9)
                results[f"{model} passes"] = costs
                say(f"{model}: " + ", ".join(f"{size} rows {cost:.2f}" for size, cost in costs.items()))
            for kind in ("edits", "gsm8k"):
                if kind in chosen.part:
                    found = measure(running, kind, chosen.n, chosen.tokens)
                    results[f"{model} {kind}"] = found
                    rows += [[model, *record.values()] for record in found]
    columns = ("model", "tasks", "setting", "mode", "ratio", "tokens a pass", "fed", "right", "same", "gaps")
    report(results, columns, rows, chosen.json)


if __name__ == "__main__":
    main()
