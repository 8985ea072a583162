"""`emlocal plot`: how training runs went, as a picture."""

from pathlib import Path
from typing import Annotated

import typer

from emlocal import console


def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders of finetune or rl; several are drawn together.", metavar="RUN…"),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="A .png, .svg or .pdf file.", metavar="FILE")
    ],
) -> None:
    """Draw entropy, reward, KL, length and repetition of training runs over their steps."""
    from emlocal.plotting.runs import draw_runs, read_runs

    draw_runs(read_runs(runs), output)
    console.note(f"drawn: {output}")
