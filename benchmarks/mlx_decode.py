"""Measures decoding in MLX with EM on, with EM off and in mlx-lm, for one sequence and for eight.

mlx-lm decodes one sequence with `stream_generate` and eight with `BatchGenerator`. In a round, each side
decodes the same number of tokens of the same prompts; the sides take turns at going first. Times run from the
first token to the last, without the reading of prompts. If MLX runs on the CPU, ratios are of processor
seconds, which other processes change less; speeds are by the clock. On a Mac:

    python benchmarks/mlx_decode.py --rounds 20 --tokens 128
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import MODELS, Noise, arguments, report, say, wait_until_quiet

AT_ONCE, PROMPT = 8, 8
SIDES = ("on", "off", "mlx-lm")
Side = Callable[[list[list[int]], int], tuple[float, float]]
"""Receives prompts and a number of tokens; returns seconds by the clock and of the processor."""


def now() -> tuple[float, float]:
    """Returns the clock, and this process's processor seconds."""
    return time.perf_counter(), time.process_time()


def between(start: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
    return end[0] - start[0], end[1] - start[1]


def opened(path: Path) -> tuple[Any, Any, Any]:
    """Opens the engine, mlx-lm's model of the same folder in the same format, and its tokenizer."""
    from mlx_lm.utils import load

    from emlocal.backends.base import LoadOptions
    from emlocal.backends.mlx.backend import open_folder
    from emlocal.models.resolve import resolve
    from emlocal.models.unpacked import unpack

    folder = unpack(resolve(str(path)))
    backend = open_folder(folder, LoadOptions(context=512, sequences=AT_ONCE, shared=False))
    model, tokenizer = load(str(folder))
    model.set_dtype(backend.place.dtype)
    tokenizer.eos_token_ids = set()
    return backend, model, tokenizer


def ours(backend: Any, *, em: bool) -> Side:
    """Returns emlocal's side: a draw for each row, then a forward pass."""
    from emlocal.backends.base import Feed, Row
    from emlocal.sampling import SamplingParams, Uniforms
    from emlocal.settings import EMInf

    params = SamplingParams(em=EMInf() if em else None)

    def run(prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        sequences = [backend.open() for _ in prompts]
        uniforms = [Uniforms(0, sequence) for sequence in sequences]
        backend.forward([Feed(s, prompt) for s, prompt in zip(sequences, prompts, strict=True)])
        started = now()
        for t in range(tokens):
            rows = [Row(s, params, uniforms[i][t]) for i, s in enumerate(sequences)]
            draws = backend.sample(rows)
            backend.forward([Feed(s, [d.token]) for s, d in zip(sequences, draws, strict=True)])
        seconds = between(started, now())
        for sequence in sequences:
            backend.release(sequence)
        return seconds

    return run


def mlx_lm_alone(model: Any, tokenizer: Any) -> Side:
    from mlx_lm.generate import stream_generate
    from mlx_lm.sample_utils import make_sampler

    def run(prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        stamps = [
            now()
            for _ in stream_generate(
                model, tokenizer, prompts[0], max_tokens=tokens + 1, sampler=make_sampler(temp=1.0)
            )
        ]
        return between(stamps[0], stamps[-1])

    return run


def mlx_lm_together(model: Any) -> Side:
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.sample_utils import make_sampler

    def run(prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        generator = BatchGenerator(model, stop_tokens=[], sampler=make_sampler(temp=1.0))
        generator.insert(prompts, [tokens + 1] * len(prompts))
        stamps = []
        while generator.next_generated():
            stamps.append(now())
        generator.close()
        assert len(stamps) == tokens + 1  # all sequences advanced together
        return between(stamps[0], stamps[-1])

    return run


def measure(name: str, part: str, rounds: int, tokens: int) -> dict[str, Any]:
    backend, model, tokenizer = opened(MODELS[name])
    reference = mlx_lm_alone(model, tokenizer) if part == "alone" else mlx_lm_together(model)
    sides = dict(zip(SIDES, (ours(backend, em=True), ours(backend, em=False), reference), strict=True))
    text = backend.encode(
        "The lighthouse keeper wrote to his landlord: " * 40, add_special=False, parse_special=False
    )
    n = 1 if part == "alone" else AT_ONCE
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    processor: dict[str, list[float]] = {side: [] for side in SIDES}
    for side in SIDES:
        sides[side]([text[:PROMPT]] * n, 1)  # warms up
    wait_until_quiet(10)
    noise = Noise()
    for number in range(rounds):
        prompts = [text[number + i : number + i + PROMPT] for i in range(n)]
        turn = number % len(SIDES)
        for side in SIDES[turn:] + SIDES[:turn]:
            by_clock, of_processor = sides[side](prompts, tokens)
            seconds[side].append(by_clock)
            processor[side].append(of_processor)
        say(f"{name}, {part}: {number + 1} of {rounds}")
    compared = seconds if backend.place.on_gpu else processor
    backend.close()
    return {
        "seconds": seconds,
        "compared": compared,
        "sequences": n,
        "tokens": tokens,
        "others": noise.share(),
    }


def main() -> None:
    from emlocal.measure import speed_ratio

    chosen = arguments(__doc__ or "", parts=("alone", "together"), rounds=6, tokens=16)
    results: dict[str, Any] = {}
    rows = []
    for model in chosen.model:
        for part in chosen.part:
            found = measure(model, part, chosen.rounds, chosen.tokens)
            results[f"{model}, {part}"] = found
            compared = found["compared"]
            seconds, drawn = found["seconds"], found["sequences"] * found["tokens"]
            speeds = [f"{drawn / statistics.median(seconds[side]):.2f}" for side in SIDES]
            ratios = [
                speed_ratio(compared["on"], compared["off"]),
                speed_ratio(compared["off"], compared["mlx-lm"]),
            ]
            rows.append((model, found["sequences"], *speeds, *ratios, f"{found['others']:.0%}"))
    columns = ("model", "at once", "on tok/s", "off tok/s", "mlx-lm tok/s", "on/off", "off/mlx-lm", "others")
    report(results, columns, rows, chosen.json)


if __name__ == "__main__":
    main()
