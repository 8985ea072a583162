"""Layers on GPUs in llama.cpp: parameters, texts and errors. The GPUs here are numbers; none is used."""

import ctypes
import dataclasses
from pathlib import Path
from typing import Any

import pytest

import emlocal
from emlocal import loading
from emlocal.backends.engine import LoadOptions, OffloadOptions
from emlocal.backends.llama_cpp.devices import (
    GPU,
    Placement,
    built_for,
    devices,
    fill,
    gpus,
    gpus_here,
    place,
    remarks,
)
from emlocal.backends.llama_cpp.loading import Loading, load_library
from emlocal.errors import ModelError, UsageError
from emlocal.models.gguf import GGUFHeader
from emlocal.models.memory import Terms, check_memory, compute_bytes, estimate
from emlocal.models.offload import SPARE_BYTES
from emlocal.models.resolve import GGUFModel, resolve
from emlocal.settings.options import ENGINE, EngineOptions
from emlocal.settings.table import NAMES
from tests.tiny_gguf import write_tiny_gguf

GB = 10**9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> GGUFModel:
    return resolve(str(write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")))


@pytest.fixture(scope="module")
def header(model: GGUFModel) -> GGUFHeader:
    return model.header


def gpu(free: int = 12 * GB, name: str = "CUDA0", **others: Any) -> GPU:
    return GPU(name, "a GPU", free, 12 * GB, **others)


TWO = (gpu(), gpu(name="CUDA1"))


def filled(asked: OffloadOptions, found: tuple[GPU, ...], header: GGUFHeader) -> tuple[Any, Placement]:
    """Returns llama.cpp's own structure, filled for these GPUs."""
    lib = load_library()
    params = lib.llama_model_default_params()
    placement = place(header, asked, found, 256, "f16")
    array = fill(lib, params, asked, placement, found)
    shares = [params.tensor_split[i] for i in range(len(found))] if array is not None else None
    return (params.n_gpu_layers, params.split_mode, params.main_gpu, shares), placement


@pytest.mark.parametrize(
    ("asked", "found", "expected"),
    [
        (OffloadOptions(), (), (0, 1, 0, None)),
        (OffloadOptions("all"), (), (0, 1, 0, None)),
        (OffloadOptions(), (gpu(),), (2, 1, 0, None)),
        (OffloadOptions("auto"), (gpu(0),), (0, 1, 0, None)),
        (OffloadOptions("all"), (gpu(),), (2, 1, 0, None)),
        (OffloadOptions("1"), (gpu(),), (1, 1, 0, None)),
        (OffloadOptions("0"), (gpu(),), (0, 1, 0, None)),
        (OffloadOptions("99"), (gpu(),), (2, 1, 0, None)),
        (OffloadOptions(), TWO, (2, 1, 0, [2, 0])),
        (OffloadOptions("2", tensor_split=(1, 1)), TWO, (2, 1, 0, [1, 1])),
        (OffloadOptions("2", "none", 1), TWO, (2, 0, 1, None)),
        (OffloadOptions("all", "row"), TWO, (2, 2, 0, None)),
        (OffloadOptions("auto", "tensor"), TWO, (2, 3, 0, None)),
        (OffloadOptions("all", "layer", None, (3, 1)), TWO, (2, 1, 0, [3, 1])),
    ],
)
def test_parameters(
    asked: OffloadOptions, found: tuple[GPU, ...], expected: tuple[Any, ...], header: GGUFHeader
) -> None:
    assert filled(asked, found, header)[0] == expected


def test_a_gpu_without_room_takes_what_fits(header: GGUFHeader) -> None:
    whole = place(header, OffloadOptions(), (gpu(),), 256, "f16")
    assert whole.describe() == "2 of 2 layers on CUDA0"
    reserve = SPARE_BYTES + compute_bytes(header)
    room = reserve + place(header, OffloadOptions("1"), (gpu(),), 256, "f16").moved
    one = place(header, OffloadOptions(), (gpu(room),), 256, "f16")
    assert one.describe() == "1 of 2 layers on CUDA0"
    less = place(header, OffloadOptions(), (gpu(room - 1),), 256, "f16")
    assert (less.describe(), less.moved) == ("0 of 2 layers on CUDA0", 0)
    both = place(header, OffloadOptions(), (gpu(room), gpu(room, "CUDA1")), 256, "f16")
    assert both.offload.layers >= 1
    assert place(header, OffloadOptions("auto", "none", 1), (), 256, "f16").describe() == ""


def test_an_integrated_gpu_moves_nothing_out_of_main_memory(header: GGUFHeader) -> None:
    placement = place(header, OffloadOptions(), (gpu(kind="integrated"),), 256, "f16")
    assert (placement.offload.layers, placement.moved) == (2, 0)


def test_what_is_said(header: GGUFHeader) -> None:
    def said(asked: OffloadOptions, *found: GPU) -> list[str]:
        return list(remarks(asked, place(header, asked, found, 256, "f16")))

    assert said(OffloadOptions()) == said(OffloadOptions("0")) == said(OffloadOptions("all"), gpu()) == []
    (none,) = said(OffloadOptions("auto"))
    assert "no layers go to a GPU" in none
    (many,) = said(OffloadOptions("2"), gpu(2 * 10**8))
    assert "--gpu-layers 2 may be too many: about 0 of 2 layers fit into 200 MB" in many


def test_gpus_that_do_not_exist(header: GGUFHeader) -> None:
    with pytest.raises(UsageError, match="--main-gpu is 2; it must be between 0 and 1 here"):
        place(header, OffloadOptions(main_gpu=2), TWO, 256, "f16")
    with pytest.raises(UsageError, match=r"--tensor-split has 3 shares, but llama\.cpp sees 2 GPUs"):
        place(header, OffloadOptions(tensor_split=(1, 1, 1)), TWO, 256, "f16")


def test_memory_is_checked_without_what_gpus_hold(header: GGUFHeader) -> None:
    def moved(tokens: int) -> int:
        return place(header, OffloadOptions(), (gpu(),), tokens, "f16").moved

    plain = Terms(2.0, header.weights_bytes, 10**12)
    assert estimate(header, 256, plain) - estimate(header, 256, plain._replace(moved=moved)) == moved(256)
    exact = estimate(header, 256, plain._replace(moved=moved))
    tight = Terms(2.0, header.weights_bytes, exact, moved=moved)
    assert check_memory(header, 256, tight) == exact
    with pytest.raises(ModelError, match="of memory"):
        check_memory(header, 256, tight._replace(moved=lambda tokens: 0))


def test_the_devices_of_this_build() -> None:
    lib = load_library()
    found = list(devices(lib))
    assert "CPU" in found
    if not lib.llama_supports_gpu_offload():
        assert gpus(lib) == gpus_here() == built_for() == ()


def test_a_build_without_gpus_says_so_once_and_answers(model: GGUFModel) -> None:
    heard: list[str] = []
    options = EngineOptions(str(model.path), context=64, threads=1, gpu_layers="all", tensor_split="3,1")
    loaded = loading.load(options, sequences=1, warn=heard.append)
    loaded.backend.close()
    if gpus(load_library()):
        pytest.skip("this build has a GPU")
    assert len(heard) == 1
    assert "no layers go to a GPU" in heard[0]
    assert "GPU" not in loaded.describe()
    with Loading(model, LoadOptions(context=64, sequences=1, threads=1)) as begun:
        begun.wait()
        assert begun._model_params.n_gpu_layers == 0
        assert not ctypes.cast(begun._model_params.tensor_split, ctypes.c_void_p).value
        begun.free()


def test_another_engine_says_that_it_has_no_layers_to_move(
    model: GGUFModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from emlocal.backends.engine import engine

    heard: list[str] = []
    without = dataclasses.replace(engine("llama.cpp"), moved=None)
    monkeypatch.setattr(loading, "engine", lambda name: without)
    options = EngineOptions(str(model.path), context=64, threads=1, gpu_layers="0")
    loading.load(options, sequences=1, warn=heard.append).backend.close()
    assert [text for text in heard if "are for llama.cpp" in text] == heard
    assert len(heard) == 1


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ({"gpu-layers": 12}, "12"),
        ({"n_gpu_layers": "ALL"}, "all"),
        ({"ngl": "auto"}, None),
        ({"gpu_layers": 99_999_999}, "99999999"),
        ({"gpu_layers": -1}, None),
        ({"gpu_layers": True}, None),
        ({"gpu_layers": "many"}, None),
        ({"gpu_layers": 1.5}, None),
    ],
)
def test_values_of_gpu_layers(given: dict[str, Any], value: str | None) -> None:
    if value is None:
        with pytest.raises(UsageError):
            ENGINE.read(given, NAMES)
    else:
        assert ENGINE.read(given, NAMES) == {"gpu_layers": value}


@pytest.mark.parametrize("given", ["3,1", [3, 1], "3/1"])
def test_values_of_tensor_split(given: Any) -> None:
    values = ENGINE.read({"tensor_split": given}, NAMES)
    assert loading.offload_of(EngineOptions(**values)).tensor_split == (3.0, 1.0)


@pytest.mark.parametrize("given", ["", "a", "0,0", "-1,2", "inf", [True], 3])
def test_values_that_are_no_shares(given: Any) -> None:
    with pytest.raises(UsageError, match="one number for each GPU"):
        ENGINE.read({"tensor_split": given}, NAMES)


def test_python_takes_gpu_layers(model: GGUFModel) -> None:
    with emlocal.load(model.path, context=64, threads=1, gpu_layers=0) as loaded:
        assert loaded.generate("x", raw=True, max_tokens=1).tokens
    with pytest.raises(UsageError, match=r"gpu_layers is -1; it must be a whole number at least 0, all or"):
        emlocal.load(model.path, gpu_layers=-1)
