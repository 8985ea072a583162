"""Training runs over their steps: entropy, reward, KL to the base, length, repetition."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emlocal.errors import BackendError, EmlocalError, UsageError
from emlocal.files import atomic_path

FORMATS = (".png", ".svg", ".pdf")
WIDTH, HEIGHT = 4.2, 2.7
"""Of a panel, inches."""


@dataclass(frozen=True)
class Panel:
    """A figure of a line of metrics."""

    name: str
    title: str
    unit: str
    scale: float = 1.0


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
        found = [(row["step"], row.get(panel.name)) for row in self.rows]
        known = [(step, panel.scale * n) for step, n in found if isinstance(n, int | float)]
        return [step for step, _ in known], [n for _, n in known]


def read_runs(folders: Sequence[Path]) -> list[RunMetrics]:
    """The metrics of runs, labelled by as much of their paths as tells them apart.

    A torn last line, of a run that is being written, is left out.

    Raises UsageError for a folder that holds no run, or one that has no metrics yet.
    """
    labels = _labels([folder.resolve() for folder in folders])
    pairs = zip(labels, folders, strict=True)
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
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UsageError(f"{path} holds no metrics of a run", "give what -o of finetune or rl was")
        rows.append(row)
    if not rows:
        raise UsageError(f"the run in {folder} has no metrics yet", "wait for its first step")
    return tuple(rows)


def _labels(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as make them different."""
    if len(set(folders)) < len(folders):
        raise UsageError("a run is given twice", "give each folder once")
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        labels = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(labels)) == len(labels):
            break
    return labels


def draw_runs(runs: Sequence[RunMetrics], path: Path) -> None:
    """Write a figure of all runs, a panel for each thing that any of them measured.

    Raises UsageError for a file that is no .png, .svg or .pdf, BackendError where matplotlib is missing,
    EmlocalError where the file cannot be written.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{path} is no picture", f"give a name that ends in {', '.join(FORMATS)}")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as why:
        raise BackendError("figures need the package matplotlib", "pip install 'emlocal[plot]'") from why
    panels = [panel for panel in PANELS if any(run.line(panel)[0] for run in runs)]
    columns = min(len(panels), 3 if len(panels) > 4 else 2)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows + 0.4), layout="constrained")
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        for k, run in enumerate(runs):
            steps, numbers = run.line(panel)
            if steps:
                axes.plot(steps, numbers, marker=".", label=run.label, color=f"C{k}")
        axes.set_title(panel.title, loc="left", fontsize=11)
        axes.set_ylabel(panel.unit)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if panel.name != "reward":
            axes.set_ylim(bottom=0)
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=min(4, len(handles)),
        frameon=False,
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lower().removeprefix("."), dpi=150)
