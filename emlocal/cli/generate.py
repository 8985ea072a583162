"""The command `emlocal generate`: one prompt, one or more answers."""

import codecs
import select
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emlocal import console
from emlocal.cli.options import OutputOptions, PromptOptions, check_roles, open_backend, with_options
from emlocal.errors import UsageError
from emlocal.methods import HOW, Chosen, chosen_by
from emlocal.settings import Given, Plan, resolve_settings
from emlocal.settings.confidence import CALIBRATION, ConfidenceOptions
from emlocal.settings.constraint import from_files
from emlocal.settings.em import EM
from emlocal.settings.options import ENGINE, EngineOptions, SpeculateName
from emlocal.settings.resolve import CONSTRAINT, SAMPLING, random_seed
from emlocal.settings.table import NOTHING, options_of

if TYPE_CHECKING:
    from emlocal.backends.base import Backend
    from emlocal.generation.prompt import Asked
    from emlocal.methods.confidence import Calibration

_MOST_SAMPLES = 256
_STDIN_PATIENCE = 2.0  # seconds before a note says that the command waits for stdin


@with_options
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="Give the prompt. Text from stdin and -f comes before it.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="Read the prompt from this file.", metavar="FILE")
    ] = None,
    prompting: PromptOptions = PromptOptions(),
    how: Annotated[Given, HOW] = NOTHING,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of text.")] = False,
    output: OutputOptions = OutputOptions(),
    given: Annotated[Given, CALIBRATION, EM, SAMPLING, CONSTRAINT, ENGINE] = NOTHING,
) -> None:
    """Answer one prompt.

    The answer goes to stdout, everything else to stderr. A line of three dashes separates answers.
    """
    from emlocal.cli.options import calibration_in
    from emlocal.methods.hints import without_effect
    from emlocal.settings.resolve import read_config

    method = chosen_by(how)
    if method.samples > _MOST_SAMPLES:
        raise UsageError(f"--samples is {method.samples}; it must be between 1 and {_MOST_SAMPLES}")
    if as_json and output.show_entropy:
        raise UsageError("--json and --show-entropy contradict each other", "leave one of them out")
    check_roles(prompting.raw, prompting.system)
    layers = ("flag", from_files(given)), ("config", read_config())
    resolved = resolve_settings(*layers, base=Plan(seed=random_seed()))
    method.plan(resolved.plan, resolved.chosen)  # contradictory settings must fail before a model is loaded
    calibration = calibration_in(options_of(ConfidenceOptions, *layers).calibration)
    text = read_prompt(prompt, file)
    quiet = output.quiet or as_json
    options = options_of(EngineOptions, *layers)
    with open_backend(options, sequences=method.samples + 1, quiet=quiet) as backend:
        resolved = resolved.with_model(backend.info.sampling)
        plan = method.plan(resolved.plan, resolved.chosen)
        for said in without_effect(plan, backend.info, raw=prompting.raw, hides=output.hide_thinking):
            console.warn(said)
        code = run(
            backend,
            _asked(backend, text, prompting),
            method,
            plan,
            output,
            as_json,
            calibration,
            options.speculate,
        )
    if code:
        raise typer.Exit(code)


def run(
    backend: "Backend",
    asked: "Asked",
    method: Chosen,
    plan: Plan,
    output: OutputOptions,
    as_json: bool,
    calibration: "Calibration | None" = None,
    speculate: SpeculateName = "off",
) -> int:
    """Generates and shows the answers; returns the exit code.

    Raises EmlocalError, after it has shown the answers, if one does not meet its constraint.
    """
    from emlocal import rendering
    from emlocal.cli.options import warn_of_mismatch
    from emlocal.generation import CancelledError, Scheduler, Token, interruptible
    from emlocal.generation.prompt import once, prompt_tokens
    from emlocal.generation.speculation import speculation_of
    from emlocal.methods.asking import Answered, Question, ask_one
    from emlocal.methods.confidence import confidence_of, subject_of

    subject = subject_of(backend.info.name, method, plan)
    warn_of_mismatch(calibration, subject)
    sure = partial(confidence_of, subject=subject, calibration=calibration)
    collects, streams = method.collecting.collects, method.streams and not as_json
    writer = rendering.AnswerWriter(
        output.show_entropy and streams, thoughts=not (output.quiet or output.hide_thinking)
    )
    with (
        interruptible() as cancelled,
        rendering.trace_to(output.trace, backend) as trace,
        Scheduler(backend, plan.samples, speculation_of(speculate, backend, console.warn)) as runner,
        console.working("answering", quiet=streams or as_json or output.quiet) as tick,
    ):
        encode = partial(prompt_tokens, backend, cancelled=cancelled, warn=once(console.warn))
        question = Question(asked, plan, encode, at_once=True)
        try:
            for event in ask_one(runner, method.collecting, question, cancelled):
                if isinstance(event, Answered):
                    outcome = event.asking.result()
                    if trace and collects:  # only the answers, not the samples behind them
                        trace.add_all(outcome.completions)
                elif isinstance(event, Token):
                    tick()
                    if trace and not collects:
                        trace.add(event.sample, event.draw)
                    if streams:
                        writer.thought(event.reasoning)
                        writer.piece(event.text, event.draw.entropy_before)
                elif streams:
                    writer.piece(event.completion.tail, 0.0)
        except CancelledError:
            if not output.quiet:
                console.note("stopped before the first token")
            return 130
    completions = [outcome.completion] if collects else outcome.completions
    if as_json:
        console.print_json(rendering.as_json(backend, outcome, plan.seed, collects, sure))
    else:
        if not streams:
            writer.piece("\n---\n".join(c.text.strip("\n") for c in completions), 0.0)
        writer.end()
    if not (output.quiet or as_json):
        em = plan.params.em is not None
        # the confidence of one answer would say nothing about several independent ones
        confidence = sure(outcome) if len(completions) == 1 else None
        console.note(rendering.stats_line(outcome, plan.seed, backend.context, em=em, confidence=confidence))
    if cancelled.requested or any(c.finish_reason == "cancelled" for c in outcome.completions):
        return 130
    rendering.check_whole(completions, plan.constraint, backend.context, quiet=output.quiet and not as_json)
    return 0


def _asked(backend: "Backend", text: str, prompting: PromptOptions) -> "Asked":
    """Returns the prompt, formatted by the chat template unless --raw."""
    from emlocal.generation.prompt import for_template

    if prompting.raw:
        return text
    system = [] if prompting.system is None else [{"role": "system", "content": prompting.system}]
    return for_template(backend.info, [*system, {"role": "user", "content": text}], console.warn)


def read_prompt(argument: str | None, file: Path | None) -> str:
    """Joins stdin (unless it is a terminal), the file and the argument with blank lines.

    Raises UsageError for a missing file, text that is not UTF-8, or an empty prompt.
    """
    parts = []
    if str(file) == "-" or not sys.stdin.isatty():
        parts.append(decoded(_read_stdin(argument is not None or file is not None), "stdin"))
    if file is not None and str(file) != "-":
        try:
            parts.append(decoded(file.expanduser().read_bytes(), str(file)))
        except OSError as why:
            raise UsageError(
                f"cannot read {file}: {why.strerror}", "name a text file with -f, or - for stdin"
            ) from why
    parts.append(_spoken(argument or ""))
    text = "\n\n".join(part.strip("\r\n") for part in parts if part.strip())
    if not text:
        raise UsageError("the prompt is empty", 'emlocal generate "some text", or -f FILE, or text on stdin')
    return text


def _spoken(argument: str) -> str:
    """Returns the argument.

    Raises UsageError if it has surrogates, by which Python marks bytes that are not UTF-8.
    """
    try:
        argument.encode()
    except UnicodeEncodeError as why:
        raise UsageError(f"the prompt is not UTF-8 text from character {why.start:,} onwards") from None
    return argument


def _read_stdin(has_other: bool) -> bytes:
    """Reads all of stdin.

    If there already is a prompt and nothing comes, a note says that the command waits.
    """
    if has_other and sys.platform != "win32":
        ready, _, _ = select.select([sys.stdin], [], [], _STDIN_PATIENCE)
        if not ready:
            console.note("reading the prompt from stdin until it ends (add < /dev/null to read nothing)")
    return sys.stdin.buffer.read()


def decoded(raw: bytes, where: str) -> str:
    """Decodes UTF-8, with or without BOM. Raises UsageError that shows the first bad byte."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as why:
        utf_16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        raise UsageError(
            f"{where} is not UTF-8 text: byte 0x{raw[why.start]:02x} at offset {why.start:,}",
            f"convert it first, with iconv -f {'UTF-16' if utf_16 else 'LATIN1'} -t UTF-8 for example",
        ) from why
