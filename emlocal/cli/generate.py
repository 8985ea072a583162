"""`emlocal generate`: one prompt, one or more answers."""

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
from emlocal.settings.em import EM
from emlocal.settings.options import ENGINE, EngineOptions
from emlocal.settings.resolve import SAMPLING, random_seed
from emlocal.settings.table import NOTHING, options_of

if TYPE_CHECKING:
    from emlocal.backends.base import Backend
    from emlocal.generation.prompt import Asked
    from emlocal.methods.confidence import Calibration

_MOST_SAMPLES = 256
_STDIN_PATIENCE = 2.0  # seconds before saying that stdin is being waited for


@with_options
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; stdin and -f come before it.")] = None,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="Read the prompt from a file.", metavar="FILE")
    ] = None,
    prompting: PromptOptions = PromptOptions(),
    how: Annotated[Given, HOW] = NOTHING,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    output: OutputOptions = OutputOptions(),
    given: Annotated[Given, CALIBRATION, EM, SAMPLING, ENGINE] = NOTHING,
) -> None:
    """Answer one prompt.

    The answer goes to stdout, everything else to stderr. A line of three dashes separates several answers.
    """
    from emlocal.cli.options import calibration_in
    from emlocal.settings.resolve import read_config

    method = chosen_by(how)
    if method.samples > _MOST_SAMPLES:
        raise UsageError(f"--samples is {method.samples}; it must be between 1 and {_MOST_SAMPLES}")
    if as_json and output.show_entropy:
        raise UsageError("--json and --show-entropy contradict each other", "leave one of them out")
    check_roles(prompting.raw, prompting.system)
    layers = ("flag", given), ("config", read_config())
    resolved = resolve_settings(*layers, base=Plan(seed=random_seed()))
    method.plan(resolved.plan, resolved.chosen)  # what contradicts itself fails before a model is loaded
    calibration = calibration_in(options_of(ConfidenceOptions, *layers).calibration)
    text = read_prompt(prompt, file)
    quiet = output.quiet or as_json
    options = options_of(EngineOptions, *layers)
    with open_backend(options, sequences=method.samples + 1, quiet=quiet) as backend:
        resolved = resolved.with_model(backend.info.sampling)
        plan = method.plan(resolved.plan, resolved.chosen)
        code = run(backend, _asked(backend, text, prompting), method, plan, output, as_json, calibration)
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
) -> int:
    """Generate and show; the exit code."""
    from emlocal import rendering
    from emlocal.cli.options import warn_of_mismatch
    from emlocal.generation import CancelledError, Scheduler, Token, interruptible
    from emlocal.generation.prompt import prompt_tokens
    from emlocal.methods.asking import Answered, Question, ask_one
    from emlocal.methods.confidence import confidence_of, subject_of

    subject = subject_of(backend.info.name, method, plan)
    warn_of_mismatch(calibration, subject)
    sure = partial(confidence_of, subject=subject, calibration=calibration)
    collects, streams = method.collecting.collects, method.streams and not as_json
    writer = rendering.AnswerWriter(output.show_entropy and streams)
    with (
        interruptible() as cancelled,
        rendering.trace_to(output.trace, backend) as trace,
        Scheduler(backend, plan.samples) as runner,
        console.working("answering", quiet=streams or as_json or output.quiet) as tick,
    ):
        encode = partial(prompt_tokens, backend, cancelled=cancelled)
        question = Question(asked, plan, encode, at_once=True)
        try:
            for event in ask_one(runner, method.collecting, question, cancelled):
                if isinstance(event, Answered):
                    outcome = event.asking.result()
                    if trace and collects:  # the answers, not all that was drawn on the way
                        trace.add_all(outcome.completions)
                elif isinstance(event, Token):
                    tick()
                    if trace and not collects:
                        trace.add(event.sample, event.draw)
                    if streams:
                        writer.piece(event.text, event.draw.entropy_before)
                elif streams:
                    writer.piece(event.completion.tail, 0.0)
        except CancelledError:
            if not output.quiet:
                console.note("stopped while the prompt was read")
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
        # of several independent answers none is the one that it would be of
        confidence = sure(outcome) if len(completions) == 1 else None
        console.note(rendering.stats_line(outcome, plan.seed, backend.context, em=em, confidence=confidence))
    stopped = cancelled.requested or any(c.finish_reason == "cancelled" for c in outcome.completions)
    return 130 if stopped else 0


def _asked(backend: "Backend", text: str, prompting: PromptOptions) -> "Asked":
    """What is asked: through the chat template, or as it is with --raw."""
    from emlocal.generation.prompt import for_template

    if prompting.raw:
        return text
    system = [] if prompting.system is None else [{"role": "system", "content": prompting.system}]
    return for_template(backend.info, [*system, {"role": "user", "content": text}], console.warn)


def read_prompt(argument: str | None, file: Path | None) -> str:
    """The prompt: stdin (where it is no terminal), the file, the argument, with blank lines between.

    Raises UsageError for a missing file, text that is not UTF-8, or nothing but white space.
    """
    parts = []
    if str(file) == "-" or not sys.stdin.isatty():
        parts.append(decoded(_read_stdin(argument is not None or file is not None), "stdin"))
    if file is not None and str(file) != "-":
        try:
            parts.append(decoded(file.read_bytes(), str(file)))
        except OSError as why:
            raise UsageError(f"cannot read {file}: {why.strerror}") from why
    parts.append(_spoken(argument or ""))
    text = "\n\n".join(part.strip("\r\n") for part in parts if part.strip())
    if not text:
        raise UsageError("the prompt is empty", 'emlocal generate "some text", or -f FILE, or text on stdin')
    return text


def _spoken(argument: str) -> str:
    """The argument; Python marks bytes that are no UTF-8 with surrogates."""
    try:
        argument.encode()
    except UnicodeEncodeError as why:
        raise UsageError(f"the prompt is not UTF-8 text, from character {why.start:,} on") from None
    return argument


def _read_stdin(has_other: bool) -> bytes:
    """All of stdin; says so when nothing comes though there is a prompt already."""
    if has_other and sys.platform != "win32":
        ready, _, _ = select.select([sys.stdin], [], [], _STDIN_PATIENCE)
        if not ready:
            console.note("waiting for stdin to end (run with < /dev/null if it never does)")
    return sys.stdin.buffer.read()


def decoded(raw: bytes, where: str) -> str:
    """UTF-8 text, with or without BOM. Raises UsageError that shows the first bad byte."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as why:
        raise UsageError(
            f"{where} is not UTF-8 text: byte 0x{raw[why.start]:02x} at offset {why.start:,}",
            "convert it first, with iconv -f LATIN1 -t UTF-8 for example",
        ) from why
