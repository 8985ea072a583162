"""SIGTERM to a running emlocal: it unwinds, leaves nothing behind, and says 143 as shells do."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.tiny_gguf import u32, write_tiny_gguf

EMLOCAL = [sys.executable, "-m", "emlocal"]


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_in_an_answer_the_trace_is_whole_and_no_temporary_file_stays(tmp_path: Path) -> None:
    model, folder = tmp_path / "tiny.gguf", tmp_path / "traces"
    write_tiny_gguf(model, llama__context_length=u32(65_536))
    folder.mkdir()
    size = ["--context", "60000", "--max-tokens", "50000", "--logit-bias", "2=-inf"]
    command = [*EMLOCAL, "generate", "-m", str(model), *size, "--trace", str(folder / "t.jsonl"), "-q", "hi"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(100)  # it is answering
        assert [path.suffix for path in folder.iterdir()] == [".tmp"]
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 143
    assert [path.name for path in folder.iterdir()] == ["t.jsonl"]
    lines = [json.loads(line) for line in (folder / "t.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(len(lines)))
    assert 0 < len(lines) < 50_000


def test_between_answers_it_leaves_at_once(tmp_path: Path) -> None:
    model, said = write_tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "stderr"
    with (
        said.open("wb") as stderr,
        subprocess.Popen(
            [*EMLOCAL, "chat", "-m", str(model)], stdin=subprocess.PIPE, stderr=stderr
        ) as process,
    ):
        wait_until(lambda: "llama.cpp" in said.read_text())  # loaded; it waits for a message
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
    assert process.returncode == 143
    assert "Traceback" not in said.read_text()


def test_bench_ends_after_the_round(tmp_path: Path) -> None:
    model, said = write_tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "stderr"
    command = [*EMLOCAL, "bench", "-m", str(model), "--rounds", "100000", "--tokens", "2", "--json"]
    with (
        said.open("wb") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr) as process,
    ):
        wait_until(lambda: "decoding" in said.read_text())
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (143, b"")
    assert "Traceback" not in said.read_text()
    assert "ignored" not in said.read_text()  # as in "Exception ignored on calling ctypes callback function"
