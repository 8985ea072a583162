"""Help pages and errors of wrong usage, in emlocal's own form. typer only parses.

A help page never cuts a flag off: a long one has its text on the next line. This module imports no settings,
because `emlocal --help` must be quick.
"""

import difflib
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from emlocal.errors import EmlocalError, UsageError

_WIDEST = 100  # columns of a help page
_FLAG_COLUMN = 26
"""Columns of the flags; the texts begin after them."""
_ALIKE = 0.75  # similarity of a flag that was probably meant
_NUMBERS = {"int": "a whole number", "integer": "a whole number", "float": "a number"}


class Command(TyperCommand):
    """A command with emlocal's help page."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(help_page(self, ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.allow_extra_args = True
        try:
            rest = super().parse_args(ctx, args)
        except _ERRORS["UsageError"] as error:
            error.ctx = error.ctx or ctx
            raise
        if ctx.args and not ctx.resilient_parsing:
            raise _too_many(ctx, self.params)
        return rest


class Group(TyperGroup):
    """A command with commands of its own, with emlocal's help page."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(help_page(self, ctx))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name not in self.commands and not name.startswith("-"):
            near = difflib.get_close_matches(name, self.commands, 2)
            listed = f"list the verbs: {ctx.command_path} --help"
            hint = f"did you mean {' or '.join(near)}?" if near else listed
            raise UsageError(f"{ctx.command_path} has no verb {name}", hint)
        return super().resolve_command(ctx, args)


# ------------------------------------------------------------------------------------------------- help pages


def help_page(command: Any, ctx: Any) -> str:
    """Returns the help of a command: usage, text, flags by panel, verbs by panel, examples."""
    from emlocal.console import colours_allowed

    width = min(shutil.get_terminal_size().columns, _WIDEST)
    bold = "\x1b[1m{}\x1b[0m" if colours_allowed(sys.stdout) else "{}"
    shown = [p for p in command.get_params(ctx) if not p.hidden]
    options = [p for p in shown if p.param_type_name == "option"]
    first = f"Usage: {ctx.command_path} {' '.join(usage(command, shown))}"
    wrapped = textwrap.wrap(first, width, subsequent_indent="       ", break_on_hyphens=False)
    lines = ["\n".join(wrapped).replace("Usage:", bold.format("Usage:"), 1)]
    for paragraph in (command.help or "").split("\f")[0].strip().split("\n\n"):
        lines += ["", *textwrap.wrap(" ".join(paragraph.split()), width)]
    sections: dict[str, list[tuple[str, str]]] = {
        "Arguments": [(metavar(p), said(p)) for p in shown if p.param_type_name == "argument"]
    }
    verbs: Mapping[str, Any] = command.commands if isinstance(command, TyperGroup) else {}
    for each in verbs.values():
        title = each.rich_help_panel
        text = (each.short_help or each.help or "").split("\n\n")[0]
        sections.setdefault(title if isinstance(title, str) else "Verbs", []).append((each.name, text))
    panels: dict[str, list[tuple[str, str]]] = {"Options": []}
    for option in options:
        panel = option.rich_help_panel or "Options"
        panels.setdefault(panel, []).append((_spelt(option), said(option)))
    sections |= panels
    for title, rows in sections.items():
        if rows:
            longest = max(len(name) for name, _ in rows) + 4
            column = _FLAG_COLUMN if title in panels else min(longest, _FLAG_COLUMN)
            lines += ["", bold.format(f"{title}:")]
            lines += [line for row in rows for line in _row(*row, column, width)]
    if command.epilog:
        title, *examples = command.epilog.splitlines()
        lines += ["", bold.format(title), *(f"  {example}" for example in examples)]
    return "\n".join(lines) + "\n"


def _row(name: str, text: str, column: int, width: int) -> Iterator[str]:
    """Yields the lines of a flag, an argument or a verb: its name whole, and its text beside or below it."""
    first = f"  {name}"
    lines = textwrap.wrap(" ".join(text.split()), width - column, break_on_hyphens=False)
    if len(first) > column - 2 or not lines:
        yield first
    else:
        yield f"{first:<{column}}{lines.pop(0)}"
    yield from (" " * column + line for line in lines)


def _spelt(option: Any) -> str:
    """Returns a flag in all its spellings, with its value: "-n, --samples N"."""
    names = sorted(option.opts, key=len)
    indent = "" if len(names[0]) == 2 else "    "
    value = "" if option.is_flag else f" {metavar(option)}"
    return indent + ", ".join([*names, *option.secondary_opts]) + value


def usage(command: Any, parameters: Sequence[Any]) -> Iterator[str]:
    """Yields what follows the name of a command: required flags, [FLAGS], and the arguments."""
    if isinstance(command, TyperGroup):
        yield "VERB …"
        return
    options = [p for p in parameters if p.param_type_name == "option"]
    for option in options:
        if option.required:
            yield f"{max(option.opts, key=len)} {metavar(option)}"
    if any(not option.required for option in options):
        yield "[FLAGS]"
    for argument in parameters:
        if argument.param_type_name == "argument":
            yield metavar(argument) if argument.required else f"[{metavar(argument)}]"


def metavar(parameter: Any) -> str:
    """Returns the name of a parameter's value in help: N, X, TEXT, FILE, NAME for one of several names."""
    if parameter.metavar:
        return str(parameter.metavar)
    if parameter.param_type_name == "argument":
        return str(parameter.name).upper()
    kind = str(parameter.type.name).lower()
    known = {"choice": "NAME", "int": "N", "integer": "N", "float": "X", "str": "TEXT", "text": "TEXT"}
    return known.get(kind, "PATH")


def said(parameter: Any, quote: str = "") -> str:
    """Returns the help text with the choices in `quote`, "Required" and the default."""
    text, bracket, rest = (parameter.help or "").partition(" (default: ")
    note = f"{bracket}{rest}".strip()
    choices = _choices(parameter)
    if choices:
        text += f" One of {', '.join(f'{quote}{_value(c)}{quote}' for c in choices)}."
    if parameter.param_type_name == "option" and parameter.required:
        text += " Required."
    default = parameter.default
    shown = parameter.show_default and default not in (None, False, (), [])
    if shown and not note and not callable(default):
        default = max(parameter.opts, key=len) if default is True else _value(default)
        note = f"(default: {default})"
    return f"{text} {note}".strip()


def _choices(parameter: Any) -> Sequence[Any]:
    """Returns the values that a parameter may have; none if it may have others."""
    return parameter.type.choices if parameter.type.name == "choice" else ()


def _value(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


# ------------------------------------------------------------------------------------------------ wrong usage

_ERRORS = vars(import_module(typer.BadParameter.__module__))
"""typer's errors; some versions keep them in a package of their own."""


def is_usage(error: Exception) -> bool:
    """Whether typer raised this error."""
    return isinstance(error, _ERRORS["ClickException"])


def asks_for_help(error: Exception) -> bool:
    """Whether a command without arguments wants its help page shown."""
    return isinstance(error, _ERRORS["NoArgsIsHelpError"])


def explained(error: Any) -> EmlocalError:
    """Returns an error of typer as emlocal words it, with a fix."""
    ctx = error.ctx
    path = "emlocal" if ctx is None else ctx.command_path
    command = None if ctx is None else ctx.command
    page = f"list the flags: {path} --help"
    if isinstance(error, _ERRORS["NoSuchOption"]):
        typed = error.option_name
        near = [] if command is None else _near(typed, command)
        hint = f"did you mean {' or '.join(near)}?" if near else page
        return UsageError(f"{path} has no flag {typed}", hint)
    if isinstance(error, _ERRORS["MissingParameter"]) and error.param is not None:
        is_flag = error.param.param_type_name == "option"
        name = max(error.param.opts, key=len) if is_flag else metavar(error.param)
        examples = (command.epilog or "").splitlines()[1:] if command is not None else []
        return UsageError(f"{path} needs {name}", examples[0] if examples else page)
    if isinstance(error, _ERRORS["BadParameter"]) and error.param is not None:
        name = max(error.param.opts, key=len)
        value, _, kind = error.message.rpartition(" is not a valid ")
        choices = _choices(error.param)
        if choices:
            value, _, _ = error.message.rpartition(" is not one of ")
            return UsageError(
                f"{name} is {_quoted(value)}; it must be one of {', '.join(map(str, choices))}", page
            )
        if value:
            wanted = _NUMBERS.get(kind.rstrip("."), kind.rstrip("."))
            return UsageError(f"{name} is {_quoted(value)}; it must be {wanted}", page)
    if isinstance(error, _ERRORS["BadOptionUsage"]):
        needs = "requires" in error.message
        what = "needs a value" if needs else "takes no value"
        return UsageError(f"{error.option_name} {what}", page)
    message = re.sub(r"\.$", "", error.format_message())
    return UsageError(message[:1].lower() + message[1:], page)


def _quoted(value: str) -> str:
    """Returns a value in double quotes, as messages have them; typer gives it as Python writes it."""
    return f'"{value[1:-1]}"' if value[:1] == "'" == value[-1:] else value


def _near(typed: str, command: Any) -> list[str]:
    """Returns the flags that a wrong flag probably means: those that it begins, else the most alike."""
    flags = [name for p in command.params for name in (*p.opts, *p.secondary_opts) if name.startswith("--")]
    name = typed.lstrip("-").replace("_", "-")
    if len(name) < 2:
        return []
    begun = [flag for flag in flags if flag.removeprefix("--").startswith(name)]
    bare = [flag.removeprefix("--") for flag in flags]
    alike = difflib.get_close_matches(name, bare, 3, cutoff=_ALIKE)
    return (begun or [f"--{each}" for each in alike])[:3]


def _too_many(ctx: Any, parameters: Sequence[Any]) -> UsageError:
    """Returns the error for more arguments than the command takes."""
    left, path = " ".join(ctx.args), ctx.command_path
    arguments = [p for p in parameters if p.param_type_name == "argument"]
    if not arguments:
        return UsageError(f"{path} takes flags alone, and {left} is not one", f"list them: {path} --help")
    name, value = metavar(arguments[-1]), ctx.params[arguments[-1].name]
    return UsageError(
        f"{path} takes one {name}, and {left} comes after it",
        f'give one {name}; put quotes around spaces: "{value} {left}"',
    )
