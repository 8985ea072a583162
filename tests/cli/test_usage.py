"""Help pages and errors of wrong usage: one form for all, and no flag is cut off."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from emlocal.cli.app import EXAMPLES, VERBS, build
from tests.cli.conftest import Outcome

Emlocal = Callable[..., Outcome]


def _commands() -> Iterator[tuple[str, Any]]:
    """Yields every verb, and the verbs of the groups, with its command."""
    for verb in VERBS:
        root: Any = typer.main.get_command(build([verb]))
        command = root.commands[verb]
        yield verb, command
        for name, inner in getattr(command, "commands", {}).items():
            yield f"{verb} {name}", inner


@pytest.mark.parametrize(("path", "command"), [*_commands()])
def test_a_help_page_of_80_columns_has_every_flag_whole(
    emlocal: Emlocal, monkeypatch: pytest.MonkeyPatch, path: str, command: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    page = emlocal(*path.split(), "--help").out
    words = page.replace(",", " ").split()
    for option in command.params:
        if option.param_type_name == "option":
            assert {*option.opts, *option.secondary_opts} <= {*words}
    body, _, examples = page.partition("\nExamples:\n")
    assert [line for line in body.splitlines() if len(line) > 80] == []
    assert examples.splitlines() == [f"  {example}" for example in EXAMPLES[path]]


def test_the_help_page_of_emlocal_has_its_verbs_by_panel(emlocal: Emlocal) -> None:
    page = emlocal("--help").out
    assert (
        page.index("\nAsk:\n  generate ") < page.index("\nTrain:\n  finetune ") < page.index("\nOptions:\n")
    )
    assert emlocal().err.rstrip() == page.rstrip()
    assert emlocal().code == 2


@pytest.mark.parametrize(
    ("arguments", "error", "fix"),
    [
        (
            "generate --max-token 5 x",
            "emlocal generate has no flag --max-token",
            "did you mean --max-tokens?",
        ),
        ("generate --max-new-token 5 x", "has no flag --max-new-token", "did you mean --max-tokens?"),
        ("generate --repeat 5 x", "no flag --repeat", "did you mean --repeat-penalty or --repeat-last-n?"),
        ("generate --frobnicate x", "has no flag --frobnicate", "list the flags: emlocal generate --help"),
        ("generate -x y", "has no flag -x", "list the flags: emlocal generate --help"),
        ("--frobnicate", "emlocal has no flag --frobnicate", "list the flags: emlocal --help"),
        ("genrate x", "emlocal has no verb genrate", "did you mean generate?"),
        ("frob", "emlocal has no verb frob", "list the verbs: emlocal --help"),
        ("models shw", "emlocal models has no verb shw", "did you mean show?"),
        ("models list --jso", "emlocal models list has no flag --jso", "did you mean --json?"),
        ("generate -n x y", '--samples is "x"; it must be a whole number', "emlocal generate --help"),
        ("generate --temp x y", '--temp is "x"; it must be a number', "emlocal generate --help"),
        (
            "generate --em-where x y",
            '--em-where is "x"; it must be one of all, thought, answer',
            "emlocal generate --help",
        ),
        ("generate -f", "-f needs a value", "list the flags: emlocal generate --help"),
        ("generate --raw=3 x", "--raw takes no value", "list the flags: emlocal generate --help"),
        ("generate a b c", "takes one PROMPT, and b c comes after it", 'put quotes around spaces: "a b c"'),
        ("finetune --data a -o b c", "takes flags alone, and c is not one", "emlocal finetune --help"),
        ("batch", "emlocal batch needs INPUT", EXAMPLES["batch"][0]),
        ("eval", "emlocal eval needs --task", EXAMPLES["eval"][0]),
        ("models show", "emlocal models show needs NAME", EXAMPLES["models show"][0]),
    ],
)
def test_wrong_usage_is_said_in_two_lines_and_exits_with_2(
    emlocal: Emlocal, arguments: str, error: str, fix: str
) -> None:
    done = emlocal(*arguments.split())
    first, second = done.err.splitlines()
    assert first.startswith("error: ")
    assert first.endswith(error)
    assert second.startswith("  fix: ")
    assert second.endswith(fix)
    assert (done.code, done.out) == (2, "")


@pytest.mark.parametrize(
    "arguments",
    [
        "generate -m nosuch x",
        "generate -m ./nosuch.gguf x",
        "generate -m {folder} x",
        "generate --adapter nosuch x",
        "generate -f nosuch.txt",
        "models show nosuch",
        "adapter show nosuch",
        "adapter show {file}",
        "batch nosuch.jsonl",
        "eval --task gsm8k --data nosuch.jsonl",
        "finetune --data nosuch.jsonl -o out",
        "chat --load nosuch",
        "plot nosuch",
    ],
)
def test_a_name_that_means_nothing_exits_with_2(emlocal: Emlocal, tmp_path: Path, arguments: str) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("no adapter")
    done = emlocal(*arguments.format(folder=tmp_path, file=file).split())
    assert done.err.startswith("error: ")
    assert "\n  fix: " in done.err
    assert done.code == 2


def test_a_file_that_is_there_but_broken_exits_with_1(emlocal: Emlocal, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(60))
    assert emlocal("generate", "-m", str(broken), "x").code == 1
