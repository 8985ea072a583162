"""Ctrl-C and SIGTERM end the real command, even while its model's chat template is busy."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.attack.templates import BUILDS, COMPILATION, STRINGS
from tests.tiny_gguf import write_tiny_gguf

ENDLESS = {
    "equal": BUILDS["list"] + "{{ ns.a == ns.b }}",
    "strip": STRINGS["strip"],
    "at once": COMPILATION["folded: lists"],
}
NOTHING = Path(os.devnull)
PATIENT = """
from emlocal.models import templates
templates.MAX_SECONDS = 60.0
from emlocal.__main__ import main
main()
"""
"""emlocal with enough time for a signal to come first on a busy machine."""
BUSY = 0.3
"""Processor seconds that a template has used when the signal comes."""


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("equal", signal.SIGINT),
        ("strip", signal.SIGTERM),
        ("at once", signal.SIGINT),
        ("at once", signal.SIGTERM),
    ],
)
def test_generate(name: str, number: int, tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "m.gguf", chat_template=ENDLESS[name])
    code, said = interrupted(["generate", "-q", "-m", str(model), "hi"], NOTHING, number)
    assert (code, said) == (128 + number, "")


def test_batch(tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "m.gguf", chat_template=ENDLESS["equal"])
    lines = tmp_path / "in.jsonl"
    lines.write_text('{"prompt": "hi"}\n' * 3)
    out = tmp_path / "out.jsonl"
    code, _ = interrupted(["batch", str(lines), "-m", str(model), "-o", str(out)], NOTHING, signal.SIGTERM)
    assert code == 143
    assert not out.read_text()  # unanswered lines have no row, so the next run answers them


def test_chat_goes_on_after_ctrl_c(tmp_path: Path) -> None:
    template = "{% if messages | length == 1 %}" + ENDLESS["equal"] + "{% endif %}"
    model = write_tiny_gguf(tmp_path / "m.gguf", chat_template=template)
    typed = tmp_path / "typed"
    typed.write_text("hi\n/system\n/exit\n")
    code, said = interrupted(["chat", "-m", str(model)], typed, signal.SIGINT)
    assert code == 0
    assert "stopped before the first token" in said
    assert "no system message is set" in said


def interrupted(command: list[str], typed: Path, number: int) -> tuple[int, str]:
    """Returns the exit code and stderr of a command that gets a signal once its template is running."""
    with typed.open() as stdin:
        program = subprocess.Popen(
            [sys.executable, "-c", PATIENT, *command],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    until = time.monotonic() + 60
    while not any(seconds_of(child) > BUSY for child in children(program.pid)):
        assert program.poll() is None, program.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    program.send_signal(number)
    _, said = program.communicate(timeout=60)
    return program.returncode, said


def children(pid: int) -> list[int]:
    """Returns the processes that a process started."""
    try:
        return [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:
        return []


def seconds_of(pid: int) -> float:
    """Returns the processor seconds that a process has used."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
