"""What tests of several rooms share: recorded logits, the tiny model, and the two real ones where present."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from emlocal.models.resolve import LocalModel, resolve
from tests.tiny_gguf import write_tiny_gguf

DATA = Path(__file__).parent / "data"
BENCH = Path.home() / ".cache" / "emlocal-bench"
SMOLLM2 = BENCH / "smollm2-135m-instruct-q4_1.gguf"
QWEN = BENCH / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
RECORDED = ("smollm2", "qwen2.5-coder")


def _recorded(name: str) -> NDArray[np.float32]:
    with np.load(DATA / f"{name}.npz") as file:
        rows: NDArray[np.float32] = file["rows"]
    return rows


@pytest.fixture(scope="session", params=RECORDED)
def recorded(request: pytest.FixtureRequest) -> NDArray[np.float32]:
    """Six rows of real logits, float32 [6, V], from confident to open; see data/record_rows.py."""
    return _recorded(request.param)


@pytest.fixture(scope="session")
def smollm2_rows() -> NDArray[np.float32]:
    """The same, of the smaller vocabulary only."""
    return _recorded("smollm2")


def _bench_model(path: Path) -> LocalModel:
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return resolve(str(path))


@pytest.fixture(scope="session")
def smollm2() -> LocalModel:
    """SmolLM2-135M-Instruct, a real model; skips where it is missing."""
    return _bench_model(SMOLLM2)


@pytest.fixture(scope="session")
def qwen() -> LocalModel:
    """Qwen2.5-Coder-0.5B-Instruct, a real model; skips where it is missing."""
    return _bench_model(QWEN)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    """An 80 kB model with random weights that llama.cpp loads, context 256."""
    return resolve(str(write_tiny_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf")))
