"""Write docs/cli.md: every verb, argument and flag of the command line, from the code.

python docs/reference.py            (a test fails when docs/cli.md is not what this writes)
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from emlocal.cli.app import GROUPS, VERBS, build
from emlocal.cli.options import ALIASES

PAGE = Path(__file__).parent / "cli.md"

HEAD = """\
# Command line reference

<!-- Written by `python docs/reference.py` from emlocal/cli. Change the help texts there, not this page. -->

`emlocal VERB --help` shows the same in a terminal. New here? The [tutorial](tutorial.md) comes first.

- Every verb takes `-h` or `--help`. `--debug`, before or after the verb, shows the traceback of an error;
  `emlocal --version` says which version this is.
- Flags of model, sampling, entropy minimization and confidence may stand in `config.toml`, without their
  dashes ([tour.md](tour.md#settings-that-stay)). Other programs' names of flags work, too
  ([list](#other-names)).
- Answers go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 Ctrl-C.
- [Short names of models, files and the hub](models.md), [sampling flags in their order](sampling.md),
  [training flags](finetune.md), [error messages](troubleshooting.md).
"""


def page() -> str:
    """The whole of docs/cli.md."""
    lines = [HEAD, "| verb | what it does |", "|---|---|"]
    lines += [
        f"| [`emlocal {verb}`](#emlocal-{verb}) | {_cell(summary)} |" for verb, summary in VERBS.items()
    ]
    for verb in VERBS:
        root: Any = typer.main.get_command(build([verb]))
        lines += _verb(f"emlocal {verb}", root.commands[verb])
        if verb in GROUPS:
            for name, command in root.commands[verb].commands.items():
                lines += _verb(f"emlocal {verb} {name}", command, level=3)
    lines += ["", "## Other names", "", "| flag | also |", "|---|---|"]
    lines += [f"| `{flag}` | {', '.join(f'`{name}`' for name in names)} |" for flag, names in _others()]
    return "\n".join(lines) + "\n"


def _others() -> list[tuple[str, list[str]]]:
    """Each flag that other programs have under other names, and those."""
    found: dict[str, list[str]] = {}
    for verb in VERBS:
        for name, flag in ALIASES.get(verb, {}).items():
            if name not in found.setdefault(flag, []):
                found[flag].append(name)
    return sorted(found.items())


def _verb(name: str, command: Any, level: int = 2) -> Iterator[str]:
    yield from ("", f"{'#' * level} {name}", "")
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    options = [p for p in options if not getattr(p, "hidden", False)]
    yield from ("```", " ".join([name, *_usage(command, arguments, options)]), "```", "")
    yield _prose(command.help)
    if arguments:
        yield from ("", "| argument | |", "|---|---|")
        for argument in arguments:
            yield f"| `{_metavar(argument)}` | {_said(argument)} |"
    panels: dict[str, list[Any]] = {}
    for option in options:
        panels.setdefault(getattr(option, "rich_help_panel", None) or "Options", []).append(option)
    for panel, members in panels.items():
        yield from ("", f"| {panel} | |", "|---|---|")
        for option in members:
            yield f"| {_names(option)} | {_said(option)} |"


def _usage(command: Any, arguments: list[Any], options: list[Any]) -> Iterator[str]:
    """What must be given, and where the rest goes."""
    if getattr(command, "commands", None):
        yield "VERB …"
        return
    for option in options:
        if option.required:
            yield f"{max(option.opts, key=len)} {_metavar(option)}"
    if any(not option.required for option in options):
        yield "[FLAGS]"
    for argument in arguments:
        yield _metavar(argument) if argument.required else f"[{_metavar(argument)}]"


def _names(option: Any) -> str:
    """The flag in all its spellings, short ones first, with the name of its value."""
    names = sorted(option.opts, key=len) + list(option.secondary_opts)
    value = "" if option.is_flag else f" {_metavar(option)}"
    names[-1] += value
    return ", ".join(f"`{name}`" for name in names)


def _metavar(parameter: Any) -> str:
    if parameter.metavar:
        return str(parameter.metavar)
    if parameter.param_type_name == "argument":
        return str(parameter.name).upper()
    kind = str(parameter.type.name).lower()
    known = {"choice": "NAME", "int": "N", "integer": "N", "float": "X", "str": "TEXT", "text": "TEXT"}
    return known.get(kind, "PATH")


def _said(parameter: Any) -> str:
    """The help text with what typer says beside it: the choices, that it is required, the default."""
    text, bracket, rest = (parameter.help or "").partition(" (default: ")
    note = f"{bracket}{rest}".strip()
    choices = getattr(parameter.type, "choices", None)
    if choices:
        text += f" One of {', '.join(f'`{_value(c)}`' for c in choices)}."
    if parameter.param_type_name == "option" and parameter.required:
        text += " Required."
    default = parameter.default
    shown = getattr(parameter, "show_default", True) and default not in (None, False, (), [])
    if shown and not note and not callable(default):
        default = max(parameter.opts, key=len) if default is True else _value(default)
        note = f"(default: {default})"
    return _cell(f"{text} {note}".strip())


def _value(value: Any) -> Any:
    return getattr(value, "value", value)


def _prose(text: str) -> str:
    """A docstring as Markdown paragraphs; \\f and what follows it is for programmers."""
    return _escaped(inspect.cleandoc(text or "").split("\f")[0].strip())


def _cell(text: str) -> str:
    """One line of text in a table."""
    return _escaped(re.sub(r"\s+", " ", text)).replace("|", "\\|")


def _escaped(text: str) -> str:
    return re.sub(r"([<*\[])", r"\\\1", text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
