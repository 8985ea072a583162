"""SIGTERM to a running emlocal: it unwinds, leaves nothing behind, and exits with 143 as shells do."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.tiny_gguf import u32, write_tiny_gguf
from tests.tiny_pair import write_pair

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


def test_finetune_is_stopped_with_a_checkpoint_and_goes_on(tmp_path: Path) -> None:
    pair, out, said = write_pair(tmp_path, "llama"), tmp_path / "out", tmp_path / "stderr"
    data = tmp_path / "prompts.txt"
    data.write_text("say a\nsay b\nsay c\n")
    command = [*EMLOCAL, "finetune", "-m", str(pair.gguf), "--data", str(data), "-o", str(out)]
    command += ["--steps", "100000", "--save-every", "100000", "--prompts-per-step", "2", "--max-tokens", "8"]
    command += ["--threads", "1", "--dtype", "float32", "--rank", "4", "--learning-rate", "0.000001"]
    command += ["--max-length-change", "1000", "--max-repetition", "1", "--max-kl", "0"]
    environment = os.environ | {f"EMLOCAL_{kind}_DIR": str(tmp_path / kind) for kind in ("CACHE", "DATA")}

    def steps() -> list[int]:
        if not (out / "metrics.jsonl").exists():
            return []
        return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]

    done = 0
    for more, sent, code in (([], signal.SIGINT, 130), (["--resume"], signal.SIGTERM, 143)):
        with (
            said.open("wb") as stderr,
            subprocess.Popen([*command, *more], env=environment, stderr=stderr) as p,
        ):
            wait_until(lambda row=f"{done + 3:>4}/100000": row in said.read_text())  # type: ignore[misc]
            p.send_signal(sent)
            p.wait(timeout=60)
        text = said.read_text()
        assert p.returncode == code
        assert f"stopped ({out}); resume with the same command and --resume" in text
        assert "Traceback" not in text
        assert (f"resuming after step {done}" in text) == bool(more)
        assert steps() == list(range(len(steps())))
        newest = max(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").iterdir())
        assert done + 3 < newest == len(steps())
        assert (out / "adapter_model.safetensors").exists()
        assert not list(out.rglob("*.tmp"))
        done = newest
