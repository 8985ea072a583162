"""LoRA adapters of any format: recognised by path, read, checked and passed to an engine.

`folders` and `gguf_lora` read and write the formats, `adapter` is an adapter in memory, `merge` adds one to a
model's weights, `origin` tells which model it was trained on.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TypeVar

from emlocal.errors import ModelError, WrongNameError
from emlocal.files import open_regular
from emlocal.models.adapters.adapter import Adapter, check_fits
from emlocal.models.adapters.folders import (
    CONFIG,
    MLX_WEIGHTS,
    PEFT_WEIGHTS,
    check_no_pickle,
    read_mlx,
    read_peft,
)
from emlocal.models.adapters.gguf_lora import linear_shapes, read_gguf, write_gguf
from emlocal.models.gguf import GGUFHeader, read_adapter_header

Format = Literal["peft", "mlx", "gguf"]
_Found = TypeVar("_Found")


def format_of(path: Path) -> Format:
    """Returns the format of a file or folder. A folder with both PEFT's and MLX's weights counts as PEFT's.

    Raises ModelError if it is not an adapter.
    """
    if path.is_file():
        if path.suffix in (".bin", ".pt", ".pth", ".npz", ".safetensors"):
            raise WrongNameError(f"{path} is one file of an adapter", f"name its folder: {path.parent}")
        if path.suffix != ".gguf" and not _begins_like_gguf(path):
            raise WrongNameError(f"{path} is not an adapter", "name a PEFT or MLX folder, or a GGUF file")
        return "gguf"
    if not path.is_dir():
        there = (
            f"{path} is a pipe or a device, not an adapter"
            if path.exists()
            else f"there is no adapter {path}"
        )
        raise WrongNameError(there, "name a PEFT or MLX folder, or a GGUF file")
    return _settled(path, _folder_format)


def _begins_like_gguf(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            return file.read(4) == b"GGUF"
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", "make it readable") from error


def _folder_format(folder: Path) -> Literal["peft", "mlx"]:
    if (folder / PEFT_WEIGHTS).exists():
        return "peft"
    if (folder / MLX_WEIGHTS).exists():
        return "mlx"
    check_no_pickle(folder)
    raise WrongNameError(
        f"{folder} is not an adapter: it has neither {PEFT_WEIGHTS} (PEFT) nor {MLX_WEIGHTS} (MLX)",
        "name a PEFT or MLX folder, or a GGUF file",
    )


def read_adapter(path: Path, base: GGUFHeader | None = None) -> Adapter:
    """Reads and checks an adapter. Nothing is unpickled, and no code in it is run.

    With `base`, adapters of all formats must fit it. Without it, GGUF files whose rows have an order of their
    own (Q and K of the Llama family) are refused.

    Raises ModelError, in one line, for any fault.
    """
    if format_of(path) == "gguf":
        return read_gguf(path, base)
    adapter = _settled(path, _read_folder)
    if base is not None:
        check_fits(adapter, linear_shapes(base), base.path.name)
    return adapter


def _read_folder(folder: Path) -> Adapter:
    return read_peft(folder) if _folder_format(folder) == "peft" else read_mlx(folder)


def _settled(folder: Path, look: Callable[[Path], _Found]) -> _Found:
    """Returns the result of `look`, or raises its error, for a folder that nobody replaced meanwhile."""
    while True:
        before = _identity(folder)
        try:
            found = look(folder)
        except (ModelError, OSError) as error:
            if _identity(folder) != before:
                continue
            if isinstance(error, OSError):
                raise ModelError(f"cannot read {folder}: {error.strerror}", "make it readable") from error
            raise
        if _identity(folder) == before:
            return found


def _identity(folder: Path) -> tuple[int, int]:
    try:
        status = folder.stat()
    except OSError as error:
        raise ModelError(f"cannot read {folder}: {error.strerror}", "name an existing adapter") from error
    return status.st_ino, status.st_mtime_ns


def in_memory(adapter: Adapter | Path, base: GGUFHeader | None = None) -> Adapter:
    """Returns an adapter, which may have been read already. Raises ModelError as `read_adapter` does."""
    return read_adapter(adapter, base) if isinstance(adapter, Path) else adapter


@contextmanager
def as_gguf(adapter: Adapter | Path, base: GGUFHeader) -> Iterator[Path]:
    """Yields an adapter of any format as a GGUF file for llama.cpp, checked against the model `base`.

    A GGUF file is used as it is; others are converted into a private folder that is removed when the block
    ends. Raises ModelError as `read_adapter` does.
    """
    if isinstance(adapter, Path) and format_of(adapter) == "gguf":
        read_adapter_header(adapter, base)
        yield adapter
        return
    adapter = in_memory(adapter, base)
    with TemporaryDirectory(prefix="emlocal-") as folder:  # only this user may enter it
        file = Path(folder) / "adapter.gguf"
        write_gguf(adapter, file, base)
        yield file


def adapter_files(path: Path) -> tuple[Path, ...]:
    """Returns an adapter's files: weights first, then the configuration if there is one."""
    kind = format_of(path)
    if kind == "gguf":
        return (path,)
    return (path / (PEFT_WEIGHTS if kind == "peft" else MLX_WEIGHTS), path / CONFIG)
