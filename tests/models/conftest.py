"""Each test here has its own folders for the files of emlocal and huggingface_hub, and its own hub."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.models.fake_hub import FakeHub

# In a separate process, because huggingface_hub reads the environment on import.
RESOLVE = """
import json, sys
from dataclasses import asdict
from emlocal.errors import EmlocalError
from emlocal.models.resolve import resolve

seen = []
try:
    model = resolve(sys.argv[1], progress=lambda *step: seen.append(step), **json.loads(sys.argv[2]))
    said = {"path": str(model.path), "files": [str(f) for f in model.files], "source": model.source}
except EmlocalError as error:
    assert "\\n" not in error.message and error.hint, error.message
    said = {"error": error.message, "hint": error.hint}
print(json.dumps(said | {"progress": seen}))
"""


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"EMLOCAL_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    server = FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.close()


Resolve = Callable[..., dict[str, Any]]


@pytest.fixture
def resolve() -> Resolve:
    """Runs emlocal's `resolve(name, **options)` in a new process.

    Returns its answer, or its error and hint.
    """

    def run(name: str, **options: object) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", RESOLVE, name, json.dumps(options)],
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"PYTHONPATH": str(Path.cwd())},
        )
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    return run
