"""The flags of `emlocal batch` that no other verb has."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import typer

MethodChoice = StrEnum(  # methods.method.METHODS, which a test compares
    "MethodChoice",
    [
        "sample",
        "greedy",
        "em-inf",
        "adaptive-temperature",
        "self-consistency",
        "sequential-refinement",
        "min-p",
        "dynamic-temperature",
    ],
)


class Format(StrEnum):
    emlocal = "emlocal"
    openai = "openai"


class Extract(StrEnum):
    boxed = "boxed"
    last_number = "last-number"
    regex = "regex"
    none = "none"


@dataclass(frozen=True)
class MethodOptions:
    """How each prompt is answered."""

    method: Annotated[
        MethodChoice | None,
        typer.Option("--method", help="How to answer; without it, as the sampling and EM flags say."),
    ] = None
    samples: Annotated[
        int | None,
        typer.Option("-n", "--samples", help="Answers to each prompt. (default: 1; 8 to vote)", metavar="N"),
    ] = None
    rounds: Annotated[
        int | None,
        typer.Option("--rounds", help="Revisions of sequential-refinement. (default: 2)", metavar="N"),
    ] = None
    extract: Annotated[Extract | None, typer.Option("--extract", help="What self-consistency votes on.")] = (
        None
    )
    pattern: Annotated[
        str | None,
        typer.Option("--extract-pattern", help="For --extract regex; its first group.", metavar="REGEX"),
    ] = None


@dataclass(frozen=True)
class RunOptions:
    """What becomes of the rows."""

    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Go on with an output that exists, or empty it.")
    ] = True
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Try lines again that are error rows in the output.")
    ] = False
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first error row.")] = False
    ordered: Annotated[
        bool, typer.Option("--ordered", help="Rows in the order of the lines, not as they are finished.")
    ] = False
    keep: Annotated[
        bool, typer.Option("--keep", help="Carry a line's other fields through, under 'kept'.")
    ] = False
    form: Annotated[Format, typer.Option("--format", help="emlocal's rows, or OpenAI's batch output.")] = (
        Format.emlocal
    )
    parallel: Annotated[
        int | None,
        typer.Option("--parallel", help="Sequences at once. (default: measured)", metavar="N"),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every line, count tokens, estimate time; run nothing.")
    ] = False
    system: Annotated[
        str | None, typer.Option("--system", help="System message of lines without one.", metavar="TEXT")
    ] = None
    raw: Annotated[bool, typer.Option("--raw", help="Send prompts as they are, without chat template.")] = (
        False
    )
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Nothing on stderr but errors.")] = False
