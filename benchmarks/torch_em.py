"""Measures EM-INF's step on a batch, V = 151,936: the torch engine against the authors' code.

Theirs loops over tokens, with a parameter, torch.optim.Adam and autograd through the entropy for each. Ours
takes the whole batch at once, in float64, by gradient descent in closed form. Both take the same number of
steps. A round times both in random order; the figures are the rounds' ratios. Runs on CUDA if there is a
device (batch 64), otherwise on the CPU (batch 4). Does not need the bench models.
"""

import random
import time
from collections.abc import Callable

from common import arguments, circumstances, report

VOCABULARY, STEPS, THRESHOLD, RATE = 151_936, 5, 0.0, 0.1


def main() -> None:
    options = arguments(__doc__ or "", rounds=15)
    import numpy as np
    import torch
    from torch import Tensor

    from emlocal.backends.torch.sampler import Compiled, Descent, descend, gradient_descent

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    batch = 64 if cuda else 4
    logits = 3 * torch.randn(batch, VOCABULARY, generator=torch.Generator().manual_seed(0)).to(device)
    column = torch.ones(batch, 1, dtype=torch.float64, device=device)
    settings = Descent(THRESHOLD * column, STEPS * column, RATE * column, 0 * column)
    step = Compiled() if cuda else descend

    @torch.inference_mode()
    def ours() -> Tensor:
        return gradient_descent(logits.double(), settings, STEPS, step).z

    def theirs() -> list[Tensor]:
        return [per_token(row) for row in logits]

    def per_token(row: Tensor) -> Tensor:
        z = torch.nn.Parameter(row.clone())
        optimizer = torch.optim.Adam([z], lr=RATE)
        for _ in range(STEPS):
            optimizer.zero_grad()
            p = z.softmax(-1)
            loss = -(p * torch.log(p + 1e-12)).sum()
            loss.backward()
            optimizer.step()
        return z.detach()

    def seconds(function: Callable[[], object]) -> float:
        started = time.perf_counter()
        function()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    for function in (ours, theirs):  # compiles, and warms up the allocator
        seconds(function)
    ratios, milliseconds = [], []
    for _ in range(options.rounds):
        order = [ours, theirs]
        random.shuffle(order)
        took = {function: seconds(function) for function in order}
        ratios.append(took[theirs] / took[ours])
        milliseconds.append(1000 * took[ours])
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    name = torch.cuda.get_device_name() if cuda else circumstances()["machine"]["cpu"]
    result = {
        "device": name,
        "batch": batch,
        "rounds": len(ratios),
        "ours_ms": float(np.median(milliseconds)),
        "ratio": float(np.median(ratios)),
        "interval": [float(low), float(high)],
        "torch": torch.__version__,
    }
    row = (
        name,
        batch,
        len(ratios),
        f"{result['ours_ms']:.1f}",
        f"{result['ratio']:.2f}",
        f"{low:.2f}–{high:.2f}",
    )
    columns = ("device", "batch", "n", "ours, ms (median)", "theirs ÷ ours (median)", "95 % (bootstrap)")
    report(result, columns, [row], options.json)


if __name__ == "__main__":
    main()
