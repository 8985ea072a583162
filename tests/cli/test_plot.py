"""`emlocal plot` on the files of the other verbs."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Outcome
from tests.plotting.data import evaluation, rows, run, trace

Emlocal = Callable[..., Outcome]


def test_a_trace_of_generate(emlocal: Emlocal, tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    made = emlocal(
        "generate", "-m", tiny, "--em-inf", "--max-tokens", "9", "--seed", "7", "--trace", str(path), "hello"
    )
    assert made.code == 0, made.err
    shown = emlocal("plot", str(path))
    assert (shown.code, shown.err) == (0, "")
    assert "t.jsonl\n9 tokens, entropy" in shown.out
    drawn = emlocal("plot", str(path), "-o", str(tmp_path / "t.pdf"))
    assert (drawn.code, drawn.out) == (0, "")
    assert "plot written to" in drawn.err
    assert (tmp_path / "t.pdf").read_bytes().startswith(b"%PDF")


def test_an_evaluation(emlocal: Emlocal, tmp_path: Path) -> None:
    shown = emlocal("plot", str(evaluation(tmp_path / "e")))
    assert shown.code == 0
    assert "em-inf:paper" in shown.out
    assert not any(line != line.rstrip() for line in shown.out.splitlines())


@pytest.mark.parametrize("output", [(), ("-o", "x.png")])
def test_different_kinds_are_refused(emlocal: Emlocal, tmp_path: Path, output: tuple[str, ...]) -> None:
    paths = [str(run(tmp_path / "r", rows())), str(trace(tmp_path / "t.jsonl"))]
    done = emlocal("plot", *paths, *output)
    assert (done.code, done.out) == (2, "")
    assert "they cannot share a plot" in done.err


def test_a_file_that_is_no_picture_is_refused_before_anything_is_read(emlocal: Emlocal) -> None:
    done = emlocal("plot", "none", "-o", "x.gif")
    assert (done.code, done.out) == (2, "")
    assert "x.gif is not a picture" in done.err


def in_a_pipe(*paths: Path, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    command = [sys.executable, "-m", "emlocal", "plot", *map(str, paths)]
    return subprocess.run(command, env=kept | environment, capture_output=True, check=False, timeout=60)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes have another encoding there")
def test_a_pipe_has_eighty_columns_and_no_colours(tmp_path: Path) -> None:
    done = in_a_pipe(*(run(tmp_path / name, rows(9)) for name in "xy"), PYTHONIOENCODING="utf-8")
    assert (done.returncode, done.stderr) == (0, b"")
    lines = done.stdout.decode().splitlines()
    assert "\x1b" not in done.stdout.decode()
    assert lines[:2] == ["a x", "b y"]
    assert 70 < max(map(len, lines)) <= 80
    wide = in_a_pipe(tmp_path / "x", PYTHONIOENCODING="utf-8", COLUMNS="120")
    assert max(map(len, wide.stdout.decode().splitlines())) > 100


def test_an_encoding_without_blocks_is_one_line(tmp_path: Path) -> None:
    done = in_a_pipe(trace(tmp_path / "t.jsonl"), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"stdout's encoding, ascii," in done.stderr
