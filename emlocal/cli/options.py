"""The command line's flags, made from the settings' records, and what verbs share: options, and a model.

A verb takes tables of settings, and groups of options:

    @with_options
    def chat(output: OutputOptions, given: Annotated[Given, EM, SAMPLING, ENGINE]) -> None: ...

`with_options` shows typer each setting as a parameter of its own. Of a table, the verb is handed what was
given and nothing else, so that the config file, the model and emlocal's defaults can follow; of a group, the
dataclass. `open_backend` and `open_for_batch` load the model that the flags name, and say so.
"""

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from functools import partial, reduce, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from emlocal import console
from emlocal.errors import UsageError
from emlocal.settings.table import FLAGS, Setting, Table, options_of, setting
from emlocal.text import counted

if TYPE_CHECKING:
    from emlocal.backends.base import Backend
    from emlocal.batch.run import Speed
    from emlocal.loading import Loaded
    from emlocal.methods.confidence import Calibration, Subject
    from emlocal.settings.options import EngineOptions

R = TypeVar("R")
_output = partial(setting, panel="Output")
ALIASES: dict[str, dict[str, str]] = {}
"""Of each verb: other programs' flags → emlocal's."""


Data = Annotated[
    str,
    typer.Option(
        "--data", help="Prompts: .jsonl, text (one a line), or a dataset of the hub.", metavar="FILE"
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        "-o", "--output", help="Folder for the adapter, the metrics and the checkpoints.", metavar="FOLDER"
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "-m", "--model", help="Short name, .gguf file, folder, or org/name of the hub.", metavar="MODEL"
    ),
]


@dataclass(frozen=True)
class PromptOptions:
    """What is said before the answer."""

    system: str | None = setting(None, "--system --system-prompt", help="System message.", metavar="TEXT")
    raw: bool = setting(False, "--raw", help="Send the prompt as it is, without chat template.")


def check_roles(raw: bool, system: str | None) -> None:
    """Raise UsageError where a system message has no template to go into."""
    if raw and system is not None:
        raise UsageError("--raw and --system contradict each other: without a template there are no roles")


@dataclass(frozen=True)
class OutputOptions:
    """What is shown and written beside the answer."""

    show_entropy: bool = _output(
        False, "--show-entropy", help="Colour the answer by each token's entropy before EM."
    )
    trace: Path | None = _output(None, "--trace", help="Write one JSON line per token.", metavar="FILE")
    quiet: bool = _output(False, "-q --quiet", help="No notes and no statistics on stderr.")


@dataclass(frozen=True)
class BatchOptions:
    """What becomes of a batch's rows."""

    resume: bool = setting(True, "--resume/--restart", help="Go on with an output that exists, or empty it.")
    retry_errors: bool = setting(
        False, "--retry-errors", help="Try lines again that are error rows in the output."
    )
    fail_fast: bool = setting(False, "--fail-fast", help="Stop at the first error row.")
    ordered: bool = setting(
        False, "--ordered", help="Rows in the order of the lines, not as they are finished."
    )
    keep: bool = setting(False, "--keep", help="Carry a line's other fields through, under 'kept'.")
    form: Literal["emlocal", "openai"] = setting(
        "emlocal", "--format", help="emlocal's rows, or OpenAI's batch output."
    )
    parallel: int | None = setting(
        None, "--parallel --max-num-seqs", 1, 256, "Sequences at once. (default: measured)"
    )
    dry_run: bool = setting(
        False, "--dry-run", help="Check every line, count tokens, estimate time; run nothing."
    )
    system: str | None = setting(
        None, "--system --system-prompt", help="System message of lines without one.", metavar="TEXT"
    )
    raw: bool = setting(False, "--raw", help="Send prompts as they are, without chat template.")
    quiet: bool = setting(False, "-q --quiet", help="Nothing on stderr but errors.")


class Verb(TyperCommand):
    """A verb that understands the flags of other programs, and underscores in flags."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, respelt(args, self.params, ALIASES.get(self.name or "", {})))


def respelt(arguments: Iterable[str], parameters: Iterable[Any], aliases: Mapping[str, str]) -> list[str]:
    """The arguments with each flag under its main name; values, and what follows `--`, stay as they are.

    Raises UsageError where one setting is given under two names.
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
                    raise UsageError(f"{typed[main]} and {name} are the same setting", "give one of them")
                argument = main + equals + value
            takes_next = option is not None and not option.is_flag and not equals
        else:
            takes_next = _ends_with_option(argument, options)
        found.append(argument)
        if takes_next:
            found += [value for value in [next(rest, None)] if value is not None]
    return found


def _ends_with_option(argument: str, options: Mapping[str, Any]) -> bool:
    """Whether an argument like -n or -qn leaves the value of its last flag to the next argument."""
    if not argument.startswith("-"):
        return False
    for position, letter in enumerate(argument[1:], start=2):
        option = options.get(f"-{letter}")
        if option is None or not option.is_flag:
            return option is not None and position == len(argument)
    return False


def with_options(verb: Callable[..., R]) -> Callable[..., R]:
    """Let `verb` take tables of settings and groups of options; see the module."""
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
            # typer has an empty list where a repeatable flag was not given
            given = table.read({n: value for n, value in own.items() if value != []}, FLAGS)
            values[name] = options_of(hints[name], ("flag", given)) if is_dataclass(hints[name]) else given
        return verb(**values)

    flat.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {p.name: p.annotation for p in parameters}
    del flat.__wrapped__  # or typer would look through to `verb`
    return flat


def _table_in(hint: Any) -> Table | None:
    """The settings behind one parameter of a verb; None for a parameter that typer is to see itself."""
    if is_dataclass(hint):
        return Table.of(hint)  # type: ignore[arg-type]
    if get_origin(hint) is not Annotated:
        return None
    tables = [extra for extra in get_args(hint)[1:] if isinstance(extra, Table)]
    return reduce(Table.__or__, tables) if tables else None


def _option(known: Setting) -> Any:
    """What typer is to know of a setting."""
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
    """The model of these flags, for one prompt at a time; freed at the end. Raises as `loading.load` does."""
    from emlocal.loading import load

    _go_offline_if_asked(options)
    with console.progress(quiet) as progress:
        loaded = load(options, sequences=sequences, progress=progress, warn=_warn(quiet))
    with _open(loaded, quiet):
        yield loaded.backend


@contextmanager
def open_for_batch(options: "EngineOptions", parallel: int | None, *, quiet: bool) -> Iterator["Loaded"]:
    """The same for many sequences, each with room of its own: `parallel`, or as memory allows."""
    from emlocal.loading import check_parallel, load_for_batch

    check_parallel(parallel)
    _go_offline_if_asked(options)
    with console.progress(quiet) as progress:
        loaded = load_for_batch(options, parallel, progress=progress, warn=_warn(quiet))
    with _open(loaded, quiet):
        yield loaded


def _go_offline_if_asked(options: "EngineOptions") -> None:
    if options.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"


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
    """The calibration of a flag. Raises as `read_calibration` does."""
    if path is None:
        return None
    from emlocal.methods.confidence import read_calibration

    return read_calibration(path)


def warn_of_mismatch(calibration: "Calibration | None", subject: "Subject") -> None:
    """Say where a calibration was made for other answers than these."""
    differing = None if calibration is None else calibration.mismatch(subject)
    if differing is not None:
        console.warn(differing)


def choose_parallel(model: "Loaded", asked: int | None, answers: int | None, *, quiet: bool) -> "Speed":
    """How many sequences at once, for so many answers at most, and how fast they are."""
    from emlocal.batch.run import Speed, best_parallel, measure_parallel
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
        why = "as asked" if asked else "the fewest that are nearly the fastest"
        console.note(f"{counted(chosen, 'sequence')} at once, {why}: {speed.tokens_per_second:.0f} tok/s")
    return Speed(chosen, speed.tokens_per_second)
