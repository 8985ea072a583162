"""Measures a step of EM-RL: the share of its time outside the model, and its answers against `emlocal batch`.

It runs `emlocal rl` with the recipe paper-token on GSM8K train questions, with answers of --tokens tokens.
Inside the model are the forward passes and the sampling of answers, the forward passes over answers, and the
forward and backward passes of the gradient. Outside are rewards, advantages, the optimizer, adapters for
llama.cpp, metrics and checkpoints. `emlocal batch` answers the same prompts as often, with a run's initial
adapter; steps and batches take turns.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import MODELS, ROOT, Noise, circumstances, say, wait_until_quiet

GSM8K = Path(os.environ.get("EMLOCAL_GSM8K_TRAIN", ROOT.parent / "shared/data/gsm8k/train.jsonl"))


def timed(times: dict[str, float], owner: Any, *names: str) -> None:
    """Makes these methods add up their seconds in `times`, by name."""

    def around(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return real(*arguments, **named)
            finally:
                times[name] += time.perf_counter() - started

        return call

    for name in names:
        setattr(owner, name, around(name, vars(type(owner)).get(name, None).__get__(owner)))


def batch_speed(model: Path, prompts: Path, adapter: Path, chosen: argparse.Namespace) -> float:
    """Returns the tokens a second that `emlocal batch` reports, without loading the model."""
    out = adapter.parent / "batch.jsonl"
    for old in adapter.parent.glob("batch.jsonl*"):
        old.unlink()
    command = [sys.executable, "-m", "emlocal", "batch", str(prompts), "-o", str(out), "-m", str(model)]
    command += ["--adapter", str(adapter), "-n", "4", "--parallel", "16", "--temp", "1", "--min-p", "0"]
    command += ["--max-tokens", str(chosen.tokens), "--backend", chosen.rollouts]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    said = next(line for line in done.stderr.splitlines() if " answers in " in line)
    return float(re.search(r"([\d,.]+) tok/s", said)[1].replace(",", ""))  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-coder-0.5b")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rollouts", choices=("torch", "llama.cpp"), default="torch")
    chosen = parser.parse_args()

    from emlocal.models.adapters.folders import write_peft
    from emlocal.training.engines import open_engines
    from emlocal.training.folder import RunFolder, View
    from emlocal.training.loop import Plan, Run
    from emlocal.training.prompts import read_prompts
    from emlocal.training.rl import PolicyGradient, em_rl
    from emlocal.training.rl_settings import RLSettings
    from emlocal.training.settings import AnswerOptions, Setup

    settings = RLSettings(steps=chosen.steps, prompts_per_step=4, max_tokens=chosen.tokens)
    times: dict[str, float] = defaultdict(float)
    shares, speeds, batches = [], [], []

    class Watcher:
        def answering(self, step: int, done: int, total: int) -> None: ...
        def training(self, step: int, done: int, total: int) -> None: ...
        def warn(self, text: str) -> None:
            say(text)

        def finished_step(self, row: dict[str, Any]) -> None:
            if "train_seconds" not in row:
                return
            whole = time.perf_counter() - self.since
            shares.append(1 - sum(times.values()) / whole)
            speeds.append(row["rollout_tokens_per_second"])
            said = ", ".join(f"{name} {seconds:.1f}" for name, seconds in times.items())
            say(f"step {row['step']}: {whole:.1f} s ({said}), {speeds[-1]:.0f} tokens/s")
            batches.append(batch_speed(MODELS[chosen.model], prompts_file, fresh, chosen))
            say(f"batch: {batches[-1]:.0f} tokens/s")
            times.clear()
            self.since = time.perf_counter()

    wait_until_quiet(120)
    noise, watcher = Noise(), Watcher()
    setup = Setup([], Path(), str(MODELS[chosen.model]), answers=AnswerOptions(rollouts=chosen.rollouts))
    folder_name = tempfile.TemporaryDirectory()
    with (
        folder_name as name,
        open_engines(em_rl(settings), setup, "torch", View()) as engines,
    ):
        fresh, prompts_file = Path(name) / "fresh", Path(name) / "prompts.jsonl"
        write_peft(engines.learner.adapter(), fresh)
        data = read_prompts(str(GSM8K), limit=4)
        prompts_file.write_text("".join(json.dumps({"messages": p.messages}) + "\n" for p in data))
        tokens = [tokens for _, tokens in engines.encoded(data, None)]
        timed(times, engines.learner, "score", "accumulate")
        timed(times, engines.answerer.backend, "forward", "sample")
        folder, _ = RunFolder.open(Path(name) / "run", "rl", {}, resume=False)
        method = PolicyGradient(settings, engines.learner)
        watcher.since = time.perf_counter()
        plan = Plan(save_every=1)
        Run(settings, plan, tokens, method, engines.learner, engines.answerer, folder, watcher).run()
        folder.close()
    around = circumstances()
    print(f"`{around['command']}`, commit {around['commit']}, {around['date']}; others {noise.share():.0%}\n")
    print(
        f"- outside the model: {statistics.median(shares):.1%} of a step"
        f" ({min(shares):.1%}-{max(shares):.1%})"
    )
    ratios = [a / b for a, b in zip(speeds, batches, strict=True)]
    print(
        f"- answers: {statistics.median(speeds):.0f} tokens/s, `batch` {statistics.median(batches):.0f};"
        f" ratio {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}), n = {len(ratios)}"
    )


if __name__ == "__main__":
    main()
