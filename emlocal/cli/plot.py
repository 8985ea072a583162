"""`emlocal plot`: training runs, evaluations and traces, as a picture or on the terminal."""

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from emlocal import console
from emlocal.errors import UsageError

_NARROWEST = 40  # columns; a narrower terminal breaks the lines


def plot(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of finetune or rl, folders of eval, or files of generate --trace; several of a kind"
            " are drawn together.",
            metavar="PATH…",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="A .png, .svg or .pdf file. (default: on the terminal)",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Draw training runs, evaluations or traces: a picture with -o, else on the terminal.

    Runs: entropy, reward, KL, length, repetition. Evaluations: accuracy
    with intervals, and cost. Traces: the entropy of each token before and
    after EM, and which tokens EM changed.
    """
    from emlocal.plotting import screen_lines, write_picture

    if output is not None:
        write_picture(paths, output)
        console.note(f"drawn: {output}")
        return
    _check_encoding()
    width = max(_NARROWEST, shutil.get_terminal_size().columns)
    for line in screen_lines(paths, width, colours=console.colours_allowed(sys.stdout)):
        line.rstrip()
        console.out().print(line, width=width, soft_wrap=False)


def _check_encoding() -> None:
    """Raise UsageError where stdout cannot show blocks and braille."""
    try:
        "█░⣿●".encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        raise UsageError(
            f"a plot is of characters that stdout's encoding, {sys.stdout.encoding}, does not have",
            "set PYTHONIOENCODING=utf-8, or draw a picture: -o plot.png",
        ) from None
