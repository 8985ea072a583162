"""Measures the fused losses of EM-FT and EM-RL against full logits and autograd: time and peak extra memory.

Times are of forward and backward. On CPUs, both ways also run with float32 matrices multiplied in bfloat16,
as `emlocal finetune` does if the processor can. For the memory, each way runs in its own process (its peak
minus its memory before). For the time, both alternate in one process. Shapes: 2,048 tokens, V = 151,936,
hidden size 896 (that of Qwen2.5-0.5B).
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Noise, arguments, report, say, wait_until_quiet

TOKENS, VOCABULARY, HIDDEN = 2048, 151_936, 896


def inputs() -> tuple[Any, Any, Any, Any]:
    import torch

    random = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = torch.randn(TOKENS, HIDDEN, generator=random).to(device).requires_grad_()
    base = torch.randn(TOKENS, HIDDEN, generator=random).to(device)
    head = (0.05 * torch.randn(VOCABULARY, HIDDEN, generator=random)).to(device)
    return hidden, base, head, torch.full((TOKENS,), 1 / TOKENS, device=device)


def naive_em_ft(hidden: Any, base: Any, head: Any, weights: Any, beta: float) -> Any:
    import torch

    log_p = (hidden @ head.T).log_softmax(-1)
    p = log_p.exp()
    loss = -(p * log_p).sum(-1)
    if beta:
        with torch.no_grad():
            log_p0 = (base @ head.T).log_softmax(-1)
        loss = loss + beta * (p * (log_p - log_p0)).sum(-1)
    return (weights * loss).sum()


def fused_em_ft(hidden: Any, base: Any, head: Any, weights: Any, beta: float) -> Any:
    from emlocal.backends.torch.policy import em_ft_loss

    return em_ft_loss(hidden, head, weights, base_hidden=base if beta else None, beta=beta).loss


def drawn(weights: Any) -> tuple[Any, Any, Any]:
    """Returns tokens, advantages, and log-probabilities that serve as both old and reference ones."""
    import torch

    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (TOKENS,), generator=random)
    advantages = torch.randn(TOKENS, generator=random)
    log_probs = torch.full((TOKENS,), -12.0)
    return tokens.to(weights.device), advantages.to(weights.device), log_probs.to(weights.device)


def naive_em_rl(hidden: Any, base: Any, head: Any, weights: Any, beta: float) -> Any:
    """Computes ppo-clip with k3, and the entropy that the token reward needs."""
    import torch

    tokens, a, old = drawn(weights)
    rows = (hidden @ head.T).log_softmax(-1)
    with torch.no_grad():
        -(rows.exp() * rows).sum(-1)
    now = rows.gather(1, tokens.unsqueeze(1)).squeeze(1)
    ratio, d = (now - old).exp(), old - now
    loss = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) + beta * (d.exp() - d - 1)
    return (weights * loss).sum()


def fused_em_rl(hidden: Any, base: Any, head: Any, weights: Any, beta: float) -> Any:
    from emlocal.backends.torch.policy import policy_gradient_loss
    from emlocal.em.losses import PolicyObjective

    tokens, advantages, old = drawn(weights)
    objective = PolicyObjective("ppo-clip", beta=beta)
    return policy_gradient_loss(
        hidden, head, tokens, advantages, weights, objective, old=old, reference=old
    ).loss


EM_FT = {"naive": naive_em_ft, "fused": fused_em_ft}
EM_RL = {"naive": naive_em_rl, "fused": fused_em_rl}
CASES: dict[str, tuple[float, dict[str, Callable[..., Any]], str]] = {
    "EM-FT, β 0": (0.0, EM_FT, "ieee"),
    "EM-FT, β 1.5": (1.5, EM_FT, "ieee"),
    "EM-RL": (0.001, EM_RL, "ieee"),
    "EM-FT, β 0, bfloat16": (0.0, EM_FT, "bf16"),
    "EM-FT, β 1.5, bfloat16": (1.5, EM_FT, "bf16"),
    "EM-RL, bfloat16": (0.001, EM_RL, "bf16"),
}
"""β, the two ways, and the number format in which a CPU multiplies float32 matrices."""


def run(case: str, way: str, tensors: Any) -> None:
    """Runs forward and backward."""
    import torch

    beta, ways, torch.backends.mkldnn.matmul.fp32_precision = CASES[case]  # type: ignore[attr-defined]
    ways[way](*tensors, beta).backward()


def peak(case: str, way: str) -> int:
    """Returns the bytes beyond those in use before, in this process."""
    import torch

    tensors = inputs()
    (tensors[0][:8] @ tensors[2].T).sum()  # lets the libraries allocate their own memory first
    if tensors[0].device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(case, way, tensors)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which making the inputs has raised
    before = _resident("VmRSS")
    run(case, way, tensors)
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    """Returns the bytes in a line of Linux's /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def seconds(case: str, way: str, tensors: Any) -> float:
    import torch

    tensors[0].grad = None
    if tensors[0].device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run(case, way, tensors)
    if tensors[0].device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(case: str, rounds: int) -> dict[str, Any]:
    memory = {}
    for way in CASES[case][1]:
        done = subprocess.run(
            [sys.executable, __file__, "--peak", case, way], capture_output=True, text=True, check=True
        )
        memory[way] = int(json.loads(done.stdout))
    tensors = inputs()
    seconds(case, "fused", tensors)
    wait_until_quiet(120)
    noise = Noise()
    pairs = []
    for _ in range(rounds):
        pairs.append({way: seconds(case, way, tensors) for way in CASES[case][1]})
        say(f"{case}: naive {pairs[-1]['naive']:.2f} s, fused {pairs[-1]['fused']:.2f} s")
    ratios = [pair["fused"] / pair["naive"] for pair in pairs]
    return {
        "device": str(tensors[0].device),
        "memory": memory,
        "naive": statistics.median(pair["naive"] for pair in pairs),
        "fused": statistics.median(pair["fused"] for pair in pairs),
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "n": rounds,
        "others_used": noise.share(),
    }


def main() -> None:
    if sys.argv[1:2] == ["--peak"]:
        print(peak(sys.argv[2], sys.argv[3]))
        return
    chosen = arguments(__doc__ or "", list(CASES), rounds=7)
    results = {case: measure(case, chosen.rounds) for case in chosen.part}
    columns = (
        "loss",
        "device",
        "naive s",
        "fused s",
        "time [range]",
        "naive MB",
        "fused MB",
        "memory",
        "n",
        "others",
    )
    rows = [
        [
            case,
            r["device"],
            f"{r['naive']:.2f}",
            f"{r['fused']:.2f}",
            f"{r['ratio']:.2f} [{r['low']:.2f}, {r['high']:.2f}]",
            f"{r['memory']['naive'] / 1e6:,.0f}",
            f"{r['memory']['fused'] / 1e6:,.0f}",
            f"{r['memory']['fused'] / r['memory']['naive']:.3f}",
            r["n"],
            f"{r['others_used']:.0%}",
        ]
        for case, r in results.items()
    ]
    report(results, columns, rows, chosen.json)


if __name__ == "__main__":
    main()
