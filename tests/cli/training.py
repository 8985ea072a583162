"""Helpers for the tests of `emlocal finetune` and `emlocal rl`."""

import json
from pathlib import Path
from typing import Any

from tests.cli.conftest import Outcome


def error_of(outcome: Outcome) -> str:
    """Returns the one line of the error."""
    (line,) = (line for line in outcome.err.splitlines() if line.startswith("error: "))
    assert "Traceback" not in outcome.err
    return line


def settings_in(out: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((out / "run.json").read_text())["settings"]
    return settings
