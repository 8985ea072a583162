"""Loading a model is the same from Python and the command line: adapters are checked, and read once."""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import emlocal
from emlocal import loading
from emlocal.backends.engine import Engine
from emlocal.errors import ModelError, UsageError
from emlocal.models import adapters
from emlocal.models.adapters.folders import write_peft
from emlocal.models.adapters.gguf_lora import write_gguf
from emlocal.models.resolve import GGUFModel
from emlocal.settings.options import EngineOptions
from tests.cli.conftest import Outcome
from tests.cli.conftest import emlocal as run_emlocal  # noqa: F401
from tests.tiny_pair import random_adapter


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often adapters were read from a folder, and written as GGUF."""
    calls: Counter[str] = Counter()
    for name in ("read_peft", "write_gguf"):
        real = vars(adapters)[name]

        def count(*arguments: object, name: str = name, real: Callable[..., object] = real) -> object:
            calls[name] += 1
            return real(*arguments)

        monkeypatch.setattr(adapters, name, count)
    return calls


@pytest.mark.parametrize(("engine", "written"), [("llama.cpp", 1), ("torch", 0), ("mlx", 0)])
def test_an_adapter_is_read_and_converted_once(
    tiny_model: GGUFModel, tmp_path: Path, counted: Counter[str], engine: str, written: int
) -> None:
    write_peft(replace(random_adapter(layers=1), base_model=""), tmp_path / "adapter")
    adapter = f"{tmp_path / 'adapter'}=0.5"
    wanted = EngineOptions(str(tiny_model.path), engine, (adapter,), context=64, threads=1)
    loaded = loading.load(wanted, sequences=1)
    try:
        assert counted == Counter(read_peft=1, write_gguf=written)
        assert loaded.describe().endswith("1 adapter")
    finally:
        loaded.backend.close()


@pytest.mark.parametrize("form", ["peft", "gguf"])
def test_both_doors_warn_of_another_base_model(
    tiny_model: GGUFModel,
    tmp_path: Path,
    run_emlocal: Callable[..., Outcome],  # noqa: F811
    form: str,
) -> None:
    path, adapter = tmp_path / "adapter", replace(random_adapter(layers=1), base_model="org/Unheard-7B")
    if form == "peft":
        write_peft(adapter, path)
    else:
        write_gguf(adapter, path, tiny_model.header)
    said = "names org/Unheard-7B as its base model"
    with (
        pytest.warns(UserWarning, match=said),
        emlocal.load(tiny_model.path, context=64, adapters=[(path, 1.0)]),
    ):
        pass
    flags = ("-m", str(tiny_model.path), "--adapter", str(path), "--max-tokens", "1")
    assert said in run_emlocal("generate", *flags, "--raw", "x").err
    heard: list[str] = []
    wanted = EngineOptions(str(tiny_model.path), adapter=(str(path),), context=64)
    loading.load(wanted, sequences=1, warn=heard.append).backend.close()
    assert [said in text for text in heard] == [True]


def test_an_adapter_that_does_not_fit_is_named_before_the_model_is_loaded(
    tiny_model: GGUFModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_peft(random_adapter(layers=2), tmp_path / "wrong")
    monkeypatch.setattr(Engine, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ModelError, match="does not have"):
        emlocal.load(tiny_model.path, context=64, adapters=[(tmp_path / "wrong", 1.0)])


def test_nothing_is_left_of_a_conversion(
    tiny_model: GGUFModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    write_peft(replace(random_adapter(layers=1), base_model=""), tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with emlocal.load(tiny_model.path, context=64, adapters=[(tmp_path / "adapter", 1.0)]) as model:
            assert not list((tmp_path / "temporary").iterdir())
            assert model.generate("the cat", raw=True, max_tokens=2).tokens


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 3}, "--context is 3; it must be at least 16"),
        ({"threads": 0}, "--threads is 0; it must be at least 1"),
        ({"parallel": 0}, "--parallel is 0; it must be between 1 and 256"),
        ({"kv_type": "q3"}, '--kv-type is "q3"; it must be one of f32, f16, q8_0, q4_0'),
        ({"backend": "abacus"}, '--backend is "abacus"; it must be one of'),
    ],
)
def test_settings_out_of_range(tiny_model: GGUFModel, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        emlocal.load(tiny_model.path, **settings)  # type: ignore[arg-type]
