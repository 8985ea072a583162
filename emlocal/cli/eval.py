"""The command `emlocal eval`: compares methods of answering on problems with known answers."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Self

import typer

from emlocal import console
from emlocal.cli.options import open_for_batch, with_options
from emlocal.errors import CancelledError
from emlocal.evaluation.contenders import EvalOptions
from emlocal.settings import Given, resolve_settings
from emlocal.settings.confidence import CALIBRATION, ConfidenceOptions
from emlocal.settings.em import EM
from emlocal.settings.options import NO_GUESSES, EngineOptions
from emlocal.settings.resolve import SAMPLING
from emlocal.settings.table import NOTHING, options_of

_COVERAGES = (0.2, 0.5, 0.8, 1.0)
"""Coverages in the table on the screen."""

if TYPE_CHECKING:
    from emlocal.evaluation.report.document import Document
    from emlocal.methods.confidence import Calibration


@with_options
def eval(
    task: Annotated[
        str,
        typer.Option(
            "--task",
            help="gsm8k, math500, amc, aime, minerva, olympiadbench, humaneval, leetcode, scicode;"
            " questions: any file.",
        ),
    ],
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            help="Compare these methods with the first, such as greedy,em-inf:paper,vote:8.",
            metavar="LIST",
        ),
    ] = "greedy,sample,em-inf",
    how: EvalOptions = EvalOptions(),
    given: Annotated[Given, CALIBRATION, SAMPLING, NO_GUESSES] = NOTHING,
) -> None:
    """Compare decoding methods: accuracy with confidence intervals, and cost.

    All methods share the engine, prompts and draws. Existing answers are kept: a killed run resumes, and
    methods can be added. The output folder gets results.json, results.md and report.html.
    """
    from emlocal.evaluation.preparation import prepare
    from emlocal.settings.resolve import read_config

    config = {name: value for name, value in read_config().items() if name not in EM.settings}
    layers = ("flag", given), ("config", config)  # only methods set EM
    # not from the config: one calibration for all methods would be a mistake
    calibration = options_of(ConfidenceOptions, ("flag", given)).calibration
    prepared = prepare(task, methods, how, resolve_settings(*layers), calibration)
    with open_for_batch(options_of(EngineOptions, *layers), how.parallel, quiet=how.quiet) as loaded:
        try:
            with _Progress(how.quiet) as progress:
                done = prepared.carry_out(loaded, progress, _no_note if how.quiet else console.note)
        except CancelledError:
            if not how.quiet:
                console.note("stopped; run the same command to resume")
            raise
    _show(done.document)
    if not how.quiet:
        from emlocal.evaluation.report.texts import LEGEND

        console.note(LEGEND)
    for text in done.warnings:
        console.warn(text)
    if done.others:
        console.note(f"not in the report, because --methods does not name them: {', '.join(done.others)}")
    if done.calibration is not None and not how.quiet:
        console.note(_calibrated(done.calibration))
    if not how.quiet:
        console.note(f"{done.folder} has results.json, results.md, report.html and all answers")


def _no_note(text: str) -> None:
    """For --quiet."""


class _Progress:
    """Shows a bar for each activity, or a line now and then.

    It is a context manager; leaving it ends the last bar.
    """

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._what = ""
        self._shown = ExitStack()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self._shown.close()
            self._what = what
            self._show = self._shown.enter_context(console.counting(total, self._quiet, what))
        self._show(done, "")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *why: object) -> None:
        self._shown.close()


def _calibrated(found: "Calibration") -> str:
    """Describes a fitted calibration in a line."""
    from emlocal.methods.confidence import METHOD, Platt

    on, errs = found.fitted_on, found.cross_fitted
    kind = "Platt's curve" if isinstance(found.curve, Platt) else "isotonic"
    score = "the method's own confidence" if found.score == METHOD else found.score
    return (
        f"{found.path}: {kind} on {score}, {on['answers']:,} answers, {on['right']:,} right; on questions it"
        f" was not fitted on AUROC {errs.get('auroc', math.nan):.2f}, calibration error"
        f" {errs['calibration_error']:.3f}"
    )


def _show(document: "Document") -> None:
    """Prints the tables to stdout."""
    from emlocal.evaluation.report import texts

    _show_table(texts.columns(document), texts.rows(document))
    if document.confidence:
        console.out().print()
        _show_table(
            texts.confidence_columns(_COVERAGES), texts.confidence_rows(document, _COVERAGES), words=2
        )


def _show_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> None:
    """Prints a table; `words`: the number of text columns, which come before those of numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i < words else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.out().print(table, markup=False)
