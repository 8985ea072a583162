"""EM-INF with Adam compared with torch's own Adam and autograd, with the authors' loss and settings."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from emlocal.em.fast import adam_descent, gradient_descent
from emlocal.em.split import CUTOFFS, Splitter
from emlocal.em.steps import EMInf
from tests.em.fast_path import probabilities, sharpen, softmax


def authors(row: np.ndarray, dtype: torch.dtype, settings: EMInf) -> tuple[np.ndarray, int]:
    """Computes the released code's loss on one row: entropy + κ·KL(p⁰ ‖ p), with the stop before a step."""
    logits = torch.nn.Parameter(torch.tensor(row, dtype=dtype))
    p0 = functional.softmax(logits, dim=-1).detach()
    make = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.SGD
    optimizer = make([logits], lr=settings.learning_rate)
    steps = 0
    for _ in range(settings.steps):
        p = functional.softmax(logits, dim=-1)
        entropy = -(p * torch.log(p + 1e-12)).sum()
        if entropy < settings.threshold:
            break
        kl = functional.kl_div(functional.log_softmax(logits, -1)[None], p0[None], reduction="batchmean")
        optimizer.zero_grad()
        (settings.kl_weight * kl + entropy).backward()
        optimizer.step()
        steps += 1
    return functional.softmax(logits, dim=-1).detach().double().numpy(), steps


RELEASED = EMInf(threshold=0.3, steps=3, learning_rate=0.1, optimizer="adam", kl_weight=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "settings", [RELEASED, EMInf(0.3, 5, 1.0), EMInf(0.1, 4, 0.5, "sgd", 0.2)], ids=["em-pt", "sgd", "sgd+kl"]
)
def test_the_reference_and_the_fast_path_follow_torch(recorded, dtype, settings) -> None:
    moved = 0
    for row in recorded:
        expected, steps = authors(row, dtype, settings)
        reference = settings.apply(row)
        assert reference.steps == steps
        np.testing.assert_allclose(softmax(reference.logits), expected, atol=1e-4)
        splitter = Splitter(len(row))
        answers = ((split, sharpen(split, settings)) for split in (splitter.split(row, c) for c in CUTOFFS))
        split, fast = next(pair for pair in answers if pair[1] is not None)
        assert fast.steps == steps
        np.testing.assert_allclose(probabilities(split, fast), expected, atol=1e-4)
        moved += steps > 0
    assert moved >= 3  # three of the six rows are above δ


def test_sharpen_takes_the_optimizer_asked_for(smollm2_rows) -> None:
    split = Splitter(smollm2_rows.shape[1]).split(smollm2_rows[4])
    sgd, adam = (EMInf(0.3, 2, 0.1, optimizer) for optimizer in ("sgd", "adam"))
    assert sharpen(split, sgd).entropy_after == gradient_descent(split, sgd).entropy_after
    assert sharpen(split, adam).entropy_after == adam_descent(split, adam).entropy_after
    assert sharpen(split, adam).entropy_after < sharpen(split, sgd).entropy_after - 0.01
