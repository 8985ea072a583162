"""The lines of metrics that a run of training leaves."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def timeless(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What two equal runs have in common: all but seconds, and tokens in one."""
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows]
