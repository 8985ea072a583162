"""`emlocal eval`: ways of answering compared on problems with known answers."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import typer

from emlocal import console
from emlocal.cli.options import EMOptions, EngineOptions, SamplingOptions, with_options
from emlocal.errors import CancelledError

if TYPE_CHECKING:
    from emlocal.cli.precedence import Config
    from emlocal.evaluation.report.document import Document
    from emlocal.evaluation.runner import Base


@dataclass(frozen=True)
class EvalOptions:
    """What is asked, and what becomes of it."""

    data: Annotated[
        Path | None,
        typer.Option("--data", help="Problems, .jsonl or .json; without it, from the hub.", metavar="FILE"),
    ] = None
    targets: Annotated[
        Path | None,
        typer.Option(
            "--targets", help="SciCode's test_data.h5, for problems without gold code.", metavar="FILE"
        ),
    ] = None
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first N problems.", metavar="N")] = (
        None
    )
    samples: Annotated[
        int, typer.Option("-n", "--samples", help="Answers to each: mean@N and pass@k.", metavar="N")
    ] = 1
    system: Annotated[
        str | None, typer.Option("--system", help="System message, instead of the task's.", metavar="TEXT")
    ] = None
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder. (default: eval-TASK-MODEL)", metavar="DIR")
    ] = None
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run code that the model writes, contained.")
    ] = False
    code_seconds: Annotated[
        float | None,
        typer.Option("--code-seconds", help="For such a program. (default: 10; scicode 300)", metavar="X"),
    ] = None
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Go on with answers that are there, or begin anew.")
    ] = True
    parallel: Annotated[
        int | None,
        typer.Option("--parallel", help="Sequences at once. (default: 16, or as memory allows)", metavar="N"),
    ] = None
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only the table.")] = False


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
            help="Such as greedy,sample:1,em-inf,em-inf:paper,self-consistency:4. The others are held against"
            " the first.",
            metavar="LIST",
        ),
    ] = "greedy,sample,em-inf",
    how: EvalOptions = EvalOptions(),
    sampling: SamplingOptions = SamplingOptions(),
    engine: EngineOptions = EngineOptions(),
) -> None:
    """Compare ways of answering on problems with known answers: accuracy, cost, and how sure that is.

    All methods have the same engine, prompts and draws. What is there is not answered again: a killed run
    goes on, and methods can be added. The folder gets results.json, results.md and report.html.
    """
    from emlocal.cli import precedence
    from emlocal.cli.views import open_for_batch
    from emlocal.evaluation.runner import Setup, prepare

    config = precedence.read_config()
    asked = {name: value for name, value in vars(how).items() if name != "quiet"}
    prepared = prepare(Setup(task, methods, **asked), lambda own: _base(sampling, config, own))
    options = precedence.merged(engine, config.engine)
    with open_for_batch(options, how.parallel, quiet=how.quiet) as loaded:
        try:
            with _Progress(how.quiet) as progress:
                done = prepared.carry_out(loaded, progress)
        except CancelledError:
            if not how.quiet:
                console.note("stopped; the same command goes on where it stopped")
            raise
    _show(done.document)
    for text in done.warnings:
        console.warn(text)
    if done.others:
        console.note(f"not reported, since --methods does not name them: {', '.join(done.others)}")
    if not how.quiet:
        console.note(f"{done.folder}: results.json, results.md, report.html, and all answers")


def _base(sampling: SamplingOptions, config: "Config", model: Mapping[str, float]) -> "Base":
    """What all methods begin with, and which of it was set on purpose. EM is for methods to say."""
    from emlocal.batch.overrides import Plan
    from emlocal.cli import precedence

    plain = replace(config, em=EMOptions())
    resolved = precedence.sampling(sampling, EMOptions(), plain, model)
    chosen = frozenset(name for name, source in resolved.sources.items() if source in ("flag", "config"))
    given = precedence.merged(sampling, config.sampling).seed
    seed = 0 if given is None else precedence.seed(sampling, config.sampling)
    max_tokens, stop = precedence.limits(sampling, config.sampling)
    return Plan(resolved.params, max_tokens, stop, seed, 1), chosen


class _Progress:
    """A bar for each thing that is done, or a line now and then. A context, which ends the last one."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._what = ""
        self._shown = ExitStack()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self._shown.close()
            self._what, self._show = what, self._shown.enter_context(console.counting(total, self._quiet))
        self._show(done, what)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *why: object) -> None:
        self._shown.close()


def _show(document: "Document") -> None:
    """The table, on stdout."""
    from rich.table import Table

    from emlocal.evaluation.report import texts

    table = Table(box=None, pad_edge=False)
    for i, head in enumerate(texts.columns(document)):
        table.add_column(head, justify="left" if i == 0 else "right", overflow="fold")
    for row in texts.rows(document):
        table.add_row(*row)
    console.out().print(table, markup=False)
