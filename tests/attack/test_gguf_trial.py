"""Architectures whose keys emlocal does not know: llama.cpp crashes only a child process; emlocal says so."""

from pathlib import Path

import pytest

from emlocal.backends.engine import LoadOptions, engine
from emlocal.backends.llama_cpp import loading
from emlocal.errors import BackendError, ModelError
from emlocal.models.gguf.keys import CHECKED
from emlocal.models.resolve import GGUFModel, resolve
from tests.models.gguf.loading import Worker, accepted
from tests.tiny_architectures import architecture_metadata, write_tiny_architecture
from tests.tiny_gguf import Value, build, f32, tiny_tensors, u32

OPTIONS = LoadOptions(context=64, sequences=2, threads=1)
pytestmark = pytest.mark.real


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EMLOCAL_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tried-models.json"


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were tried in a child process."""
    names: list[str] = []
    real = loading._try
    monkeypatch.setattr(loading, "_try", lambda model, n: (names.append(model.path.name), real(model, n))[1])
    return names


def cohere2(path: Path, **keys: Value) -> Path:
    """Writes a tiny model of an architecture that has windows and is not among the checked ones."""
    metadata = architecture_metadata("cohere2")
    metadata["cohere2.attention.layer_norm_epsilon"] = metadata.pop(
        "cohere2.attention.layer_norm_rms_epsilon"
    )
    metadata |= {"cohere2.attention.sliding_window": u32(16), "cohere2.logit_scale": f32(0.25)}
    metadata |= {f"cohere2.{name.replace('__', '.')}": value for name, value in keys.items()}
    path.write_bytes(build(metadata, [t for t in tiny_tensors() if "ffn_norm" not in t.name]))
    return path


def opened(path: Path) -> GGUFModel:
    model = resolve(str(path))
    assert model.header.architecture not in CHECKED
    return model


def load(model: GGUFModel) -> None:
    engine("llama.cpp").load(model, OPTIONS).close()


def test_a_crash_is_one_line(tmp_path: Path, cache: Path, tries: list[str]) -> None:
    path = cohere2(tmp_path / "model.gguf", attention__sliding_window_pattern=u32(1))
    worker = Worker()
    assert accepted(path)
    assert worker.load(path).startswith("killed")
    worker.close()
    for _ in range(2):  # a failed trial is not remembered
        with pytest.raises(ModelError) as caught:
            load(opened(path))
        assert "llama.cpp ended with SIGABRT at llama-model.cpp" in caught.value.message
        assert "GGML_ASSERT(hparams.is_swa_any()) failed" in caught.value.message
        assert caught.value.message.isprintable()
    assert tries == ["model.gguf"] * 2
    assert not cache.exists()


def test_what_does_not_end_is_ended(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "SECONDS", 0.02)
    with pytest.raises(ModelError, match="did not finish within 0 s"):
        load(opened(cohere2(tmp_path / "model.gguf")))
    assert not cache.exists()


def test_what_takes_too_much_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "SPARE_BYTES", 1 << 20)
    with pytest.raises((ModelError, BackendError)) as caught:
        load(opened(cohere2(tmp_path / "model.gguf")))
    assert caught.value.message.isprintable()


def test_a_file_is_tried_once(tmp_path: Path, cache: Path, tries: list[str]) -> None:
    model = opened(cohere2(tmp_path / "model.gguf"))
    load(model)
    load(model)
    (tmp_path / "other").mkdir()
    load(opened(Path(model.path.rename(tmp_path / "other" / "name.gguf"))))
    assert tries == ["model.gguf"]
    cache.write_text("[damaged", "utf-8")
    load(opened(tmp_path / "other" / "name.gguf"))
    load(opened(cohere2(tmp_path / "changed.gguf", rope__freq_base=f32(20000.0))))
    assert tries == ["model.gguf", "name.gguf", "changed.gguf"]


def test_without_a_cache_it_is_tried_each_time(
    tmp_path: Path, tries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EMLOCAL_CACHE_DIR", str(tmp_path / "file"))
    model = opened(cohere2(tmp_path / "model.gguf"))
    load(model)
    load(model)
    assert len(tries) == 2


def test_what_llama_cpp_refuses_is_its_own_word(tmp_path: Path) -> None:
    path = cohere2(tmp_path / "model.gguf", attention__sliding_window=f32(1.0))
    with pytest.raises(ModelError, match="cannot load"):
        load(opened(path))


def test_checked_architectures_are_not_tried(tiny_model: GGUFModel, tries: list[str]) -> None:
    load(tiny_model)
    assert not tries


def test_a_model_without_attention(tmp_path: Path, tries: list[str]) -> None:
    load(opened(write_tiny_architecture(tmp_path / "mamba.gguf", "mamba")))
    assert tries == ["mamba.gguf"]
