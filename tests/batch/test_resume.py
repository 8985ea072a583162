"""A run that is killed at any point and resumed ends like an undisturbed one."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from emlocal.batch.lines import is_error
from tests.batch.batches import timeless
from tests.batch.resumed import PLACES

REPOSITORY = Path(__file__).parents[2]
BAD = [b"broken", b'{"prompt": 5}', b'{"prompt": "caf\xe9"}', b'{"prompt": "x", "temprature": 1}', b"broken"]


def _lines() -> list[bytes]:
    """Returns sixty lines: named, nameless, repeated, bad."""
    lines = [
        json.dumps(
            {"custom_id": f"q{i}", "prompt": "x" * (i * 37 % 90), "max_tokens": 1 + i * 7 % 12, "i": i}
        )
        for i in range(1, 46)
    ]
    lines += ['"the same"'] * 4 + ['{"messages": [{"role": "user", "content": "hi ü"}], "max_tokens": 3}'] * 4
    lines += ['{"custom_id": "q7", "prompt": "a name of another line"}', '{"custom_id": "q8", "prompt": ""}']
    found = [line.encode() for line in lines] + BAD
    random.Random(4).shuffle(found)
    assert len(found) == 60
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lines") / "in.jsonl"
    path.write_bytes(b"\n".join(_lines()))
    return path


@pytest.fixture(scope="module")
def undisturbed(source: Path) -> list[dict[str, Any]]:
    output = source.with_name("undisturbed.jsonl")
    assert _go(source, output).splitlines() == ["killed 0", "end"]
    return _read(output)


METHOD = "self-consistency:2"


def _command(source: Path, output: Path, *moments: str, method: str = METHOD) -> list[str]:
    return [sys.executable, "-m", "tests.batch.resumed", method, str(source), str(output), *moments]


def _go(source: Path, output: Path, *moments: str, method: str = METHOD) -> str:
    done = subprocess.run(
        _command(source, output, *moments, method=method),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _read(output: Path) -> list[dict[str, Any]]:
    raw = output.read_bytes()
    assert raw.endswith(b"\n")
    return [json.loads(line) for line in raw.splitlines()]


def _check(output: Path, undisturbed: list[dict[str, Any]]) -> None:
    """Checks that there is one row for each line, none torn, all as in the undisturbed run."""
    found = _read(output)
    assert len(found) == len({row["key"] for row in found}) == 60
    assert timeless(found) == timeless(undisturbed)


def test_the_undisturbed_run(undisturbed: list[dict[str, Any]]) -> None:
    assert len(undisturbed) == len({row["key"] for row in undisturbed}) == 60
    assert sum(map(is_error, undisturbed)) == len(BAD) + 2
    assert len({row["text"] for row in undisturbed if "text" in row}) > 45


@pytest.mark.parametrize("place", PLACES)
def test_killed_at_every_kind_of_place(place: str, source: Path, undisturbed: Any, tmp_path: Path) -> None:
    """Kills each run thirty times, at the first to the fourth visit of a place."""
    output = tmp_path / "out.jsonl"
    moments = random.Random(place)
    first, last = {"open": (1, 1), "step": (1, 4)}.get(
        place, (2, 4)
    )  # some writes and syncs belong to the opening
    counts = [moments.randint(first, last) for _ in range(30)]
    said = _go(source, output, *(text for count in counts for text in (place, str(count))))
    deaths = int(said.split()[1])
    assert deaths == 30
    _check(output, undisturbed)


def test_killed_anywhere(source: Path, undisturbed: Any, tmp_path: Path) -> None:
    moments = random.Random(2)
    drawn = [(moments.choice(PLACES), moments.randint(1, 5)) for _ in range(40)]
    output = tmp_path / "out.jsonl"
    said = _go(source, output, *(str(part) for moment in drawn for part in moment))
    assert int(said.split()[1]) >= 10
    _check(output, undisturbed)


def test_a_method_of_several_rounds_killed_anywhere(tmp_path: Path) -> None:
    """Tests votes that end after one, two or three waves; a likely end token makes texts whole."""
    source, whole, output = (tmp_path / name for name in ("in.jsonl", "whole.jsonl", "out.jsonl"))
    lines = [{"custom_id": f"q{i}", "prompt": "x" * (i * 37 % 90), "max_tokens": 30} for i in range(1, 61)]
    source.write_text("".join(json.dumps(line | {"logit_bias": {"256": 9}}) + "\n" for line in lines))
    method = "vote:5:wave=2:sure=0.5:extract=none"
    _go(source, whole, method=method)
    moments = random.Random(4)
    drawn = [(moments.choice(PLACES), moments.randint(1, 5)) for _ in range(30)]
    said = _go(source, output, *(str(part) for moment in drawn for part in moment), method=method)
    assert int(said.split()[1]) >= 10
    _check(output, _read(whole))
    assert {row["drawn"] for row in _read(output)} == {2, 4, 5}


def test_killed_from_outside_at_random_moments(source: Path, undisturbed: Any, tmp_path: Path) -> None:
    moments = random.Random(3)
    output, deaths = tmp_path / "out.jsonl", 0
    for _ in range(6):
        with subprocess.Popen(_command(source, output), cwd=REPOSITORY, stdout=subprocess.DEVNULL) as process:
            held = output.stat().st_size if output.exists() else 0
            while process.poll() is None and not (output.exists() and output.stat().st_size > held):
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.01))
            process.kill()
            process.communicate()
            deaths += process.returncode == -signal.SIGKILL
    assert deaths >= 2
    _go(source, output)
    _check(output, undisturbed)
