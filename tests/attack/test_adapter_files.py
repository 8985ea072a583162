"""Model folders with a link to an endless file, a pipe or a folder in a file's place: refused at once."""

import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from emlocal.errors import ModelError
from emlocal.files import open_regular, read_chat_template, read_regular
from emlocal.models.adapters import read_adapter
from emlocal.models.adapters.folders import CONFIG, MLX_WEIGHTS, PEFT_WEIGHTS, write_mlx, write_peft
from emlocal.models.adapters.merge import open_model
from emlocal.models.adapters.origin import base_of
from emlocal.models.folder import read_folder_header, sampling_settings
from emlocal.models.gguf import file, read_adapter_header, read_header
from emlocal.models.resolve import GGUFModel
from emlocal.models.safetensors import read_safetensors_header
from emlocal.models.tokenizer import Tokenizer
from tests.tiny_gguf import write_tiny_gguf
from tests.tiny_pair import random_adapter

FEW_BYTES = 1 << 30  # of address space, beyond what the process already has
SECONDS = 20


def a_link_to_what_never_ends(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_link_to_a_pipe(path: Path) -> None:
    pipe = path.with_name(f"pipe of {path.name}")
    os.mkfifo(pipe)
    path.symlink_to(pipe)


def a_folder(path: Path) -> None:
    path.mkdir()


def a_huge_file(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


Put = Callable[[Path], None]
NOT_FILES = (a_link_to_what_never_ends, a_pipe, a_link_to_a_pipe, a_folder)


@contextmanager
def bounds() -> Iterator[None]:
    """Makes an unbounded read fail instead of filling the memory, and interrupts a read that blocks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, _too_long)
    resource.setrlimit(resource.RLIMIT_AS, (now + FEW_BYTES, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"not done after {SECONDS} s")


def complaint(read: Callable[[], object]) -> str:
    with bounds(), pytest.raises(ModelError) as caught:
        read()
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 300
    return caught.value.message


def replaced(path: Path, put: Put) -> Path:
    path.unlink(missing_ok=True)
    put(path)
    return path


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    write_peft(random_adapter(), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def mlx(tmp_path: Path) -> Path:
    write_mlx(random_adapter(), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def folder(unpacked_tiny: Path, tmp_path: Path) -> Path:
    """A model folder for this test alone."""
    return Path(shutil.copytree(unpacked_tiny, tmp_path / "model"))


@pytest.mark.parametrize("put", NOT_FILES)
def test_what_is_no_file_is_not_opened(tmp_path: Path, put: Put) -> None:
    path = replaced(tmp_path / "file", put)
    assert "is not a regular file" in complaint(lambda: open_regular(path))
    assert "is not a regular file" in complaint(lambda: read_regular(path, 10))


def test_files_and_links_to_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link", 10) == b"0123456789"
    assert "more than 9 bytes" in complaint(lambda: read_regular(tmp_path / "link", 9))
    with open_regular(tmp_path / "link") as file:
        assert os.get_blocking(file.fileno()) or file.read() == b"0123456789"
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "absent")


@pytest.mark.parametrize("put", [*NOT_FILES, a_huge_file])
@pytest.mark.parametrize("name", [CONFIG, PEFT_WEIGHTS])
def test_adapters_of_peft(peft: Path, name: str, put: Put) -> None:
    replaced(peft / name, put)
    assert name in complaint(lambda: read_adapter(peft))


@pytest.mark.parametrize("put", [*NOT_FILES, a_huge_file])
@pytest.mark.parametrize("name", [CONFIG, MLX_WEIGHTS])
def test_adapters_of_mlx(mlx: Path, name: str, put: Put) -> None:
    replaced(mlx / name, put)
    assert name in complaint(lambda: read_adapter(mlx))


@pytest.mark.parametrize("put", [*NOT_FILES, a_huge_file])
def test_the_base_that_an_adapter_names(peft: Path, put: Put) -> None:
    replaced(peft / CONFIG, put)
    complaint(lambda: base_of(peft))


@pytest.mark.parametrize("put", [a_link_to_what_never_ends, a_pipe, a_link_to_a_pipe])
def test_gguf_files(tmp_path: Path, tiny_model: GGUFModel, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """Includes a model that was checked before, and was then replaced by a pipe."""
    monkeypatch.setenv("EMLOCAL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(file, "LARGE", 1)
    path = write_tiny_gguf(tmp_path / "model.gguf")
    read_header(path)
    assert file.recall(path) is not None
    replaced(path, put)
    assert "is not a regular file" in complaint(lambda: read_header(path))
    assert "is not a regular file" in complaint(lambda: read_adapter_header(path, tiny_model.header))
    complaint(lambda: read_adapter(path))


@pytest.mark.parametrize("put", [*NOT_FILES, a_huge_file])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_what_a_model_folder_must_have(folder: Path, name: str, put: Put) -> None:
    replaced(folder / name, put)
    if name != "tokenizer.json" or put is not a_huge_file:  # the tokenizer is read later, when it is needed
        complaint(lambda: read_folder_header(folder))
    if name == "model.safetensors":
        complaint(lambda: read_safetensors_header(folder / name))
    else:
        complaint(lambda: Tokenizer(folder).encode("hello", add_special=True, parse_special=False))


@pytest.mark.parametrize("put", [*NOT_FILES, a_huge_file])
@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "chat_template.jinja"])
def test_what_a_model_folder_may_have(folder: Path, name: str, put: Put) -> None:
    """These files are optional, but something else in their place must be reported: others open it later."""
    read_folder_header(folder)
    replaced(folder / name, put)
    read = {
        "generation_config.json": lambda: sampling_settings(folder),
        "tokenizer_config.json": lambda: Tokenizer(folder),
        "chat_template.jinja": lambda: read_chat_template(folder),
    }
    assert name in complaint(read[name])


@pytest.mark.parametrize("put", [*NOT_FILES, a_huge_file])
def test_the_index_of_a_model_that_is_merged_with(folder: Path, put: Put) -> None:
    replaced(folder / "model.safetensors", put)
    replaced(folder / "model.safetensors.index.json", put)
    complaint(lambda: open_model(folder))
