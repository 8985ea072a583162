"""Every command of README.md, docs/tutorial.md and docs/confidence.md runs.

They run in the page's order, in one folder.
"""

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, Command, commands

BY_CI = "runs in .ci/run, of which these tests are a part"
EXCLUDED = {
    "README.md": {
        'pip install -c constraints.txt -e ".[test]" && pytest -n 2 --dist loadfile': BY_CI,
    },
    "docs/tutorial.md": {
        'pip install ".[torch,eval]"': "the tests' own environment has these packages",
    },
    "docs/confidence.md": {},
}
"""Commands that are not run here, with the reason. One that no longer is on its page is an error."""

INSTALL = "pip install . && "
"""Beginning of the README's first command; the rest of it is run."""

SECONDS = 1800
"""Time limit of one command: a busy machine is not a defect."""

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(shutil.which("bash") is None, reason="the pages' commands are written for bash"),
]


@pytest.mark.parametrize("name", EXCLUDED)
def test_every_command_of_the_page_runs(name: str, home: dict[str, str], tmp_path: Path) -> None:
    found = commands(ROOT / name)
    excluded = EXCLUDED[name]
    gone = excluded.keys() - {command.text for command in found}
    assert not gone, f"{name} no longer has {gone}: take it out of EXCLUDED"
    for command in found:
        if command.text not in excluded:
            run(name, replace(command, text=command.text.removeprefix(INSTALL)), home, tmp_path)


def test_the_first_command_installs() -> None:
    assert commands(ROOT / "README.md")[0].text.startswith(INSTALL)


def run(name: str, command: Command, home: dict[str, str], folder: Path) -> str:
    """Runs a command like a shell; text for a chat comes through a pipe, then /exit.

    Returns stdout and stderr.
    """
    typed = "".join(f"{line}\n" for line in (*command.typed, "/exit")) if command.typed else ""
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command.text],
        cwd=folder,
        env=os.environ | home,
        input=typed,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=SECONDS,
        check=False,
    )
    if shown := os.environ.get("EMLOCAL_SHOW_DOCS"):  # shows what the pages should show
        with Path(shown).open("a", encoding="utf-8") as file:
            file.write(f"$ {command.text}\n{done.stdout}{done.stderr}\n")
    assert done.returncode == 0, f"{name}:{command.line}: $ {command.text}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def test_a_chat_is_fed_what_the_page_types(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```console\n$ one \\\n    two\n>>> Hi\nout $ put\n>>> /stats\n$ three\n```\n")
    assert commands(page) == [Command(2, "one \\\n    two", ("Hi", "/stats")), Command(7, "three")]
