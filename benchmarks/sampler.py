"""Measures the sampler on one row, for each EM setting and in plain numpy, on rows of real answers.

The figure is the mean over the rows of each row's median over the sweeps, in microseconds (emlocal.measure).
A sweep visits all rows in turn, so that no row is still in the inner caches.
"""

from dataclasses import asdict
from typing import Any

from common import Noise, arguments, report, running_on, say, wait_until_quiet


def settings() -> dict[str, Any]:
    """Returns the presets with their sampling settings, and adaptive temperature."""
    from emlocal.settings import EM_PRESETS, AdaptiveTemperature, SamplingParams

    presets = {name: SamplingParams(em=step, **sampling) for name, (step, sampling) in EM_PRESETS.items()}
    return presets | {"adaptive temperature": SamplingParams(em=AdaptiveTemperature())}


def measure(model: str, count: int, sweeps: int) -> dict[str, Any]:
    from emlocal.measure import measure_sampler, recorded_rows
    from emlocal.settings import SamplingParams

    with running_on(model) as running:
        rows = recorded_rows(running, SamplingParams(), rows=count, seed=0)
    found: dict[str, Any] = {"vocabulary": len(rows[0]), "rows": count, "settings": {}}
    for name, params in settings().items():
        wait_until_quiet(120)
        noise = Noise()
        times = measure_sampler(rows, params, sweeps=sweeps)
        found["settings"][name] = asdict(times) | {"others_used": noise.share()}
        say(f"{model}, {name}: {times.on:.0f} µs")
    return found


def main() -> None:
    chosen = arguments(__doc__ or "", rows=128, sweeps=9)
    results = {m: measure(m, chosen.rows, chosen.sweeps) for m in chosen.model}
    columns = (
        "model",
        "V",
        "n",
        "EM",
        "off µs",
        "on µs",
        "numpy µs",
        "speed, on : numpy",
        "paths (rows: µs)",
        "others",
    )
    rows = []
    for model, found in results.items():
        for name, t in found["settings"].items():
            ratio = t["plain_over_on"]
            paths = "; ".join(f"{p['name']} ({p['rows']}: {p['microseconds']:.0f})" for p in t["paths"])
            spread = f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
            means = [f"{t[way]:.0f}" for way in ("off", "on", "plain")]
            rows.append(
                (
                    model,
                    f"{found['vocabulary']:,}",
                    found["rows"],
                    name,
                    *means,
                    spread,
                    paths,
                    f"{t['others_used']:.0%}",
                )
            )
    report(results, columns, rows, chosen.json)


if __name__ == "__main__":
    main()
