"""The metrics of a training run."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def timeless(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns what two equal runs have in common: everything but seconds and tokens a second."""
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows]
