"""The fused EM-FT loss against logits in full and autograd: time and peak extra memory, forward and backward.

Each way runs in a process of its own for the memory (its peak less what it had before), and both
alternate in one process for the time. Shapes: 2,048 tokens, V = 151,936, hidden 896 (Qwen2.5-0.5B's).
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

from common import Noise, arguments, report, say, wait_until_quiet

TOKENS, VOCABULARY, HIDDEN = 2048, 151_936, 896
BETAS = (0.0, 1.5)


def inputs() -> tuple[Any, Any, Any, Any]:
    import torch

    random = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = torch.randn(TOKENS, HIDDEN, generator=random).to(device).requires_grad_()
    base = torch.randn(TOKENS, HIDDEN, generator=random).to(device)
    head = (0.05 * torch.randn(VOCABULARY, HIDDEN, generator=random)).to(device)
    return hidden, base, head, torch.full((TOKENS,), 1 / TOKENS, device=device)


def naive(hidden: Any, base: Any, head: Any, weights: Any, beta: float) -> None:
    import torch

    log_p = (hidden @ head.T).log_softmax(-1)
    p = log_p.exp()
    loss = -(p * log_p).sum(-1)
    if beta:
        with torch.no_grad():
            log_p0 = (base @ head.T).log_softmax(-1)
        loss = loss + beta * (p * (log_p - log_p0)).sum(-1)
    (weights * loss).sum().backward()


def fused(hidden: Any, base: Any, head: Any, weights: Any, beta: float) -> None:
    from emlocal.backends.torch.objective import em_ft_loss

    em_ft_loss(hidden, head, weights, base_hidden=base if beta else None, beta=beta).loss.backward()


WAYS = {"naive": naive, "fused": fused}


def peak(way: str, beta: float) -> int:
    """Bytes beyond what was there before, in this process."""
    import torch

    tensors = inputs()
    (tensors[0][:8] @ tensors[2].T).sum()  # what the libraries take for themselves
    if tensors[0].device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        WAYS[way](*tensors, beta)
        return torch.cuda.max_memory_allocated() - before
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    WAYS[way](*tensors, beta)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def seconds(way: str, tensors: Any, beta: float) -> float:
    import torch

    tensors[0].grad = None
    if tensors[0].device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    WAYS[way](*tensors, beta)
    if tensors[0].device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(beta: float, rounds: int) -> dict[str, Any]:
    memory = {}
    for way in WAYS:
        done = subprocess.run(
            [sys.executable, __file__, "--peak", way, str(beta)], capture_output=True, text=True, check=True
        )
        memory[way] = int(json.loads(done.stdout))
    tensors = inputs()
    seconds("fused", tensors, beta)
    wait_until_quiet(120)
    noise = Noise()
    pairs = []
    for _ in range(rounds):
        pairs.append({way: seconds(way, tensors, beta) for way in WAYS})
        say(f"β {beta:g}: naive {pairs[-1]['naive']:.2f} s, fused {pairs[-1]['fused']:.2f} s")
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
        print(peak(sys.argv[2], float(sys.argv[3])))
        return
    chosen = arguments(__doc__ or "", rounds=7)
    results = {f"{beta:g}": measure(beta, chosen.rounds) for beta in BETAS}
    columns = (
        "β",
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
            beta,
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
        for beta, r in results.items()
    ]
    report(results, columns, rows, chosen.json)


if __name__ == "__main__":
    main()
