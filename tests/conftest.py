"""Fixtures of several rooms: recorded logits, the tiny model, and a real one."""

import os
from pathlib import Path

# before numpy and torch are imported, whose threads would compete for the cores
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from numpy.typing import NDArray

from emlocal.backends.engine import wait_briefly
from emlocal.backends.llama_cpp.loading import load_library
from emlocal.models import starter
from emlocal.models.resolve import GGUFModel, resolve
from emlocal.models.unpacked import unpack
from tests.examples import register
from tests.tiny_gguf import write_tiny_gguf
from tests.tiny_pair import ModelPair, write_pair

wait_briefly()  # before a test loads torch, whose threads would spin and compete for the cores
register()
DATA = Path(__file__).parent / "data"
SMOLLM2 = Path.home() / ".cache" / "emlocal-bench" / "smollm2-135m-instruct-q4_1.gguf"
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
    """The rows of the smaller vocabulary only."""
    return _recorded("smollm2")


@pytest.fixture(scope="session")
def smollm2() -> GGUFModel:
    """SmolLM2-135M-Instruct, a real model: the bench models' copy or the starter model (the same file)."""
    return resolve(str(SMOLLM2 if SMOLLM2.exists() else starter.fetch()))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> GGUFModel:
    """An 80 kB model with random weights that llama.cpp loads, context 256."""
    return resolve(str(write_tiny_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf")))


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> ModelPair:
    """A tiny Llama in torch's and in llama.cpp's format."""
    return write_pair(tmp_path_factory.mktemp("pair"), "llama")


@pytest.fixture(scope="session", params=["llama", "qwen2"])
def any_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelPair:
    """The same for each architecture that `write_pair` knows."""
    return write_pair(tmp_path_factory.mktemp("pair"), request.param)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A path that does not exist yet."""
    return tmp_path / "out"


@pytest.fixture
def no_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switches off llama.cpp's flash attention.

    It rounds to half precision, and tiny models differ by 0.003 with it.
    """
    library = load_library()
    defaults = vars(library)["llama_context_default_params"]

    def without() -> object:
        params = defaults()
        params.flash_attn_type = vars(library)["LLAMA_FLASH_ATTN_TYPE_DISABLED"]
        return params

    monkeypatch.setattr(library, "llama_context_default_params", without)


@pytest.fixture(scope="session")
def unpacked_smollm2(smollm2: GGUFModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face model folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMLOCAL_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return unpack(smollm2)


@pytest.fixture(scope="session")
def unpacked_tiny(tiny_model: GGUFModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a Hugging Face model folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMLOCAL_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return unpack(tiny_model)
