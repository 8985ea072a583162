"""What the tests of `emlocal finetune` and `emlocal rl` look at."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.cli.conftest import Outcome


def error_of(outcome: Outcome) -> str:
    """The one line that says what was wrong."""
    (line,) = (line for line in outcome.err.splitlines() if line.startswith("error: "))
    assert "Traceback" not in outcome.err
    return line


def settings_in(out: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((out / "run.json").read_text())["settings"]
    return settings


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def timeless(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Metrics that two runs have in common."""
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]
