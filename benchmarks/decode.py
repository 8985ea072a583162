"""Measures decoding with EM off, with EM on and in a bare llama.cpp loop, in rounds of equal work.

A round counts only if other processes used less than 5 % of the processor meanwhile; its own times do not
decide that. Rounds that do not count are repeated, up to `--tries` times as many in all.
"""

import sys
from dataclasses import asdict
from typing import Any

from common import QUIET, Noise, arguments, report, running_on, say, wait_until_quiet


def measure(model: str, rounds: int, tokens: int, tries: int) -> dict[str, Any]:
    from emlocal.measure import Decoding, decode_round
    from emlocal.settings import EMInf, SamplingParams

    params = SamplingParams(em=EMInf())
    kept, dropped = Decoding(tokens), 0
    with running_on(model) as running:
        decode_round(Decoding(4), running, params, number=0, seed=1)  # warms up
        for number in range(rounds * tries):
            wait_until_quiet(60)
            noise, one = Noise(), Decoding(tokens)
            decode_round(one, running, params, number=number, seed=0)
            if noise.share() > QUIET:
                dropped += 1
                continue
            for side, seconds in one.seconds.items():
                kept.seconds[side] += seconds
            kept.touched += one.touched
            say(f"{model}: {len(kept.seconds['on'])} of {rounds}, {dropped} dropped")
            if len(kept.seconds["on"]) == rounds:
                break
    if not kept.seconds["on"]:
        sys.exit(f"{model}: not one round of {dropped} was quiet enough")
    drawn = len(kept.seconds["on"]) * (tokens + 1)
    ratios = {"on/off": ("on", "off"), "off/bare": ("off", "bare"), "on/bare": ("on", "bare")}
    return {
        "rounds": len(kept.seconds["on"]),
        "dropped": dropped,
        "tokens": tokens,
        "touched": kept.touched / drawn,
        "tokens_per_second": {side: kept.speed(side) for side in kept.seconds},
        "ratios": {name: asdict(kept.ratio(*sides)) for name, sides in ratios.items()},
    }


def main() -> None:
    chosen = arguments(__doc__ or "", rounds=40, tokens=32, tries=3)
    results = {m: measure(m, chosen.rounds, chosen.tokens, chosen.tries) for m in chosen.model}
    columns = (
        "model",
        "n",
        "bare tok/s",
        "off tok/s",
        "on tok/s",
        "touched",
        "on/off",
        "off/bare",
        "on/bare",
    )
    rows = []
    for model, found in results.items():
        speeds = [f"{found['tokens_per_second'][side]:.1f}" for side in ("bare", "off", "on")]
        ratios = [f"{r['median']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for r in found["ratios"].values()]
        n = f"{found['rounds']} × {found['tokens']}"
        rows.append((model, n, *speeds, f"{found['touched']:.0%}", *ratios))
    report(results, columns, rows, chosen.json)


if __name__ == "__main__":
    main()
