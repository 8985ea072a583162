"""A run of `emlocal finetune`, and what it left behind."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cli.conftest import Outcome

Emlocal = Callable[..., Outcome]
Finetune = Callable[..., Outcome]
ROW = re.compile(r" +(\d+)/(\d+) +\d+\.\d{4} +(\d\.\d{4})? .*%.*\d\.\d$")
"""A line of the table."""


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
