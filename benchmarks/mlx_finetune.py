"""Measures EM-FT on MLX against mlx-lm's LoRA training, and the memory of its loss against full logits.

speed: both train rank-16 adapters of all linear layers of a bench model on the same sequences of --tokens
tokens. Half of the tokens are the answer, and each sequence is an optimizer step. mlx-lm's loop
(`mlx_lm.lora`) minimises cross-entropy; the learner minimises entropy, without the KL term, which mlx-lm
lacks. Rounds of --steps steps take turns, without the first step, which compiles. If MLX runs on the CPU,
times are processor seconds, which other processes change less.

memory: 1,024 tokens, V = 151,936, hidden size 64, on which the memory of the logits does not depend.

On a Mac: python benchmarks/mlx_finetune.py --tokens 512 --steps 20
"""

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import MODELS, Noise, arguments, report, say, wait_until_quiet

ROWS, VOCABULARY, HIDDEN = 1024, 151_936, 64
Clock = Callable[[], float]


def seconds_of(on_gpu: bool) -> Clock:
    return time.perf_counter if on_gpu else time.process_time


def sequences(steps: int, tokens: int) -> list[list[int]]:
    import numpy as np

    return np.random.default_rng(0).integers(10, 40_000, (steps, tokens)).tolist()


def ours(folder: Path, rows: list[list[int]]) -> Iterator[float]:
    """Yields the seconds of each step."""
    from emlocal.backends.learner import Descent, EntropyObjective
    from emlocal.backends.mlx.backend import open_model
    from emlocal.backends.mlx.learner import MLXEntropyLearner
    from emlocal.backends.mlx.model import linear_layers
    from emlocal.training.engines import new_adapter
    from emlocal.training.rollouts import Rollout
    from emlocal.training.settings import FineTuneSettings

    opened = open_model(folder)
    adapter = new_adapter(linear_layers(opened.model), FineTuneSettings())
    learner = MLXEntropyLearner(opened.model, adapter, Descent(), EntropyObjective())
    clock = seconds_of(opened.place.on_gpu)
    for row in rows:
        half = len(row) // 2
        started = clock()
        learner.accumulate([Rollout(tuple(row[:half]), tuple(row[half:]), True, "", 0.0)], [1 / half])
        learner.update(1e-4)
        yield clock() - started


def mlx_lm(folder: Path, rows: list[list[int]], on_gpu: bool) -> list[float]:
    """Returns the seconds of each step of mlx-lm's own loop, which cannot be halted between steps."""
    from mlx.optimizers import AdamW
    from mlx_lm.tuner.trainer import TrainingArgs, TrainingCallback, train
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    from emlocal.backends.mlx.backend import choose_place
    from emlocal.models.folder import read_folder_header

    model, _ = load_model(folder)
    model.set_dtype(choose_place(read_folder_header(folder).tensors).dtype)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": 16, "scale": 2.0, "dropout": 0.0})
    clock = seconds_of(on_gpu)
    stamps = [clock()]

    class Stamp(TrainingCallback):  # type: ignore[misc]
        def on_train_loss_report(self, _: dict[str, Any]) -> None:
            stamps.append(clock())

    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(sys.stderr):
        settings = TrainingArgs(
            batch_size=1,
            iters=len(rows),
            steps_per_report=1,
            steps_per_save=10**9,
            max_seq_length=len(rows[0]),
            adapter_file=str(Path(place, "adapters.safetensors")),
        )
        data = [(row, len(row) // 2) for row in rows]
        train(model, AdamW(1e-4), data, args=settings, training_callback=Stamp())
    return [later - earlier for earlier, later in pairwise(stamps)]


def speed(name: str, steps: int, tokens: int, rounds: int) -> dict[str, Any]:
    import mlx.core as mx

    from emlocal.models.resolve import resolve
    from emlocal.models.unpacked import unpack

    folder = unpack(resolve(str(MODELS[name])))
    on_gpu = mx.is_available(mx.gpu)
    found: dict[str, list[float]] = {"emlocal": [], "mlx-lm": []}
    wait_until_quiet(10)
    noise = Noise()
    for number in range(rounds):
        rows = sequences(steps + 1, tokens)
        for side in ("emlocal", "mlx-lm") if number % 2 == 0 else ("mlx-lm", "emlocal"):
            of = list(ours(folder, rows)) if side == "emlocal" else mlx_lm(folder, rows, on_gpu)
            found[side].append(statistics.median(of[1:]))
        say(f"{name}: {number + 1} of {rounds}")
    return {"seconds": found, "others": noise.share()}


def peak(loss: Callable[[Any, Any, Any], Any]) -> int:
    """Returns the bytes that the gradient of a loss takes beside its inputs."""
    import mlx.core as mx

    keys = mx.random.split(mx.random.key(0), 2)
    hidden, head = (
        mx.random.normal((n, HIDDEN), key=key) for n, key in zip((ROWS, VOCABULARY), keys, strict=True)
    )
    weights = mx.full((ROWS,), 1 / ROWS)
    mx.eval(hidden, head, weights)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(loss(hidden, head, weights))
    return int(mx.get_peak_memory() - before)


def in_full(hidden: Any, head: Any, weights: Any) -> Any:
    import mlx.core as mx

    def loss(hidden: Any) -> Any:
        z = hidden @ head.T
        log_p = z - mx.logsumexp(z, axis=1, keepdims=True)
        return -(weights * (mx.exp(log_p) * log_p).sum(axis=1)).sum()

    return mx.grad(loss)(hidden)


def in_chunks(hidden: Any, head: Any, weights: Any) -> Any:
    from mlx.nn import Linear

    from emlocal.backends.mlx.learner import Head, em_ft_terms

    layer = Linear(HIDDEN, 1, bias=False)
    layer.weight = head
    return em_ft_terms(hidden, Head(layer), weights).gradient


def main() -> None:
    from emlocal.measure import speed_ratio

    chosen = arguments(__doc__ or "", parts=("speed", "memory"), rounds=2, steps=3, tokens=33)
    results: dict[str, Any] = {}
    rows: list[tuple[object, ...]] = []
    if "speed" in chosen.part:
        for model in chosen.model:
            found = speed(model, chosen.steps, chosen.tokens, chosen.rounds)
            results[model] = found
            of = found["seconds"]
            speeds = [f"{chosen.tokens / statistics.median(of[side]):.1f} tok/s" for side in of]
            ratio = speed_ratio(of["emlocal"], of["mlx-lm"])
            rows.append((model, *speeds, f"{ratio} as fast", f"{found['others']:.0%}"))
    if "memory" in chosen.part:
        few, many = peak(in_chunks), peak(in_full)
        results["memory"] = {"chunks": few, "in full": many}
        rows.append(("loss", f"{few / 1e6:.0f} MB", f"{many / 1e6:.0f} MB", f"{few / many:.2f} of it", ""))
    report(results, ("", "emlocal", "mlx-lm / in full", "ratio", "others"), rows, chosen.json)


if __name__ == "__main__":
    main()
