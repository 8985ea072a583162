"""The command line's flags, made from the settings' records, and code that verbs share.

A verb takes tables of settings, and groups of options:

    @with_options
    def chat(output: OutputOptions, given: Annotated[Given, EM, SAMPLING, ENGINE]) -> None: ...

`with_options` shows typer each setting as a separate parameter. For a table, the verb receives only the given
values, so that the config file, the model and emlocal's defaults can fill in the rest. For a group, it
receives the dataclass. `open_backend` and `open_for_batch` load the model that the flags name, and report it.
"""

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from functools import partial, reduce, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import typer

from emlocal import console
from emlocal.cli.usage import Command
from emlocal.errors import UsageError
from emlocal.settings.table import FLAGS, Setting, Table, options_of, setting
from emlocal.text import counted

if TYPE_CHECKING:
    from emlocal.backends.base import Backend
    from emlocal.batch.forecast import Speed
    from emlocal.loading import Loaded
    from emlocal.methods.confidence import Calibration, Subject
    from emlocal.models.resolve import CatalogEntry
    from emlocal.settings.options import EngineOptions

R = TypeVar("R")
_output = partial(setting, panel="Output")
ALIASES: dict[str, dict[str, str]] = {}
"""The flags of other programs, with emlocal's names for them, by verb."""


Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="Read prompts from a .jsonl file, a text file (one a line) or a data set of the hub.",
        metavar="FILE",
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        "-o", "--output", help="Write the adapter, metrics and checkpoints to this folder.", metavar="FOLDER"
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "-m", "--model", help="Set the model: a short name, .gguf file, folder or org/name.", metavar="MODEL"
    ),
]


@dataclass(frozen=True)
class PromptOptions:
    """The system message, and whether to use the chat template."""

    system: str | None = setting(
        None, "--system --system-prompt", help="Set the system message.", metavar="TEXT"
    )
    raw: bool = setting(False, "--raw", help="Send the prompt as it is, without a chat template.")


def check_roles(raw: bool, system: str | None) -> None:
    """Raises UsageError if there is a system message but no template for it."""
    if raw and system is not None:
        raise UsageError(
            "--raw and --system contradict each other: a raw prompt has no system role",
            "leave one of them out",
        )


@dataclass(frozen=True)
class OutputOptions:
    """Output beside the answer."""

    show_entropy: bool = _output(
        False, "--show-entropy", help="Colour the answer by each token's entropy before EM."
    )
    hide_thinking: bool = _output(
        False, "--hide-thinking --hide-reasoning", help="Do not show the model's thoughts."
    )
    trace: Path | None = _output(
        None, "--trace", help="Write a JSON line per token to this file.", metavar="FILE"
    )
    quiet: bool = _output(False, "-q --quiet", help="Print no notes or statistics on stderr.")


@dataclass(frozen=True)
class BatchOptions:
    """Settings for the lines and rows of a batch."""

    resume: bool = setting(True, "--resume/--restart", help="Resume an existing output, or overwrite it.")
    retry_errors: bool = setting(
        False, "--retry-errors", help="Retry the lines that have error rows in the output."
    )
    fail_fast: bool = setting(False, "--fail-fast", help="Stop at the first error row.")
    ordered: bool = setting(
        False, "--ordered", help="Write rows in the order of the input, not as they finish."
    )
    keep: bool = setting(False, "--keep", help="Copy a line's other fields to its row, under 'kept'.")
    form: Literal["emlocal", "openai"] = setting(
        "emlocal", "--format", help="Write emlocal's rows or OpenAI's batch output."
    )
    parallel: int | None = setting(
        None, "--parallel --max-num-seqs", 1, 256, "Set the number of sequences at once. (default: measured)"
    )
    dry_run: bool = setting(
        False, "--dry-run", help="Check every line, count tokens and estimate the time; answer nothing."
    )
    system: str | None = setting(
        None, "--system --system-prompt", help="Set the system message of lines without one.", metavar="TEXT"
    )
    raw: bool = setting(False, "--raw", help="Send prompts as they are, without a chat template.")
    connect: str | None = setting(
        None, "--connect", help="Ask the OpenAI-compatible server at this URL.", metavar="URL"
    )
    api_key_file: Path | None = setting(
        None,
        "--api-key-file",
        help="Read the server's key from this file. (default: OPENAI_API_KEY)",
        metavar="FILE",
    )
    quiet: bool = setting(False, "-q --quiet", help="Print nothing but errors on stderr.")


class Verb(Command):
    """A command that accepts other programs' flags, and underscores in flags."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, respelt(args, self.params, ALIASES.get(self.name or "", {})))


def respelt(arguments: Iterable[str], parameters: Iterable[Any], aliases: Mapping[str, str]) -> list[str]:
    """Returns the arguments with each flag under its main name.

    Values, and the arguments after `--`, do not change.

    Raises UsageError if a setting is given under two names.
    """
    options = {name: p for p in parameters for name in (*p.opts, *p.secondary_opts) if name.startswith("-")}
    found: list[str] = []
    typed: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        option = None
        if argument == "--":
            return [*found, argument, *rest]
        if name.startswith("--"):
            dashed = name.replace("_", "-")
            main = name if name in options else aliases.get(dashed, dashed)
            option = options.get(main)
            if option is not None:
                if typed.setdefault(main, name) != name:
                    raise UsageError(
                        f"{typed[main]} and {name} are the same setting", "give only one of them"
                    )
                argument = main + equals + value
            takes_next = option is not None and not option.is_flag and not equals
        elif argument in options:  # one dash and several letters, such as -ngl
            takes_next = not options[argument].is_flag
        else:
            takes_next = _ends_with_option(argument, options)
        found.append(argument)
        if takes_next:
            found += [value for value in [next(rest, None)] if value is not None]
    return found


def _ends_with_option(argument: str, options: Mapping[str, Any]) -> bool:
    """Whether the last flag in an argument like -n or -qn takes its value from the next argument."""
    if not argument.startswith("-"):
        return False
    for position, letter in enumerate(argument[1:], start=2):
        option = options.get(f"-{letter}")
        if option is None or not option.is_flag:
            return option is not None and position == len(argument)
    return False


def with_options(verb: Callable[..., R]) -> Callable[..., R]:
    """Lets `verb` take tables of settings and groups of options; see the module."""
    signature = inspect.signature(verb)
    hints = get_type_hints(verb, include_extras=True)
    tables: dict[str, Table] = {}
    parameters = []
    for name, parameter in signature.parameters.items():
        table = _table_in(hints[name])
        if table is None:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        tables[name] = table
        parameters += [
            inspect.Parameter(
                known.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(known)
            )
            for known in table.settings.values()
        ]
    ALIASES[verb.__name__] = {
        alias: known.flag
        for table in tables.values()
        for known in table.settings.values()
        for alias in known.aliases
    }

    @wraps(verb)
    def flat(**values: Any) -> R:
        for name, table in tables.items():
            own = {each: values.pop(each) for each in table.settings}
            # typer passes an empty list for a repeatable flag that was not given
            given = table.read({n: value for n, value in own.items() if value != []}, FLAGS)
            values[name] = options_of(hints[name], ("flag", given)) if is_dataclass(hints[name]) else given
        return verb(**values)

    flat.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {p.name: p.annotation for p in parameters}
    del flat.__wrapped__  # otherwise typer would look through to `verb`
    return flat


def _table_in(hint: Any) -> Table | None:
    """Returns the table of settings behind a verb's parameter.

    Returns None for a parameter that typer reads itself.
    """
    if is_dataclass(hint):
        return Table.of(hint)  # type: ignore[arg-type]
    if get_origin(hint) is not Annotated:
        return None
    tables = [extra for extra in get_args(hint)[1:] if isinstance(extra, Table)]
    return reduce(Table.__or__, tables) if tables else None


def _option(known: Setting) -> Any:
    """Returns a setting as a typer option."""
    kinds: dict[str, Any] = {
        "number": float,
        "whole": int,
        "switch": bool,
        "text": str,
        "texts": list[str],
        "path": Path,
    }
    kind = Literal[known.choices] if known.kind == "choice" else kinds[known.kind]
    names = [f"{known.flag}/{known.off}" if known.off else known.flag]
    option = typer.Option(
        *([known.short] if known.short else []),
        *names,
        help=known.full_help,
        metavar=known.metavar,
        rich_help_panel=known.panel,
        show_default=False,
    )
    return Annotated[kind | None, option]


@contextmanager
def open_backend(options: "EngineOptions", *, sequences: int, quiet: bool) -> Iterator["Backend"]:
    """Loads the model of these flags for one prompt at a time; frees it at the end.

    Raises as `loading.load` does.
    """
    from emlocal.loading import load, settled

    _go_offline_if_asked(options)
    options = settled(options, _may_fetch)
    with console.progress(quiet) as progress:
        loaded = load(options, sequences=sequences, progress=progress, warn=_warn(quiet))
    with _open(loaded, quiet):
        yield loaded.backend


@contextmanager
def open_for_batch(
    options: "EngineOptions",
    parallel: int | None,
    *,
    quiet: bool,
    spare: int = 0,
    context: int | None = None,
) -> Iterator["Loaded"]:
    """Loads the model for many sequences, each with its own context.

    There are `parallel` sequences, or as many as fit into memory. `spare` and `context`: see
    `loading.load_for_batch`.
    """
    from emlocal.backends.engine import BATCH_CONTEXT
    from emlocal.loading import check_parallel, load_for_batch, settled

    check_parallel(parallel)
    _go_offline_if_asked(options)
    options = settled(options, _may_fetch)
    with console.progress(quiet) as progress:
        most = context or BATCH_CONTEXT
        loaded = load_for_batch(
            options, parallel, spare=spare, context=most, progress=progress, warn=_warn(quiet)
        )
    with _open(loaded, quiet):
        yield loaded


def _go_offline_if_asked(options: "EngineOptions") -> None:
    if options.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _may_fetch(entry: "CatalogEntry") -> bool:
    """Asks on the terminal whether to fetch the model that `-m auto` means; False without a terminal."""
    from emlocal.text import human_size

    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    what = f"{entry.alias} ({entry.parameters} parameters, {human_size(entry.bytes)}, {entry.license})"
    return typer.confirm(f"The best model that fits here is {what}. Fetch it?", err=True)


def _warn(quiet: bool) -> Callable[[str], None]:
    return (lambda text: None) if quiet else console.warn


@contextmanager
def _open(loaded: "Loaded", quiet: bool) -> Iterator[None]:
    if not quiet:
        console.note(loaded.describe())
    try:
        yield
    finally:
        loaded.backend.close()


def calibration_in(path: Path | None) -> "Calibration | None":
    """Reads the calibration that a flag names. Raises as `read_calibration` does."""
    if path is None:
        return None
    from emlocal.methods.confidence import read_calibration

    return read_calibration(path)


def warn_of_mismatch(calibration: "Calibration | None", subject: "Subject") -> None:
    """Warns if the calibration was made for another model, method or settings."""
    differing = None if calibration is None else calibration.mismatch(subject)
    if differing is not None:
        console.warn(differing)


def choose_parallel(model: "Loaded", asked: int | None, answers: int | None, *, quiet: bool) -> "Speed":
    """Chooses how many sequences run at once, for at most `answers` answers.

    Returns their number and speed.
    """
    from emlocal.batch.forecast import Speed, best_parallel, measure_parallel
    from emlocal.loading import MOST_PARALLEL

    most = asked or MOST_PARALLEL
    if answers is not None:
        most = max(1, min(most, answers))
    with console.progress(quiet) as progress:
        progress("measuring how many sequences to run at once", 0, None)
        speeds = measure_parallel(model.backend, most)
    chosen = most if asked else best_parallel(speeds)
    speed = min(speeds, key=lambda s: abs(s.sequences - chosen))
    if not quiet:
        why = "as asked" if asked else "the smallest number within reach of the fastest"
        console.note(f"{counted(chosen, 'sequence')} at once, {why}: {speed.tokens_per_second:.0f} tok/s")
    return Speed(chosen, speed.tokens_per_second)
