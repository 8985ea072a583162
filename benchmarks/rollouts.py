"""Measures the answers of a fine-tuning step by llama.cpp and by torch, in turns: tokens a second.

The model is a GGUF file with a fresh LoRA adapter on all its linear layers. torch runs it dequantized, in the
number format that it chooses for this machine. There are 16 prompts of GSM8K's length, 16 at once; answers
end at --tokens.
"""

import argparse
import statistics
import time
from pathlib import Path

from common import MODELS, Noise, circumstances, say, wait_until_quiet

PARALLEL = 16
TEXT = "A baker sells 12 loaves a day for $4, twice as many on Saturdays. What does she earn in a week? "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-coder-0.5b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96)
    chosen = parser.parse_args()

    from emlocal.training.engines import open_engines
    from emlocal.training.folder import View
    from emlocal.training.rl import em_ft
    from emlocal.training.rollouts import draw_rollouts
    from emlocal.training.settings import AnswerOptions, FineTuneSettings, Rollouts, Setup

    settings = FineTuneSettings(max_tokens=chosen.tokens, prompts_per_step=PARALLEL)
    path = str(Path(MODELS[chosen.model]))
    speeds: dict[str, list[float]] = {"llama.cpp": [], "torch": []}

    def speed(engine: Rollouts) -> list[float]:
        setup = Setup([], Path(), path, answers=AnswerOptions(rollouts=engine))
        with open_engines(em_ft(settings), setup, "torch", View()) as engines:
            engines.answerer.refresh(engines.learner.adapter())
            backend = engines.answerer.backend
            prompts = [
                backend.encode(f"{i}. {TEXT}" * 3, add_special=True, parse_special=False)
                for i in range(PARALLEL)
            ]
            found = []
            for step in range(3):
                started = time.perf_counter()
                rollouts = draw_rollouts(backend, prompts, settings, step, PARALLEL)
                found.append(sum(len(r.answer) for r in rollouts) / (time.perf_counter() - started))
            say(f"{engine}: {found[-1]:.0f} tokens/s")
            return found[1:]

    wait_until_quiet(120)
    noise = Noise()
    for _ in range(chosen.rounds):
        for engine in ("llama.cpp", "torch"):
            speeds[str(engine)] += speed(engine)
    ratios = [a / b for a, b in zip(speeds["llama.cpp"], speeds["torch"], strict=True)]
    around = circumstances()
    print(f"`{around['command']}`, commit {around['commit']}, {around['date']}; others {noise.share():.0%}\n")
    for engine, found in speeds.items():
        print(f"- {engine}: {statistics.median(found):.0f} tokens/s")
    print(
        f"- llama.cpp : torch {statistics.median(ratios):.2f}"
        f" [{min(ratios):.2f}, {max(ratios):.2f}], n = {len(ratios)}"
    )


if __name__ == "__main__":
    main()
