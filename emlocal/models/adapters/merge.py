"""Merging of an adapter into the weights of a transformers model folder: W + scale · B A, in float32.

It works on one block of rows at a time, so memory does not grow with the model. The new files have the
headers of the old ones byte for byte: same tensors, same types, same places.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from emlocal.errors import ModelError
from emlocal.files import (
    MAX_JSON_BYTES,
    Progress,
    atomic_folder,
    check_space,
    open_regular,
    read_regular,
    silent,
)
from emlocal.models.adapters.adapter import Adapter, LoraPair, check_fits
from emlocal.models.gguf.header import shown
from emlocal.models.safetensors import (
    FLOATS,
    SafetensorsHeader,
    narrowed,
    read_safetensors_header,
    widened,
)
from emlocal.models.unpacked import MANIFEST

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_BLOCK_BYTES = 64 << 20  # of float32, at once
_COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".md", ".py", ""}
_NOT_COPIED = {"adapter_config.json", "trainer_state.json", MANIFEST}
_PLAIN_NAME = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)


@dataclass(frozen=True)
class ModelFolder:
    """The safetensors files of a model folder, their headers checked."""

    path: Path
    files: tuple[SafetensorsHeader, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """[out, in] of each matrix, by the name of the layer."""
        matrices = ((n, t.shape) for f in self.files for n, t in f.tensors.items() if len(t.shape) == 2)
        return {n.removesuffix(".weight"): (s[0], s[1]) for n, s in matrices if n.endswith(".weight")}

    @property
    def bytes(self) -> int:
        """Size of the weights' files."""
        return sum(f.path.stat().st_size for f in self.files)


def open_model(folder: Path) -> ModelFolder:
    """Reads the headers of a model folder, sharded or not.

    Raises ModelError if files are missing or broken, or if the index contradicts them.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} is not a model folder: it has no config.json",
            "name a folder with config.json and model.safetensors",
        )
    if not (folder / _INDEX).exists():
        return ModelFolder(folder, (read_safetensors_header(folder / _SINGLE),))
    places = _index(folder)
    files = {name: read_safetensors_header(folder / name) for name in sorted(set(places.values()))}
    for tensor, file in places.items():
        if tensor not in files[file].tensors:
            raise ModelError(
                f"{folder / _INDEX} says that {shown(tensor)} is in {file}, which does not have it",
                "fetch the model again",
            )
    return ModelFolder(folder, tuple(files.values()))


def merge(adapter: Adapter, scale: float, model: ModelFolder, out: Path, progress: Progress = silent) -> None:
    """Writes the folder `out`: the model with `scale` times the adapter in its weights, in the model's types.

    Configuration, tokenizer and other small files are copied. `out` appears whole or not at all.

    Raises ModelError if the adapter does not fit, if a weight is not of a floating type (quantized models) or
    overflows its type, or if the disk is too small; EmlocalError if `out` exists or cannot be written.
    """
    _check_mergeable(adapter, model)
    check_space(out.parent, model.bytes, f"the merged model {out.name}")
    pairs = {f"{n}.weight": replace(p, scale=p.scale * scale) for n, p in adapter.pairs.items()}
    with atomic_folder(out) as temporary:
        done = 0
        for file in model.files:
            with open_regular(file.path) as source, (temporary / file.path.name).open("wb") as target:
                done = _merge_file(file, source, target, pairs, (done, model.bytes), progress)
        for path in model.path.iterdir():
            if path.is_file() and path.suffix in _COPIED and path.name not in _NOT_COPIED:
                shutil.copyfile(path, temporary / path.name)


def _check_mergeable(adapter: Adapter, model: ModelFolder) -> None:
    shapes = model.shapes
    if "lm_head" in adapter.pairs and "lm_head" not in shapes:
        raise ModelError(
            f"the adapter changes lm_head, which {model.path} shares with its embeddings: merging"
            " would change"
            " both",
            "use the adapter without merging",
        )
    check_fits(adapter, shapes, str(model.path))
    for file in model.files:
        for name, tensor in file.tensors.items():
            if name.removesuffix(".weight") in adapter.pairs and tensor.dtype not in FLOATS:
                raise ModelError(
                    f"{shown(name)} of {model.path} is of type {tensor.dtype}; only {', '.join(FLOATS)} can"
                    " be merged into",
                    "use the model in one of these types",
                )


def _merge_file(
    header: SafetensorsHeader,
    source: BinaryIO,
    target: BinaryIO,
    pairs: Mapping[str, LoraPair],
    counts: tuple[int, int],
    progress: Progress,
) -> int:
    """Copies one file and changes the tensors that have a pair.

    `counts` is (bytes done, bytes in all); the result is the bytes done afterwards.
    """
    done, whole = counts
    start = min((t.offset for t in header.tensors.values()), default=header.path.stat().st_size)
    _copy(source, target, start)
    for name, tensor in sorted(header.tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        progress("merging", done, whole)
        if name in pairs:
            _merge_tensor(name, tensor.dtype, source, target, pairs[name])
        else:
            _copy(source, target, tensor.nbytes)
        done += tensor.nbytes
    return done + start


def _merge_tensor(name: str, dtype: str, source: BinaryIO, target: BinaryIO, pair: LoraPair) -> None:
    """Copies W [out, in] from `source` to `target`, with scale · B A added."""
    out, columns = pair.b.shape[0], pair.a.shape[1]
    size = 4 if dtype == "F32" else 2
    step = max(1, _BLOCK_BYTES // (4 * columns))
    scaled = pair.b * np.float32(pair.scale)
    for i in range(0, out, step):
        b = scaled[i : i + step]
        w = widened(_read(source, len(b) * columns * size), dtype).reshape(len(b), columns)
        w += b @ pair.a
        data = narrowed(w, dtype)
        if not np.isfinite(widened(data, dtype)).all():
            raise ModelError(
                f"with the adapter, {name} has weights too large for {dtype}", "use a smaller scale"
            )
        target.write(data)


def _copy(source: BinaryIO, target: BinaryIO, count: int) -> None:
    while count:
        data = _read(source, min(count, _BLOCK_BYTES))
        target.write(data)
        count -= len(data)


def _read(source: BinaryIO, count: int) -> bytes:
    data = source.read(count)
    if len(data) != count:
        raise ModelError(f"{source.name} became shorter during reading", "fetch the model again")
    return data


def _index(folder: Path) -> dict[str, str]:
    """Returns the file of each tensor, from the index. Its file names stay within the folder."""
    path = folder / _INDEX
    try:
        places = json.loads(read_regular(path, MAX_JSON_BYTES))["weight_map"]
        sound = all(isinstance(f, str) and _PLAIN_NAME.fullmatch(f) for f in places.values()) and places
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", "fetch the model again") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise ModelError(f"{path} is not a table of files by tensor (weight_map)", "fetch the model again")
    return dict(places)
