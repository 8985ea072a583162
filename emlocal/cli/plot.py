"""The command `emlocal plot`: draws runs, evaluations and traces, as a picture or on the terminal."""

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from emlocal import console
from emlocal.errors import UsageError

_NARROWEST = 40  # columns; the lines break on a narrower terminal


def plot(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Plot these folders of finetune or rl, folders of eval, or files of generate --trace."
            " Several of one kind share a plot.",
            metavar="PATH…",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Write a .png, .svg or .pdf file. (default: plot on the terminal)",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Plot training runs, evaluations or traces; with -o as a picture.

    A run's plot shows entropy, reward, KL, length and repetition. An evaluation's plot shows accuracy with
    intervals, and cost. A trace's plot shows each token's entropy before and after EM, and the tokens that
    EM changed.
    """
    from emlocal.plotting import screen_lines, write_picture

    if output is not None:
        write_picture(paths, output)
        console.note(f"plot written to {output}")
        return
    _check_encoding()
    width = max(_NARROWEST, shutil.get_terminal_size().columns)
    for line in screen_lines(paths, width, colours=console.colours_allowed(sys.stdout)):
        line.rstrip()
        console.out().print(line, width=width, soft_wrap=False)


def _check_encoding() -> None:
    """Raises UsageError if stdout's encoding lacks blocks and braille."""
    try:
        "█░⣿●".encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        raise UsageError(
            f"stdout's encoding, {sys.stdout.encoding}, lacks the characters of a plot",
            "set PYTHONIOENCODING=utf-8, or write a picture: -o plot.png",
        ) from None
