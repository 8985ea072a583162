"""Writes docs/cli.md from the code: every verb, argument and flag of the command line.

python docs/reference.py            (a test fails if docs/cli.md differs from this output)
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from emlocal.cli.app import EXAMPLES, GROUPS, PANELS, VERBS, build
from emlocal.cli.options import ALIASES
from emlocal.cli.usage import metavar, said, usage

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
    """Returns the text of docs/cli.md."""
    lines = [HEAD, "| | verb | what it does |", "|---|---|---|"]
    lines += [
        f"| {panel} | [`emlocal {verb}`](#emlocal-{verb}) | {_cell(summary)} |"
        for panel, verbs in PANELS.items()
        for verb, summary in verbs.items()
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
    """Returns each flag that other programs name differently, with those names."""
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
    yield from ("```", " ".join([name, *usage(command, options + arguments)]), "```", "")
    yield _prose(command.help)
    yield from ("", "```", *EXAMPLES[name.removeprefix("emlocal ")], "```")
    if arguments:
        yield from ("", "| argument | |", "|---|---|")
        for argument in arguments:
            yield f"| `{metavar(argument)}` | {_cell(said(argument, '`'))} |"
    panels: dict[str, list[Any]] = {}
    for option in options:
        panels.setdefault(getattr(option, "rich_help_panel", None) or "Options", []).append(option)
    for panel, members in panels.items():
        yield from ("", f"| {panel} | |", "|---|---|")
        for option in members:
            yield f"| {_names(option)} | {_cell(said(option, '`'))} |"


def _names(option: Any) -> str:
    """Returns the flag in all its spellings, short ones first, with the name of its value."""
    names = sorted(option.opts, key=len) + list(option.secondary_opts)
    value = "" if option.is_flag else f" {metavar(option)}"
    names[-1] += value
    return ", ".join(f"`{name}`" for name in names)


def _prose(text: str) -> str:
    """Returns a docstring as Markdown paragraphs.

    Text from \\f on is for programmers and left out.
    """
    return _escaped(inspect.cleandoc(text or "").split("\f")[0].strip())


def _cell(text: str) -> str:
    """Returns the text as one line of a table."""
    return _escaped(re.sub(r"\s+", " ", text)).replace("|", "\\|")


def _escaped(text: str) -> str:
    return re.sub(r"([<*\[])", r"\\\1", text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
