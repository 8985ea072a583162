"""Measures accuracy on GSM8K before and after training, on the same questions and draws.

Each question gets one answer at temperature 1 and one greedy answer. The result is the content of the last
\\boxed, or else the last number. Prints accuracies with 95 % Wilson intervals, and the difference with a
paired bootstrap. Answers are written to --out, so that a stopped run can be resumed.

    python benchmarks/em_ft_gsm8k.py --model-file qwen.gguf --adapter out --questions test.jsonl --n 200
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from common import circumstances, say

SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
MAX_TOKENS = 400
CHUNK = 50
"""Questions between two writes of the output."""


def wilson(right: int, n: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share. Source: Wilson 1927."""
    z, share = 1.959964, right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return centre - half, centre + half


def difference(before: list[bool], after: list[bool]) -> tuple[float, float, float]:
    """Returns after − before, with a 95 % bootstrap interval over the questions."""
    import numpy as np

    gained = np.array(after, float) - np.array(before, float)
    random = np.random.default_rng(0)
    means = gained[random.integers(0, len(gained), (10_000, len(gained)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(gained.mean()), float(low), float(high)


def answer_all(chosen: argparse.Namespace, adapter: Path | None, temperature: float) -> list[dict[str, Any]]:
    """Answers all questions; returns one row for each."""
    from emlocal.answers.finding import extract
    from emlocal.answers.meaning import equivalent
    from emlocal.backends.engine import LoadOptions, engine
    from emlocal.generation.prompt import chat_tokens, with_system
    from emlocal.generation.scheduler import SPARE_SEQUENCES
    from emlocal.models.resolve import resolve
    from emlocal.training.prompts import read_prompts
    from emlocal.training.rollouts import draw_rollouts, repetition
    from emlocal.training.settings import FineTuneSettings

    name = f"{'after' if adapter else 'before'}-{temperature:g}.jsonl"
    path = chosen.out / name
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    prompts = read_prompts(str(chosen.questions), limit=chosen.skip + chosen.n)[chosen.skip :]
    if len(rows) >= len(prompts):
        return rows
    options = LoadOptions(
        context=1024,
        sequences=chosen.parallel + SPARE_SEQUENCES,
        shared=False,
        adapters=((adapter, 1.0),) if adapter else (),
    )
    backend = engine("llama.cpp").load(resolve(str(chosen.model_file)), options)
    settings = FineTuneSettings(
        rollout_temperature=max(temperature, 1e-6), seed=chosen.seed, max_tokens=MAX_TOKENS
    )
    while len(rows) < len(prompts):
        first = len(rows)
        part = prompts[first : first + CHUNK]
        tokens = [chat_tokens(backend, with_system(p.messages, SYSTEM)) for p in part]
        started = time.perf_counter()
        rollouts = draw_rollouts(backend, tokens, settings, 10**6 + first, chosen.parallel)
        with path.open("a") as file:
            for prompt, rollout in zip(part, rollouts, strict=True):
                found = extract(rollout.text, "boxed") or extract(rollout.text, "last-number")
                wanted = extract(prompt.answer or "", "last-number")
                row = {
                    "where": prompt.where,
                    "right": bool(found and wanted and equivalent(found, wanted)),
                    "answer": found,
                    "tokens": len(rollout.answer),
                    "ended": rollout.ended,
                    "entropy": rollout.entropy,
                    "repetition": repetition(rollout.answer),
                    "text": rollout.text,
                }
                rows.append(row)
                file.write(json.dumps(row) + "\n")
        say(f"{name}: {len(rows)} of {len(prompts)}, {time.perf_counter() - started:.0f} s")
    backend.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-file", type=Path, required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    for flag, default in (("--n", 200), ("--skip", 0), ("--seed", 1), ("--parallel", 16)):
        parser.add_argument(flag, type=int, default=default)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    around = circumstances()
    print(f"`{around['command']}`, commit {around['commit']}, {around['date']}\n")
    print("| T | adapter | n | accuracy | 95 % | entropy, nats a token | tokens | ended | repetition |")
    print("|---|---|---|---|---|---|---|---|---|")
    differences = []
    for temperature in (1.0, 0.0):
        sides = {}
        for adapter in [None, chosen.adapter] if chosen.adapter else [None]:
            rows = sides[adapter is not None] = answer_all(chosen, adapter, temperature)
            n, right = len(rows), sum(row["right"] for row in rows)
            low, high = wilson(right, n)
            tokens = sum(row["tokens"] for row in rows)
            print(
                f"| {temperature:g} | {adapter.name if adapter else 'none'} | {n} | {right / n:.1%}"
                f" | {low:.1%}-{high:.1%} | {sum(row['entropy'] for row in rows) / tokens:.3f}"
                f" | {tokens / n:.0f} | {sum(row['ended'] for row in rows) / n:.0%}"
                f" | {sum(row['repetition'] for row in rows) / n:.1%} |",
                flush=True,
            )
        if len(sides) == 2:
            gain = difference(*([row["right"] for row in sides[side]] for side in (False, True)))
            differences.append((temperature, gain))
    for temperature, (gain, low, high) in differences:
        print(f"\nT = {temperature:g}: {gain:+.1%} [{low:+.1%}, {high:+.1%}]")


if __name__ == "__main__":
    main()
