"""GGUF models for engines that cannot run them: unpacked once into a Hugging Face model folder.

    folder = unpack(resolve("smollm2:135m"))     # config.json, model.safetensors, tokenizer.json, …

The folder is in emlocal's cache and may be deleted at any time. Unpacking needs neither torch nor
transformers. Weights go into one safetensors file, tensor by tensor, in little memory.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from emlocal.errors import ModelError
from emlocal.files import (
    Progress,
    cache_dir,
    check_space,
    disk_errors,
    only_one,
    open_regular,
    put_folder_in_place,
    silent,
)
from emlocal.identity import UNPACKED_FORMAT, gguf_digest
from emlocal.models.gguf.header import GGUFHeader, TensorInfo, shown, unusable
from emlocal.models.gguf.types import TENSOR_TYPES
from emlocal.models.resolve import GGUFModel, Model
from emlocal.models.safetensors import read_safetensors_header
from emlocal.models.unpacked import config as words
from emlocal.models.unpacked.config import Unpacked
from emlocal.models.unpacked.tokenizer import build_tokenizer, check_tokenizer
from emlocal.text import parse_json

MANIFEST = "emlocal.json"
WEIGHTS = "model.safetensors"
_TOKENIZER_BYTES = 300  # of tokenizer.json for each token, a generous estimate


def unpack(model: GGUFModel, progress: Progress = silent) -> Path:
    """Returns the folder with the dequantized model; makes it on the first call.

    F32, F16 and BF16 tensors stay as they are, quantized ones become F16. The folder takes twice the model's
    parameters in bytes of disk. Safe to call from several processes at once, and to kill at any time. Raises
    ModelError for an architecture, tokenizer or quantization that cannot be unpacked, and if the disk does
    not take it.
    """
    key = gguf_digest(model.header)
    folder = cache_dir() / "unpacked" / key
    if _is_whole(folder):
        return folder
    with disk_errors(folder.parent, "EMLOCAL_CACHE_DIR"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with only_one(
            folder.parent / f".{folder.name}.lock",
            lambda: progress("waiting for another emlocal to unpack this model", 0, None),
        ):
            if not _is_whole(folder):  # another process may have made it while this one waited
                _make(model, folder, progress)
    return folder


def check_runs(model: Model, engine: str) -> None:
    """Raises ModelError for a GGUF model that torch or mlx cannot run, or that cannot be unpacked.

    It reads the header only, imports no engine and writes nothing. Other models pass.
    """
    if not isinstance(model, GGUFModel):
        return
    words.check_architecture(model.header)
    if not words.runs_as_attention(model.header):
        raise ModelError(
            f"{model.path.name} has layers without attention, which only llama.cpp runs in emlocal",
            "use --backend llama.cpp",
        )
    if engine == "mlx" and words.LONG_FACTORS in model.header.tensors:
        raise ModelError(  # its SuScaledRoPE takes the long factors for short texts, too
            f"{model.path.name} stretches positions by the text's length, which mlx-lm computes differently",
            "use --backend torch or llama.cpp",
        )
    words.tensors(model.header)
    check_tokenizer(model.header)


def _is_whole(folder: Path) -> bool:
    """Returns whether the whole folder is there: manifest, file sizes, header of the weights."""
    try:
        sizes = parse_json((folder / MANIFEST).read_text("utf-8"))["files"]
        if any((folder / name).stat().st_size != size for name, size in sizes.items()):
            return False
        read_safetensors_header(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ModelError):
        return False
    return WEIGHTS in sizes


def _make(model: GGUFModel, folder: Path, progress: Progress) -> None:
    """Fills a folder beside `folder` and renames it. The caller must hold the lock."""
    header = model.header
    words.check_architecture(header)
    tensors = words.tensors(header)
    check_types(header, tensors)
    for stale in (*folder.parent.glob(f".{folder.name}-*/"), *([folder] if folder.exists() else [])):
        shutil.rmtree(stale)  # left by a process that was killed, or damaged since
    needed = file_bytes(tensors) + _TOKENIZER_BYTES * header.vocab_size
    check_space(folder.parent, needed, f"unpacking {shown(header.name)}")
    tokenizer, vocabulary = build_tokenizer(header)
    factors = {
        kind: read_vector(header.tensors[name])
        for name, kind in words.ROPE_FACTORS.items()
        if name in header.tensors
    }
    config = words.model_config(header, vocabulary, tensors, factors)
    unfinished = folder.with_name(f".{folder.name}-{os.getpid()}")
    unfinished.mkdir()
    try:
        for name, table in (
            ("config.json", config),
            ("generation_config.json", words.generation_config(header, vocabulary)),
            ("tokenizer_config.json", words.tokenizer_config(header, vocabulary)),
        ):
            (unfinished / name).write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", "utf-8")
        if header.chat_template is not None:
            (unfinished / "chat_template.jinja").write_text(header.chat_template, "utf-8", newline="")
        tokenizer.save(str(unfinished / "tokenizer.json"), pretty=False)
        write_safetensors(unfinished / WEIGHTS, tensors, f"unpacking {shown(header.name)}", progress)
        sizes = {p.name: p.stat().st_size for p in sorted(unfinished.iterdir())}
        manifest = {"format": UNPACKED_FORMAT, "source": [str(f) for f in header.files], "files": sizes}
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", "utf-8")
        put_folder_in_place(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_CHUNK_ELEMENTS = 1 << 22  # 16 MB as float32; dequantizing takes a few times that
_BITS = {"F32": "<u4", "F16": "<u2", "BF16": "<u2"}  # copied bit by bit, NaN included


def file_bytes(tensors: Sequence[Unpacked]) -> int:
    """Returns the bytes that `write_safetensors` writes."""
    return len(_header(tensors)) + sum(_nbytes(t) for t in tensors)


def write_safetensors(path: Path, tensors: Sequence[Unpacked], label: str, progress: Progress) -> None:
    """Writes the tensors, dequantized and in Hugging Face's order of rows, one after the other.

    Raises OSError, and ModelError if the model's file is cut short meanwhile.
    """
    total, done = sum(_nbytes(t) for t in tensors), 0
    with path.open("wb") as file:
        file.write(_header(tensors))
        for tensor in tensors:
            for block in _converted(tensor):
                file.write(block.data)
                done += block.nbytes
                progress(label, done, total)


def read_vector(tensor: TensorInfo) -> list[float]:
    """Returns the values of a float32 tensor."""
    with open_regular(tensor.file) as file:
        return _read(file, tensor, 0, tensor.nbytes).view("<f4").tolist()  # type: ignore[no-any-return]


def check_types(header: GGUFHeader, tensors: Sequence[Unpacked]) -> None:
    """Raises ModelError, before anything is written, for a quantization that numpy code cannot undo."""
    for type_ in sorted({t.source.type for t in tensors} - _BITS.keys()):
        _, _, block_bytes = next(t for t in TENSOR_TYPES.values() if t[0] == type_)
        try:
            _dequantized(np.zeros(block_bytes, np.uint8), type_)
        except (NotImplementedError, KeyError):
            raise ModelError(
                f"{header.path.name} cannot be unpacked: it has tensors of type {type_}",
                hint="use another quantisation, such as Q4_K_M or Q8_0",
            ) from None


def _header(tensors: Sequence[Unpacked]) -> bytes:
    """Returns length and JSON, padded so that the data begin on a multiple of 8."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers insists on the format
    end = 0
    for tensor in tensors:
        start, end = end, end + _nbytes(tensor)
        shape, offsets = list(tensor.shape), [start, end]
        table[tensor.name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _nbytes(tensor: Unpacked) -> int:
    return prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]


def _converted(tensor: Unpacked) -> Iterator[NDArray[np.generic]]:
    """Yields contiguous blocks of whole rows (of whole heads, if their rows are put back in order)."""
    source = tensor.source
    columns, rows = source.shape[0], prod(source.shape[1:])
    if len(source.shape) == 1 and tensor.heads:  # a bias: its elements are the rows
        columns, rows = 1, source.shape[0]
    unit = rows // tensor.heads if tensor.heads else 1
    step = max(_CHUNK_ELEMENTS // (columns * unit), 1) * unit
    as_it_is = source.type == tensor.dtype and not tensor.less
    convert = partial(np.frombuffer, dtype=_BITS[tensor.dtype]) if as_it_is else None
    with open_regular(source.file) as file:
        for first in range(0, rows, step):
            last = min(first + step, rows)
            raw = _read(file, source, source.nbytes * first // rows, source.nbytes * last // rows)
            if convert is not None:
                block: NDArray[np.generic] = convert(raw)
            else:
                values = _dequantized(raw, source.type)
                if tensor.less:
                    values = values - np.float32(tensor.less)
                with np.errstate(over="ignore"):
                    block = values.astype("<f4" if tensor.dtype == "F32" else "<f2")
            block = block.reshape(last - first, columns)
            yield unpermuted(block, (last - first) // unit) if tensor.heads else np.ascontiguousarray(block)


def unpermuted(rows: NDArray[np.generic], heads: int) -> NDArray[np.generic]:
    """Returns the rows [heads · d, columns] of a query or key matrix in Hugging Face's order.

    llama.cpp rotates neighbours (2i, 2i+1) of a head, Hugging Face the halves (i, i + d/2). So the converter
    interleaves the halves (LlamaModel.permute in convert_hf_to_gguf.py); this function takes them apart.
    """
    n, columns = rows.shape
    halves = rows.reshape(heads, n // heads // 2, 2, columns).swapaxes(1, 2)
    return np.ascontiguousarray(halves).reshape(n, columns)


def _read(file: BinaryIO, tensor: TensorInfo, start: int, end: int) -> NDArray[np.uint8]:
    file.seek(tensor.offset + start)
    raw = np.fromfile(file, np.uint8, end - start)
    if len(raw) != end - start:
        raise unusable(tensor.file, "it became shorter during reading")
    return raw


def _dequantized(raw: NDArray[np.uint8], type_: str) -> NDArray[np.float32]:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(over="ignore", invalid="ignore"):  # scales of a damaged file may be anything
        return dequantize(raw, GGMLQuantizationType[type_])
