"""The engines that the tests of the contract run on."""

from collections.abc import Iterator

import pytest

from emlocal.backends.base import Backend, LoadOptions
from emlocal.backends.fake import FakeBackend
from emlocal.backends.llama_cpp import LlamaCppBackend
from emlocal.backends.mlx import backend as mlx
from emlocal.backends.torch.backend import open_folder
from emlocal.models.resolve import resolve
from emlocal.models.unpacked import unpack
from tests.backends.contract import CONTEXT, LONG, SEQUENCES
from tests.cuda import ON_CUDA
from tests.tiny_gguf import u32, write_tiny_gguf


# mlx runs only the tiny model: its Linux wheel multiplies matrices twenty times as slowly as torch, and
# SmolLM2 took two minutes here. test_mlx.py compares it with mlx-lm.
@pytest.fixture(
    scope="module",
    params=[
        "fake",
        "llama.cpp tiny",
        "torch tiny",
        "torch tiny, sampling on the device",
        "mlx tiny",
        "mlx tiny, sampling on the device",
        pytest.param("torch tiny, cuda", marks=ON_CUDA),
        pytest.param("llama.cpp smollm2", marks=pytest.mark.real),
        pytest.param("torch smollm2", marks=pytest.mark.real),
    ],
)
def loaded(request: pytest.FixtureRequest) -> Iterator[Backend]:
    options = LoadOptions(context=CONTEXT, sequences=SEQUENCES, threads=1)
    if request.param == "fake":
        backend: Backend = FakeBackend(context=CONTEXT, sequences=SEQUENCES)
    elif request.param.startswith(("torch", "mlx")):
        folder = request.getfixturevalue("unpacked_tiny" if "tiny" in request.param else "unpacked_smollm2")
        device = "cuda" if "cuda" in request.param else "cpu"
        on_device = True if "device" in request.param else None
        open_ = mlx.open_folder if "mlx" in request.param else open_folder
        backend = open_(folder, options, device=device, dtype="float32", on_device_sampler=on_device)
    else:
        model = request.getfixturevalue("tiny_model" if "tiny" in request.param else "smollm2")
        backend = LlamaCppBackend(model, options)
    yield backend
    backend.close()


@pytest.fixture(scope="module", params=["fake", "llama.cpp tiny", "torch tiny", "mlx tiny"])
def roomy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """The engines on a tiny model with a long context."""
    options = LoadOptions(context=LONG + 100, sequences=2, threads=1)
    if request.param == "fake":
        yield FakeBackend(context=LONG + 100, sequences=2)
        return
    path = write_tiny_gguf(tmp_path_factory.mktemp("roomy") / "m.gguf", llama__context_length=u32(LONG + 100))
    model = resolve(str(path))
    if request.param in ("torch tiny", "mlx tiny"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EMLOCAL_CACHE_DIR", str(path.parent))
            folder = unpack(model)
        open_ = mlx.open_folder if request.param == "mlx tiny" else open_folder
        backend: Backend = open_(folder, options, device="cpu", dtype="float32")
    else:
        backend = LlamaCppBackend(model, options)
    yield backend
    backend.close()


@pytest.fixture
def backend(loaded: Backend) -> Iterator[Backend]:
    """A loaded engine without open sequences, even if the test before left some open."""
    yield loaded
    for sequence in range(SEQUENCES):
        try:
            loaded.length(sequence)
        except KeyError:
            continue
        loaded.release(sequence)
