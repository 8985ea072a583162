"""`emlocal batch`: a file of prompts in, a file of completions out."""

import json
import os
import stat
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, TextIO

import typer

from emlocal import console
from emlocal.cli.options import (
    BatchOptions,
    calibration_in,
    check_roles,
    choose_parallel,
    open_for_batch,
    warn_of_mismatch,
    with_options,
)
from emlocal.errors import CancelledError, UsageError
from emlocal.identity import batch_identity
from emlocal.methods import HOW, Chosen, chosen_by
from emlocal.settings import Given, Resolved, resolve_settings
from emlocal.settings.confidence import CONFIDENCE, ConfidenceOptions
from emlocal.settings.em import EM
from emlocal.settings.options import ENGINE, EngineOptions
from emlocal.settings.resolve import SAMPLING
from emlocal.settings.table import NOTHING, options_of
from emlocal.text import counted, human_size

if TYPE_CHECKING:
    from emlocal.batch.journal import Journal
    from emlocal.batch.run import Batch, BatchSettings
    from emlocal.loading import Loaded


@with_options
def batch(
    input_: Annotated[str, typer.Argument(help="JSONL file, or - for stdin.", metavar="INPUT")],
    output: Annotated[
        str, typer.Option("-o", "--output", help="JSONL file; stdout without it.", metavar="OUTPUT")
    ] = "-",
    run: BatchOptions = BatchOptions(),
    how: Annotated[Given, HOW] = NOTHING,
    given: Annotated[Given, CONFIDENCE, EM, SAMPLING, ENGINE] = NOTHING,
) -> None:
    """Answer a file of prompts; killed runs go on where they stopped.

    A line is {"prompt": …}, {"messages": […]} or a line of OpenAI's batch files, and may set any sampling or
    EM value for itself. Finished rows are neither lost nor repeated, whatever stopped the run.
    """
    from emlocal.batch.lines import canonical
    from emlocal.methods.confidence import subject_of
    from emlocal.settings.resolve import read_config

    _check(input_, output, run)
    layers = ("flag", given), ("config", read_config())
    resolved = resolve_settings(*layers)
    method = chosen_by(how)
    method.plan(resolved.plan, resolved.chosen)  # what contradicts itself fails before a model is loaded
    sure = options_of(ConfidenceOptions, *layers)
    calibration = calibration_in(sure.calibration)
    with ExitStack() as opened:
        source = opened.enter_context(_source(input_))
        options = options_of(EngineOptions, *layers)
        model = opened.enter_context(open_for_batch(options, run.parallel, quiet=run.quiet))
        settings = _settings(model, resolved, method, run)
        settings = replace(settings, calibration=calibration, abstain_below=sure.abstain_below)
        warn_of_mismatch(calibration, subject_of(model.backend.info.name, method, settings.plan))
        identity = batch_identity(settings, model)
        settings = replace(settings, fingerprint=canonical(identity))
        if run.dry_run:
            code = _dry_run(model, source, settings, run)
        else:
            journal = None if output == "-" else opened.enter_context(_journal(output, identity, run))
            code = _run(model, source, journal, settings, run)
    if code:
        raise typer.Exit(code)


def _check(input_: str, output: str, run: BatchOptions) -> None:
    """Raise UsageError for what cannot be meant, before anything is loaded."""
    if run.retry_errors and (output == "-" or not run.resume):
        raise UsageError("--retry-errors needs an output to go on with (-o OUTPUT, without --restart)")
    if _is_input(output, input_):
        shown = "the output" if output == "-" else output
        raise UsageError(f"{shown} is the input: it would be overwritten", "give -o another file")
    check_roles(run.raw, run.system)
    if input_ == "-" and sys.stdin.isatty():
        raise UsageError("the input is the terminal", "give a JSONL file, or pipe one in")


def _is_input(output: str, input_: str) -> bool:
    """Whether both are one regular file, under whatever names, or redirected (`>> INPUT` would never end)."""
    written, read = _status(output, sys.stdout), _status(input_, sys.stdin)
    if written is None or read is None:
        return False
    return stat.S_ISREG(written.st_mode) and os.path.samestat(written, read)


def _status(name: str, stream: TextIO) -> os.stat_result | None:
    """Of a file, or of what "-" is redirected to; None where there is none."""
    try:
        return os.fstat(stream.fileno()) if name == "-" else Path(name).stat()
    except OSError:  # not there; or a stream without a file, in tests
        return None


def _source(input_: str) -> BinaryIO:
    if input_ == "-":
        return sys.stdin.buffer
    try:
        return Path(input_).open("rb")
    except OSError as why:
        raise UsageError(f"cannot read {input_}: {why.strerror}") from why


def _settings(model: "Loaded", resolved: Resolved, method: Chosen, run: BatchOptions) -> "BatchSettings":
    """What holds for every line. The seed is 0 where none is given: a batch is the same every time."""
    from emlocal.batch.run import BatchSettings

    resolved = resolved.with_model(model.backend.info.sampling)
    return BatchSettings(
        method.plan(resolved.plan, resolved.chosen),
        method,
        resolved.chosen,
        run.system,
        run.raw,
        run.keep,
        run.form == "openai",
        run.ordered,
    )


def _dry_run(model: "Loaded", source: BinaryIO, settings: "BatchSettings", run: BatchOptions) -> int:
    """Say what the run would be, on stdout; 1 where a line is bad."""
    from emlocal.batch.lines import read_lines
    from emlocal.batch.run import survey

    lines = _count_lines(source)
    speed = choose_parallel(
        model, run.parallel, None if lines is None else lines * settings.plan.samples, quiet=run.quiet
    )
    with console.counting(None) as show:
        found = survey(
            model.backend,
            read_lines(source),
            settings,
            speed=speed,
            progress=lambda n: show(n, "lines checked"),
        )
    half, most = found.quantile(0.5), found.quantile(1.0)
    rows = [
        ("lines", f"{found.lines:,}"),
        ("bad lines", f"{found.bad_lines:,}"),
        ("do not fit the context", f"{found.refused:,} (of {model.backend.context:,} tokens)"),
        ("may be cut off", f"{found.may_be_cut_off:,} (less than --max-tokens fit after the prompt)"),
        ("prompt tokens", f"{found.prompt_tokens:,} (median {half:,}, longest {most:,})"),
        ("generated at most", f"{found.most_generated:,} tokens"),
        ("time", f"{_duration(found.reading_seconds)} to {_duration(found.longest_seconds)}"),
        ("memory", human_size(model.backend.memory_bytes())),
    ]
    for name, value in rows:
        console.out().print(f"{name:<24}{value}", markup=False)
    for line, message in found.bad:
        console.out().print(f"line {line:,}: {message}", markup=False)
    more = found.bad_lines - len(found.bad)
    if more:
        console.out().print(f"… and {counted(more, 'more bad line')}", markup=False)
    return 1 if found.bad_lines or found.refused else 0


def _journal(output: str, identity: Mapping[str, object], run: BatchOptions) -> "Journal":
    """The output file, with a word on what it holds already."""
    from emlocal.batch.journal import Journal
    from emlocal.batch.lines import is_error, key_of

    journal = Journal.open(
        Path(output),
        identity,
        key_of=key_of,
        is_error=is_error,
        restart=not run.resume,
        retry_errors=run.retry_errors,
    )
    _say_what_is_there(journal, run)
    return journal


def _run(
    model: "Loaded",
    source: BinaryIO,
    journal: "Journal | None",
    settings: "BatchSettings",
    run: BatchOptions,
) -> int:
    """Write the rows; the exit code: 1 where there are error rows, 130 where it was stopped."""
    from emlocal.batch.keys import Places
    from emlocal.batch.lines import is_error, read_lines
    from emlocal.batch.run import Batch
    from emlocal.generation import Scheduler, interruptible

    with ExitStack() as opened:
        total = _count_lines(source)
        left = None if total is None else (total - (journal.rows if journal else 0)) * settings.plan.samples
        done = left is not None and left <= 0  # there may be more rows than lines
        parallel = run.parallel or (
            1 if done else choose_parallel(model, None, left, quiet=run.quiet).sequences
        )
        # Rows of an earlier part of the run may be out of order: it was not --ordered, or errors are retried.
        before = journal.rows + journal.retried if journal else 0
        places = opened.enter_context(Places()) if settings.ordered and before else None
        batch = Batch(
            model.backend,
            read_lines(source),
            settings,
            runner=Scheduler(model.backend, parallel),
            done=journal.done if journal else None,
            places=places,
            warn=console.warn,
        )
        began = time.perf_counter()
        cancelled = opened.enter_context(interruptible())
        show = opened.enter_context(console.counting(total, run.quiet))
        stopped = False
        try:
            for row in batch.rows(cancelled):
                if journal is not None:
                    journal.append(row)
                else:
                    console.write(json.dumps(row, ensure_ascii=False) + "\n")
                tally = batch.tally
                show(tally.answered + tally.errors + tally.skipped, _progress_text(batch, began))
                if run.fail_fast and is_error(row):
                    stopped = True
                    break
        except CancelledError:
            stopped = True
        if journal is not None and places is not None and not stopped and not cancelled.requested:
            journal.put_in_order(places)
    if not run.quiet:
        errors = journal.errors if journal else 0
        seconds = time.perf_counter() - began
        _say_what_came_of_it(batch, seconds, journal is not None, errors, cancelled.requested)
    if cancelled.requested:
        return 130
    return 1 if stopped or batch.tally.errors or (journal is not None and journal.errors) else 0


def _say_what_is_there(journal: "Journal", run: BatchOptions) -> None:
    if run.quiet:
        return
    if journal.repaired:
        console.note(f"{journal.path} ended in a torn row: {journal.repaired:,} bytes were cut off")
    if journal.rows:
        errors = f", {counted(journal.errors, 'error')} among them" if journal.errors else ""
        console.note(f"{journal.path} has {counted(journal.rows, 'row')}{errors}; going on from there")


def _say_what_came_of_it(batch: "Batch", seconds: float, kept: bool, errors: int, stopped: bool) -> None:
    """`errors`: in the output, those of earlier runs among them."""
    tally, counters = batch.tally, batch.runner.counters
    parts = [f"{counted(tally.answered, 'answer')} in {_duration(seconds)}"]
    if tally.skipped:
        parts.append(f"{tally.skipped:,} already there")
    if tally.cut_off:
        parts.append(f"{tally.cut_off:,} cut off (--max-tokens, --context)")
    if batch.abstain_below is not None:
        parts.append(f"{tally.abstained:,} withheld (confidence below {batch.abstain_below:g})")
    if tally.votes_lost:
        parts.append(f"{tally.votes_lost:,} without any answer to vote on")
    if counters.generated_tokens:
        speed = counters.generated_tokens / max(seconds, 1e-9)
        parts.append(f"{counters.generated_tokens:,} tokens, {speed:.1f} tok/s")
        parts.append(f"{counters.prompt_tokens:,} prompt tokens read, {counters.steps:,} forward passes")
    console.note(" · ".join(parts))
    if tally.errors:
        mend = "; after mending the input or the flags, --retry-errors tries them again" if kept else ""
        console.warn(f"{counted(tally.errors, 'line')} could not be answered: see the error rows{mend}")
    elif errors:
        console.warn(f"the output has {counted(errors, 'error row')}: --retry-errors tries them again")
    if stopped and kept:
        console.note("stopped; the same command goes on where it stopped")


def _progress_text(batch: "Batch", began: float) -> str:
    generated = batch.runner.counters.generated_tokens
    errors = f", {counted(batch.tally.errors, 'error')}" if batch.tally.errors else ""
    return f"{generated / max(time.perf_counter() - began, 1e-9):.0f} tok/s{errors}"


def _count_lines(source: BinaryIO) -> int | None:
    """How many lines a file has; None for a stream."""
    if not source.seekable():
        return None
    lines, last = 0, b"\n"
    while chunk := source.read(1 << 20):
        lines, last = lines + chunk.count(b"\n"), chunk[-1:]
    source.seek(0)
    return lines + (last != b"\n")


def _duration(seconds: float) -> str:
    """For people: "8 s", "12 min", "3.5 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
