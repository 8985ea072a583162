"""Training runs over their steps: entropy, reward, KL to the base, length, repetition."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emlocal.errors import EmlocalError, UsageError
from emlocal.plotting.reading import finite, labels


@dataclass(frozen=True)
class Panel:
    """A figure of a line of metrics."""

    name: str
    title: str
    unit: str
    scale: float = 1.0

    @property
    def from_zero(self) -> bool:
        """Whether the axis begins at 0; rewards may be negative."""
        return self.name != "reward"


PANELS = (
    Panel("entropy", "Entropy of the answers", "nats a token"),
    *(Panel("reward", "Reward", unit) for unit in ("nats", "share", "weighted sum", "")),
    Panel("kl", "KL to the base", "nats a token"),
    Panel("length", "Length of the answers", "tokens"),
    Panel("repetition", "Repeated text", "%", 100),
)


@dataclass(frozen=True)
class RunMetrics:
    """What a run has written so far."""

    label: str
    rows: tuple[dict[str, Any], ...]
    reward: str = ""
    """The unit of its reward: runs of different ones have no axis in common."""

    def line(self, panel: Panel) -> tuple[list[int], list[float]]:
        """Steps and numbers, of the steps that have one."""
        if panel.name == "reward" and panel.unit != self.reward:
            return [], []
        found = [(row["step"], finite(row.get(panel.name))) for row in self.rows]
        known = [(step, panel.scale * n) for step, n in found if n is not None]
        return [step for step, _ in known], [n for _, n in known]


def panels_of(runs: Sequence[RunMetrics]) -> list[Panel]:
    """The panels that any of the runs has a number for.

    Raises UsageError where there is none.
    """
    found = [panel for panel in PANELS if any(run.line(panel)[0] for run in runs)]
    if not found:
        raise UsageError(f"the metrics of {runs[0].label} have no number to draw")
    return found


def read_runs(folders: Sequence[Path]) -> list[RunMetrics]:
    """The metrics of runs, labelled by as much of their paths as tells them apart.

    A torn last line, of a run that is being written, is left out.

    Raises UsageError for a folder that holds no run, or one that has no metrics yet.
    """
    pairs = zip(labels(folders, "a run"), folders, strict=True)
    return [RunMetrics(label, _rows(folder), _reward(folder)) for label, folder in pairs]


def _reward(folder: Path) -> str:
    """The unit of a run's reward, as far as its run.json tells."""
    try:
        ((name, _), *more) = json.loads((folder / "run.json").read_text("utf-8"))["settings"]["reward"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    if more:
        return "weighted sum"
    return "nats" if name in ("token", "sequence", "self-certainty") else "share"


def _rows(folder: Path) -> tuple[dict[str, Any], ...]:
    path = folder / "metrics.jsonl"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{folder} holds no run: there is no {path.name}", "give what -o of finetune or rl was"
        ) from None
    except OSError as why:
        raise EmlocalError(f"cannot read {path}: {why.strerror or why}") from why
    rows: list[dict[str, Any]] = []
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines) and line.startswith("{"):
                break
            raise UsageError(
                f"{path} is no file of metrics, or damaged: line {number:,} is no JSON"
            ) from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UsageError(f"{path} holds no metrics of a run", "give what -o of finetune or rl was")
        rows.append(row)
    if not rows:
        raise UsageError(f"the run in {folder} has no metrics yet", "wait for its first step")
    return tuple(rows)
