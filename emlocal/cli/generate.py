"""`emlocal generate`: one prompt, one or more answers."""

import select
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emlocal import console
from emlocal.cli.options import OutputOptions, PromptOptions, check_roles, with_options
from emlocal.errors import UsageError
from emlocal.settings import Given, Plan, resolve_settings
from emlocal.settings.em import EM
from emlocal.settings.engine import ENGINE, EngineOptions
from emlocal.settings.resolve import SAMPLING, random_seed
from emlocal.settings.table import NOTHING, options_of

if TYPE_CHECKING:
    from emlocal.backends.base import Backend
    from emlocal.generation import Request

_STDIN_PATIENCE = 2.0  # seconds before saying that stdin is being waited for


@with_options
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; stdin and -f come before it.")] = None,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="Read the prompt from a file.", metavar="FILE")
    ] = None,
    prompting: PromptOptions = PromptOptions(),
    samples: Annotated[
        int, typer.Option("-n", "--samples", help="Answers to draw, each from draws of its own.", metavar="N")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    output: OutputOptions = OutputOptions(),
    given: Annotated[Given, EM, SAMPLING, ENGINE] = NOTHING,
) -> None:
    """Answer one prompt.

    The answer goes to stdout, everything else to stderr. A line of three dashes separates several answers.
    """
    from emlocal.cli.views import open_backend
    from emlocal.settings.files import read_config

    if not 1 <= samples <= 256:
        raise UsageError(f"--samples is {samples}; it must be between 1 and 256")
    if as_json and output.show_entropy:
        raise UsageError("--json and --show-entropy contradict each other", "leave one of them out")
    check_roles(prompting.raw, prompting.system)
    layers = ("flag", given), ("config", read_config())
    resolved = resolve_settings(*layers, base=Plan(seed=random_seed()))
    text = read_prompt(prompt, file)
    quiet = output.quiet or as_json
    options = options_of(EngineOptions, *layers)
    with open_backend(options, sequences=samples + 1, quiet=quiet) as backend:
        from emlocal.generation import Request  # with numpy, which is imported while the model is loaded
        from emlocal.sampling import Uniforms

        plan = resolved.with_model(backend.info.sampling).plan
        requests = [
            Request(plan.params, Uniforms(plan.seed, 0, i), plan.max_tokens, plan.stop)
            for i in range(samples)
        ]
        job = Job(encode(backend, text, prompting), requests, plan.seed, output, as_json)
        code = run(backend, job)
    if code:
        raise typer.Exit(code)


@dataclass(frozen=True)
class Job:
    """What is to be generated, and how it is shown."""

    prompt: list[int]
    requests: list["Request"]
    seed: int
    output: OutputOptions
    as_json: bool


def run(backend: "Backend", job: Job) -> int:
    """Generate and show; the exit code."""
    from emlocal import answers
    from emlocal.generation import CancelledError, Completion, Generator, interruptible

    generator = Generator(backend)
    streams = len(job.requests) == 1 and not job.as_json
    writer = answers.AnswerWriter(job.output.show_entropy and streams)
    done: list[Completion] = []
    with interruptible() as cancelled, answers.trace_to(job.output.trace, backend) as trace:
        try:
            for event in generator.run(job.prompt, job.requests, cancelled):
                if isinstance(event, Completion):
                    done.append(event)
                    text, entropy = event.tail, 0.0
                else:
                    text, entropy = event.text, event.draw.entropy_before
                    if trace:
                        trace.add(event.sample, event.draw)
                if streams:
                    writer.piece(text, entropy)
        except CancelledError:
            console.note("stopped while the prompt was read")
            return 130
    done.sort(key=lambda completion: completion.sample)
    if job.as_json:
        console.print_json(answers.as_json(backend, done, generator.timings, job.seed))
    elif streams:
        writer.end()
    else:
        writer.piece("\n---\n".join(c.text.strip("\n") for c in done), 0.0)
        writer.end()
    if not (job.output.quiet or job.as_json):
        em = job.requests[0].params.em is not None
        console.note(answers.stats_line(done, generator.timings, job.seed, backend.context, em=em))
    return 130 if any(c.finish_reason == "cancelled" for c in done) else 0


def encode(backend: "Backend", text: str, prompting: PromptOptions) -> list[int]:
    """The prompt's tokens: through the chat template, or as it is with --raw."""
    from emlocal.generation.prompt import chat_tokens
    from emlocal.generation.tokenizing import text_tokens

    if prompting.raw:
        return text_tokens(backend, text, add_special=True, parse_special=True)
    if backend.info.chat_template is None:
        console.warn(f"{backend.info.name} has no chat template; the prompt goes in as it is (--raw)")
        return text_tokens(backend, text, add_special=True, parse_special=True)
    system = [] if prompting.system is None else [{"role": "system", "content": prompting.system}]
    return chat_tokens(backend, [*system, {"role": "user", "content": text}])


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
