"""llama.cpp's library without its Python package, and a model loaded by a thread."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from emlocal.backends.engine import LoadOptions, engine
from emlocal.backends.llama_cpp.loading import Loading, load_library
from emlocal.cancel import interruptible
from emlocal.errors import BackendError, ModelError
from emlocal.models.adapters.folders import write_peft
from emlocal.models.resolve import GGUFModel, resolve
from tests.tiny_architectures import architecture_metadata, architecture_tensors
from tests.tiny_gguf import build, text
from tests.tiny_pair import random_adapter

OPTIONS = LoadOptions(context=64, sequences=2, threads=1)


@pytest.fixture
def freed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of objects that llama.cpp was told to free, in order."""
    library, names = load_library(), []
    for name in ("llama_free", "llama_model_free"):
        real = vars(library)[name]
        monkeypatch.setattr(library, name, lambda p, n=name, real=real: (names.append(n), real(p))[1])
    return names


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def fresh(code: str, *folders: Path) -> None:
    """Runs code in a separate interpreter with these folders first on its path."""
    paths = f"import sys; sys.path[:0] = {[*map(str, folders)]}\n"
    subprocess.run([sys.executable, "-c", paths + code], check=True, timeout=60)


LOAD = "from emlocal.backends.llama_cpp.loading import load_library; lib = load_library()\n"


def test_the_package_stays_unloaded_and_can_be_loaded_afterwards() -> None:
    fresh(f"""{LOAD}
assert not [n for n in sys.modules if n.split(".")[0] in ("llama_cpp", "jinja2", "numpy")]
import llama_cpp
assert llama_cpp.Llama and llama_cpp.llama_cpp.llama_decode
assert llama_cpp.llama_max_devices() == lib.llama_max_devices()
""")


def test_a_package_that_is_loaded_is_taken() -> None:
    fresh(f"import llama_cpp\n{LOAD}assert lib is llama_cpp.llama_cpp")


def test_the_package_is_loaded_where_other_threads_could_see_it_missing() -> None:
    fresh(
        "import threading; done = threading.Event(); threading.Thread(target=done.wait).start()\n"
        f"{LOAD}done.set(); assert 'Llama' in vars(sys.modules['llama_cpp'])"
    )


def test_a_layout_that_needs_the_package_gets_it(tmp_path: Path) -> None:
    package = tmp_path / "llama_cpp"
    package.mkdir()
    (package / "__init__.py").write_text("name = 'x'\n")
    (package / "llama_cpp.py").write_text("from llama_cpp import name\n")
    fresh(
        "from emlocal.backends.llama_cpp.loading import _declarations\n"
        "assert _declarations().name == 'x' and sys.modules['llama_cpp'].name == 'x'",
        tmp_path,
    )


def test_a_library_that_does_not_load_is_named(tmp_path: Path) -> None:
    package = tmp_path / "llama_cpp"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "llama_cpp.py").write_text("raise OSError('libgomp.so.1 is missing')\n")
    fresh(
        "from emlocal.backends.llama_cpp.loading import load_library\n"
        "from emlocal.errors import BackendError\n"
        "try: load_library()\n"
        "except BackendError as why: assert 'libgomp.so.1' in str(why)\n"
        "else: raise SystemExit('no error')",
        tmp_path,
    )


def test_a_file_that_llama_cpp_refuses(tiny_model: GGUFModel, tmp_path: Path, freed: list[str]) -> None:
    """The file changes after its header was checked."""
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match=r"llama.cpp cannot load .*other.gguf: \w+") as caught:
        engine("llama.cpp").load(replace(tiny_model, files=(other,)), OPTIONS)
    assert "gave no reason" not in caught.value.message
    assert freed == []


REFUSED = {
    "a weight is missing": (
        {},
        "ffn_up",
        "check_tensor_dims: tensor 'blk.0.ffn_up.weight' not found",
    ),
    "a key is of another type": (
        {"tokenizer.ggml.bos_token_id": text("1")},
        "",
        "key tokenizer.ggml.bos_token_id has wrong type str but expected type u32",
    ),
    "a name with escapes": (
        {"tokenizer.ggml.pre": text("\x1b]0;a\x07\n" + "b" * 1000)},
        "",
        r"unknown pre-tokenizer type: '\x1b]0;a\x07 bbb",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refusal_says_what_llama_cpp_complained_of_first(what: str, tmp_path: Path) -> None:
    """The last line of llama.cpp is always "failed to load model"."""
    keys, without, reason = REFUSED[what]
    tensors = [t for t in architecture_tensors("llama") if not without or without not in t.name]
    path = tmp_path / "model.gguf"
    path.write_bytes(build(architecture_metadata("llama") | keys, tensors))
    with pytest.raises(ModelError) as caught:
        engine("llama.cpp").load(resolve(str(path)), OPTIONS)
    assert reason in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 500 + len(str(path))


def test_a_context_that_cannot_be_made(
    tiny_model: GGUFModel, freed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_library(), "llama_init_from_model", lambda model, params: None)
    with pytest.raises(BackendError, match="cannot make a context of 64 tokens"):
        engine("llama.cpp").load(tiny_model, OPTIONS)
    assert freed == ["llama_model_free"]


def test_what_fails_meanwhile_leaves_no_model_behind(tiny_model: GGUFModel, freed: list[str]) -> None:
    def meanwhile() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine("llama.cpp").load(tiny_model, OPTIONS, meanwhile=meanwhile)
    assert freed == ["llama_free", "llama_model_free"]


def test_an_adapter_that_does_not_fit_leaves_no_model_behind(
    tiny_model: GGUFModel, freed: list[str], tmp_path: Path
) -> None:
    write_peft(random_adapter(layers=2), tmp_path / "wrong")
    with pytest.raises(ModelError, match="does not have"):
        engine("llama.cpp").load(tiny_model, replace(OPTIONS, adapters=((tmp_path / "wrong", 1.0),)))
    assert freed == ["llama_free", "llama_model_free"]


def test_a_ctrl_c_that_nobody_catches(tiny_model: GGUFModel, freed: list[str]) -> None:
    """Raised while waiting for the thread: the thread ends, and its objects are freed."""
    loading = Loading(tiny_model, OPTIONS)
    loading._thread.join()

    class Interrupted(threading.Thread):
        joined = 0

        def join(self, timeout: float | None = None) -> None:
            self.joined += 1
            if self.joined == 1:
                raise KeyboardInterrupt

    loading._thread = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        loading.wait()
    assert freed == ["llama_free", "llama_model_free"]


def test_a_first_ctrl_c_waits_until_the_model_is_there(tiny_model: GGUFModel, freed: list[str]) -> None:
    with interruptible() as cancelled:
        backend = engine("llama.cpp").load(
            tiny_model, OPTIONS, meanwhile=lambda: signal.raise_signal(signal.SIGINT)
        )
    assert cancelled.requested
    assert freed == []
    backend.close()
    assert freed == ["llama_free", "llama_model_free"]
