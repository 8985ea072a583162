"""What all pictures have in common: the kinds of files, an empty figure, its legend, and saving it."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from emlocal.errors import BackendError, UsageError
from emlocal.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
_DOTS = 150  # of a PNG, an inch


def check_name(path: Path) -> None:
    """Raise UsageError for a file that is no .png, .svg or .pdf."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{path} is no picture", f"give a name that ends in {', '.join(FORMATS)}")


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, of inches. Raises BackendError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as why:
        raise BackendError("figures need the package matplotlib", "pip install 'emlocal[plot]'") from why
    return Figure(figsize=(width, height), layout="constrained")


def plain_axes(axes: "Axes", title: str) -> None:
    """A title on the left, a faint grid, no frame above and to the right. Titles hold no formulas."""
    axes.set_title(title, loc="left", fontsize=11, parse_math=False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend_above(figure: "Figure", order: Sequence[str] = ()) -> None:
    """One legend for all panels, each name once; those of `order` stand in this order."""
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    handles = {name: handles[name] for name in order if name in handles} | handles
    legend = figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=min(4, len(handles)),
        frameon=False,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def save(figure: "Figure", path: Path) -> None:
    """Write the picture; an old one is replaced whole. Raises EmlocalError where it cannot be written."""
    with atomic_path(path) as temporary, warnings.catch_warnings():
        # a token in a script that the font lacks is shown as a box
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(temporary, format=path.suffix.lower().removeprefix("."), dpi=_DOTS)
