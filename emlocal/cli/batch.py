"""The command `emlocal batch`: a file of prompts in, a file of answers out."""

import codecs
import gzip
import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, TextIO, cast

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
from emlocal.settings.constraint import from_files
from emlocal.settings.em import EM
from emlocal.settings.options import ENGINE, EngineOptions, SpeculateName
from emlocal.settings.resolve import CONSTRAINT, SAMPLING
from emlocal.settings.table import NOTHING, options_of
from emlocal.text import counted, duration, harmless, human_size

if TYPE_CHECKING:
    from emlocal.batch.journal import Journal
    from emlocal.batch.keys import Places
    from emlocal.batch.lines import BadLine, Item
    from emlocal.batch.run import Batch, BatchSettings
    from emlocal.loading import Loaded
    from emlocal.questions.files import Form
    from emlocal.remote.batch import RemoteBatch

_REQUESTS = 4
"""Requests at a time without --parallel: as many as emlocal serve answers."""
_SERVERS = {
    "emlocal": "emlocal's server",
    "vllm": "a vLLM with emlocal's processor",
    "openai": "a server that is not emlocal's",
}


@with_options
def batch(
    input_: Annotated[
        str,
        typer.Argument(
            help="Read prompts from this file (JSONL, JSON, CSV, TSV, parquet), or JSONL from stdin with -.",
            metavar="INPUT",
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "-o", "--output", help="Write rows to this JSONL file. (default: stdout)", metavar="OUTPUT"
        ),
    ] = "-",
    run: BatchOptions = BatchOptions(),
    how: Annotated[Given, HOW] = NOTHING,
    given: Annotated[Given, CONFIDENCE, EM, SAMPLING, CONSTRAINT, ENGINE] = NOTHING,
) -> None:
    """Answer a file of prompts. A killed run resumes where it stopped.

    A line is {"prompt": …}, {"messages": […]} or a line of an OpenAI batch file. Each line may set its own
    sampling and EM values. Finished rows are never lost or repeated, whatever stopped the run.
    """
    from emlocal.batch.lines import canonical
    from emlocal.methods.confidence import subject_of
    from emlocal.methods.hints import without_effect
    from emlocal.settings.resolve import read_config

    _check(input_, output, run)
    if run.connect is not None:
        if code := _connected(input_, output, run, how, from_files(given)):
            raise typer.Exit(code)
        return
    if run.api_key_file is not None:
        raise UsageError("--api-key-file needs a server", "add --connect URL, or leave it out")
    layers = ("flag", from_files(given)), ("config", read_config())
    resolved = resolve_settings(*layers)
    method = chosen_by(how)
    method.plan(resolved.plan, resolved.chosen)  # contradictory settings must fail before a model is loaded
    sure = options_of(ConfidenceOptions, *layers)
    calibration = calibration_in(sure.calibration)
    with ExitStack() as opened:
        source = opened.enter_context(_source(input_))
        options = options_of(EngineOptions, *layers)
        model = opened.enter_context(open_for_batch(options, run.parallel, quiet=run.quiet))
        settings = _settings(model, resolved, method, run)
        settings = replace(settings, calibration=calibration, abstain_below=sure.abstain_below)
        warn_of_mismatch(calibration, subject_of(model.backend.info.name, method, settings.plan))
        for text in () if run.quiet else without_effect(settings.plan, model.backend.info, raw=run.raw):
            console.warn(text)
        identity = batch_identity(settings, model)
        settings = replace(settings, fingerprint=canonical(identity))
        if run.dry_run:
            code = _dry_run(model, input_, source, settings, run)
        else:
            journal = None if output == "-" else opened.enter_context(_journal(output, identity, run))
            code = _run(model, input_, source, journal, settings, run, options.speculate)
    if code:
        raise typer.Exit(code)


def _check(input_: str, output: str, run: BatchOptions) -> None:
    """Raises UsageError for contradictory arguments, before anything is loaded."""
    if run.retry_errors and (output == "-" or not run.resume):
        raise UsageError("--retry-errors needs an output to resume (-o OUTPUT, without --restart)")
    if _is_input(output, input_):
        shown = "the output" if output == "-" else output
        raise UsageError(f"{shown} is the input and would be overwritten", "name another file with -o")
    check_roles(run.raw, run.system)
    if input_ == "-" and sys.stdin.isatty():
        raise UsageError("the input is the terminal", "name a question file, or pipe JSONL in")


def _is_input(output: str, input_: str) -> bool:
    """Whether both are the same regular file under any name, even redirected (`>> INPUT` would never end)."""
    written, read = _status(output, sys.stdout), _status(input_, sys.stdin)
    if written is None or read is None:
        return False
    return stat.S_ISREG(written.st_mode) and os.path.samestat(written, read)


def _status(name: str, stream: TextIO) -> os.stat_result | None:
    """Returns the status of a file, or of the file behind "-"; None if there is none."""
    try:
        return os.fstat(stream.fileno()) if name == "-" else Path(name).expanduser().stat()
    except OSError:  # missing, or a stream without a file, in tests
        return None


def _source(input_: str) -> BinaryIO:
    from emlocal.questions.files import opened

    if input_ == "-":
        return sys.stdin.buffer
    try:
        source = opened(Path(input_).expanduser())
    except OSError as why:
        raise UsageError(
            f"cannot read {input_}: {why.strerror}",
            "name a file of questions (JSONL, JSON, CSV, TSV, parquet), or - for JSONL from stdin",
        ) from why
    try:
        _check_form(source, input_)
    except BaseException:
        source.close()
        raise
    return source


def _check_form(source: BinaryIO, name: str) -> None:
    """Raises UsageError for a file that is not of its format at the start, before a model is loaded."""
    from emlocal.questions.asked import FIELDS, field_of
    from emlocal.questions.files import form_of, is_by_lines, reading, rows

    form = form_of(name)
    if not source.seekable():
        return
    with reading(name):
        if form is not None and not is_by_lines(source, form):
            first = next((row for _, row in rows(source, form)), None)
            if form in ("csv", "tsv") and first is not None and field_of(first) is None:
                named = ", ".join(map(repr, first))
                raise UsageError(
                    f"{name} has no column with questions; its first line names {harmless(named)[:200]}",
                    f"name a column in the first line: {', '.join(FIELDS[:5])}",
                )
        elif Path(name).suffix.lower() in (".txt", ".md"):
            begins = source.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
            if begins and begins not in b'{"':
                raise UsageError(
                    f"{name} is text, and batch reads JSONL, JSON, CSV, TSV and parquet",
                    'write lines {"prompt": "…"} to a .jsonl file',
                )
        source.seek(0)


def _settings(model: "Loaded", resolved: Resolved, method: Chosen, run: BatchOptions) -> "BatchSettings":
    """Returns the settings of all lines.

    The default seed is 0, so that a batch gives the same answers each time.
    """
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


def _dry_run(
    model: "Loaded", input_: str, source: BinaryIO, settings: "BatchSettings", run: BatchOptions
) -> int:
    """Prints what the run would do; returns 1 if a line is bad or does not fit the context."""
    from emlocal.batch.forecast import survey
    from emlocal.questions.files import form_of

    lines = _count_lines(source, form_of(input_))
    speed = choose_parallel(
        model, run.parallel, None if lines is None else lines * settings.plan.samples, quiet=run.quiet
    )
    with console.counting(None) as show:
        found = survey(
            model.backend,
            _lines(source, input_, run),
            settings,
            speed=speed,
            progress=lambda n: show(n, "lines checked"),
        )
    half, most = found.quantile(0.5), found.quantile(1.0)
    rows = [
        ("lines", f"{found.lines:,}"),
        ("bad lines", f"{found.bad_lines:,}"),
        ("do not fit the context", f"{found.refused:,} (of {model.backend.context:,} tokens)"),
        (
            "may be cut off",
            f"{found.may_be_cut_off:,} (the context has less than --max-tokens left after the prompt)",
        ),
        ("prompt tokens", f"{found.prompt_tokens:,} (median {half:,}, longest {most:,})"),
        ("generated at most", f"{found.most_generated:,} tokens"),
        ("time", f"{duration(found.reading_seconds)} to {duration(found.longest_seconds)}"),
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
    """Opens the output file and reports the rows that it already holds."""
    from emlocal.batch.journal import Journal
    from emlocal.batch.lines import is_error, key_of

    journal = Journal.open(
        Path(output).expanduser(),
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
    input_: str,
    source: BinaryIO,
    journal: "Journal | None",
    settings: "BatchSettings",
    run: BatchOptions,
    speculate: SpeculateName,
) -> int:
    """Writes the rows. Returns the exit code: 1 if there are error rows, 130 if stopped."""
    from emlocal.batch.keys import Places
    from emlocal.batch.run import Batch
    from emlocal.generation import Scheduler
    from emlocal.generation.speculation import speculation_of
    from emlocal.questions.files import form_of

    with ExitStack() as opened:
        total = _count_lines(source, form_of(input_))
        left = None if total is None else (total - (journal.rows if journal else 0)) * settings.plan.samples
        done = left is not None and left <= 0  # there may be more rows than lines
        parallel = run.parallel or (
            1 if done else choose_parallel(model, None, left, quiet=run.quiet).sequences
        )
        # Existing rows may be out of order: the earlier run was not --ordered, or errors are retried.
        before = journal.rows + journal.retried if journal else 0
        places = opened.enter_context(Places()) if settings.ordered and before else None
        batch = Batch(
            model.backend,
            _lines(source, input_, run),
            settings,
            runner=Scheduler(model.backend, parallel, speculation_of(speculate, model.backend, console.warn)),
            done=journal.done if journal else None,
            places=places,
            warn=console.warn,
        )
        return _write(batch, lambda: batch.runner.counters.generated_tokens, total, journal, places, run)


def _connected(input_: str, output: str, run: BatchOptions, how: Given, given: Given) -> int:
    """Has the lines answered by a server. Returns the exit code, as `_run` does."""
    from emlocal.batch.keys import Places
    from emlocal.batch.lines import canonical
    from emlocal.cli.connect import remote_of
    from emlocal.questions.files import form_of
    from emlocal.remote.batch import RemoteBatch
    from emlocal.settings.resolve import read_config

    with ExitStack() as opened:
        source = opened.enter_context(_source(input_))
        remote = remote_of(run, how, given, read_config())
        if not run.quiet:
            console.note(f"{remote.model} at {run.connect}, {_SERVERS[remote.kind]}")
        identity = {**remote.identity(), "format": run.form}
        journal = None if output == "-" else opened.enter_context(_journal(output, identity, run))
        before = journal.rows + journal.retried if journal else 0
        places = opened.enter_context(Places()) if run.ordered and before else None
        batch = RemoteBatch(
            remote,
            _lines(source, input_, run),
            fingerprint=canonical(identity),
            parallel=run.parallel or _REQUESTS,
            openai=run.form == "openai",
            ordered=run.ordered,
            done=journal.done if journal else None,
            places=places,
        )
        total = _count_lines(source, form_of(input_))
        return _write(batch, lambda: batch.generated_tokens, total, journal, places, run)


def _write(
    batch: "Batch | RemoteBatch",
    generated: Callable[[], int],
    total: int | None,
    journal: "Journal | None",
    places: "Places | None",
    run: BatchOptions,
) -> int:
    """Writes the rows as they come. `generated` returns the tokens so far."""
    from emlocal.batch.lines import is_error
    from emlocal.generation import interruptible

    with ExitStack() as opened:
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
                show(tally.answered + tally.errors + tally.skipped, _progress_text(batch, generated(), began))
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
        _say_what_came_of_it(batch, generated(), seconds, journal is not None, errors, cancelled.requested)
    if cancelled.requested:
        return 130
    return 1 if stopped or batch.tally.errors or (journal is not None and journal.errors) else 0


def _say_what_is_there(journal: "Journal", run: BatchOptions) -> None:
    if run.quiet:
        return
    if journal.repaired:
        console.note(f"{journal.path} ended in an incomplete row; {journal.repaired:,} bytes were removed")
    if journal.rows:
        errors = f", {counted(journal.errors, 'error')} among them" if journal.errors else ""
        console.note(f"{journal.path} has {counted(journal.rows, 'row')}{errors}; continuing after them")


def _say_what_came_of_it(
    batch: "Batch | RemoteBatch", generated: int, seconds: float, kept: bool, errors: int, stopped: bool
) -> None:
    """Reports the results; `errors` counts the error rows in the output, including those of earlier runs."""
    from emlocal.batch.run import Batch

    tally = batch.tally
    limit = batch.abstain_below if isinstance(batch, Batch) else None
    parts = [f"{counted(tally.answered, 'answer')} in {duration(seconds)}"]
    if tally.skipped:
        parts.append(f"{tally.skipped:,} already there")
    if tally.cut_off:
        parts.append(f"{tally.cut_off:,} cut off (--max-tokens, --context)")
    if limit is not None:
        parts.append(f"{tally.abstained:,} withheld (confidence below {limit:g})")
    elif tally.abstained:
        parts.append(f"{tally.abstained:,} withheld (confidence too low)")
    if tally.votes_lost:
        parts.append(f"{tally.votes_lost:,} without an answer to vote on")
    if generated:
        parts.append(f"{generated:,} tokens, {generated / max(seconds, 1e-9):.1f} tok/s")
    if generated and isinstance(batch, Batch):
        counters = batch.runner.counters
        parts.append(f"{counters.prompt_tokens:,} prompt tokens read, {counters.steps:,} forward passes")
    console.note(" · ".join(parts))
    if tally.errors:
        fix = "; fix the input or the flags, then add --retry-errors" if kept else ""
        console.warn(f"{counted(tally.errors, 'line')} could not be answered; see the error rows{fix}")
    elif errors:
        console.warn(f"the output has {counted(errors, 'error row')}; retry them with --retry-errors")
    if stopped and kept:
        console.note("stopped; run the same command to resume")


def _progress_text(batch: "Batch | RemoteBatch", generated: int, began: float) -> str:
    errors = f", {counted(batch.tally.errors, 'error')}" if batch.tally.errors else ""
    return f"{generated / max(time.perf_counter() - began, 1e-9):.0f} tok/s{errors}"


def _lines(source: BinaryIO, input_: str, run: BatchOptions) -> "Iterator[Item | BadLine]":
    """Yields the input's lines. A note says, once, if the rows will leave out fields of theirs."""
    from emlocal.batch.lines import read_file
    from emlocal.batch.tasks import noting_own_fields
    from emlocal.questions.files import form_of

    lines = read_file(source, form_of(input_), input_)
    return lines if run.keep or run.quiet else noting_own_fields(lines, console.note)


def _count_lines(source: BinaryIO, form: "Form | None") -> int | None:
    """Counts the lines of a JSONL file; returns None for a stream, a packed file and other formats."""
    from emlocal.questions.files import is_by_lines

    if (
        not source.seekable()
        or isinstance(cast(object, source), gzip.GzipFile)
        or not is_by_lines(source, form)
    ):
        return None
    lines, last = 0, b"\n"
    while chunk := source.read(1 << 20):
        lines, last = lines + chunk.count(b"\n"), chunk[-1:]
    source.seek(0)
    return lines + (last != b"\n")
