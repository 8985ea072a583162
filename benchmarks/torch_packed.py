"""Measures what packed linear layers gain on a CPU with bfloat16: steps of 1 to 50 sequences, and prompts.

The same model runs twice, as loaded and packed, on one thread. A round times both in random order, in
processor seconds, which other processes change less than the clock. The figures are the rounds' ratios, plain
/ packed. The logits are compared too.
"""

import random
import time
from collections.abc import Callable

from common import MODELS, arguments, report, say

SIZES = (1, 4, 16, 50)
PROMPT, PROMPTS = 60, 10


def main() -> None:
    options = arguments(__doc__ or "", rounds=9)
    import numpy as np
    import torch

    from emlocal.backends.base import Feed, LoadOptions
    from emlocal.backends.torch.backend import TorchBackend, open_folder, open_model
    from emlocal.backends.torch.model import can_pack
    from emlocal.models.resolve import GGUFModel, resolve
    from emlocal.models.unpacked import unpack

    if not can_pack(torch.device("cpu"), torch.bfloat16):
        raise SystemExit("this processor, or this torch, has no bfloat16 products to pack for")
    load = LoadOptions(context=128, sequences=max(SIZES), shared=False, threads=1)
    rng = np.random.default_rng(0)

    def step(engine: TorchBackend, size: int) -> Callable[[], None]:
        def once() -> None:
            for sequence in range(size):
                engine.trim(sequence, 2)
            engine.forward([Feed(sequence, [7]) for sequence in range(size)])

        return once

    def read(engine: TorchBackend) -> Callable[[], None]:
        def once() -> None:
            for sequence in range(PROMPTS):
                engine.trim(sequence, 0)
            engine.forward([Feed(sequence, prompt, wanted=False) for sequence in range(PROMPTS)])

        return once

    def seconds(function: Callable[[], None]) -> float:
        started = time.thread_time()
        function()
        return time.thread_time() - started

    results, rows = {}, []
    for name in options.model:
        model = resolve(str(MODELS[name]))
        assert isinstance(model, GGUFModel)
        folder = unpack(model)
        plain = open_model(folder, device="cpu", dtype="bfloat16").backend(load)
        packed = open_folder(folder, load, device="cpu", dtype="bfloat16")
        prompt = rng.integers(100, 20_000, PROMPT).tolist()
        for engine in (plain, packed):
            for _ in range(max(SIZES)):
                engine.forward([Feed(engine.open(), prompt[:2], wanted=False)])
        for what, make in (*((f"step of {n}", lambda e, n=n: step(e, n)) for n in SIZES), ("prompts", read)):
            times = {"plain": [], "packed": []}
            functions = {"plain": make(plain), "packed": make(packed)}
            for function in functions.values():
                function()
            for _ in range(options.rounds):
                for side in random.sample(sorted(functions), 2):
                    times[side].append(seconds(functions[side]))
            ratios = np.divide(times["plain"], times["packed"])
            low, middle, high = np.quantile(ratios, [0.025, 0.5, 0.975])
            both = [1000 * float(np.median(times[side])) for side in ("plain", "packed")]
            results[f"{name}, {what}"] = {"ms": both, "ratios": ratios.tolist()}
            rows.append([name, what, *(f"{ms:.1f}" for ms in both), f"{middle:.2f} [{low:.2f}, {high:.2f}]"])
            say(f"{name}, {what}: {middle:.2f}")
        sides = []
        for engine in (plain, packed):
            step(engine, 4)()
            sides.append(engine.logits(0))
        results[f"{name}, largest difference of logits"] = float(np.abs(sides[0] - sides[1]).max())
        rows.append([name, "largest difference of logits", "", "", f"{np.abs(sides[0] - sides[1]).max():g}"])
        plain.close()
        packed.close()
    report(results, ["model", "", "plain, ms", "packed, ms", "plain / packed"], rows, options.json)


if __name__ == "__main__":
    main()
