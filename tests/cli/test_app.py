"""Behaviour of all verbs: help, versions, errors, exit codes."""

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module

import pytest

from emlocal import __version__
from emlocal.cli.app import GROUPS, VERBS
from tests.cli.conftest import Outcome

Emlocal = Callable[..., Outcome]


def test_version_and_help(emlocal: Emlocal) -> None:
    assert emlocal("--version").out == f"emlocal {__version__}\n"
    text = emlocal("--help").out
    for verb in VERBS:
        assert f" {verb} " in text
    assert emlocal("generate", "--help").code == 0


def test_the_list_of_verbs_says_what_the_verbs_say() -> None:
    for name, summary in VERBS.items():
        module = import_module(f"emlocal.cli.{name}")
        said = module.app.info.help if name in GROUPS else vars(module)[name].__doc__
        assert said.splitlines()[0] == summary


@pytest.mark.parametrize(
    "arguments", [["generate", "--nonsense"], ["nonsense"], ["generate", "--temp", "x", "y"]]
)
def test_what_click_refuses_exits_with_2(emlocal: Emlocal, arguments: list[str]) -> None:
    done = emlocal(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert "Traceback" not in done.err


def test_debug_shows_the_traceback_wherever_it_stands(emlocal: Emlocal) -> None:
    quiet = emlocal("generate", "-m", "/no/such.gguf", "x")
    loud = emlocal("generate", "-m", "/no/such.gguf", "x", "--debug")
    assert "Traceback" not in quiet.err
    assert "Traceback" in loud.err
    assert quiet.code == loud.code != 0


def test_chat_through_a_pipe_in_a_process_of_its_own(tiny: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "emlocal", "chat", "--em-inf", "-m", tiny, "--seed", "1", "--max-tokens", "8"],
        input=b"hi\n/compare\n/stats\n/exit\n",
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0
    assert b"EM off: " in done.stdout
    assert b"EM on: " in done.stdout
    assert b"chat: 1 answer, 8 tokens" in done.stderr
    assert b"\x1b" not in done.stderr


def test_chat_through_a_pipe_fails_if_a_command_failed(emlocal: Emlocal, tiny: str) -> None:
    done = emlocal("chat", "-m", tiny, "--max-tokens", "4", stdin="/nonsense\nhi\n")
    assert done.code == 1
    assert "there is no command /nonsense" in done.err


def test_a_reader_that_has_gone_ends_the_program_quietly(tiny: str) -> None:
    command = f"{sys.executable} -m emlocal generate -q -m {tiny} --max-tokens 200 hello | head -c 1"
    done = subprocess.run(
        ["/bin/sh", "-c", command], capture_output=True, check=False, timeout=120, stdin=subprocess.DEVNULL
    )
    assert b"Traceback" not in done.stderr
    assert b"error" not in done.stderr
