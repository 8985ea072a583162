"""Hugging Face model folders: config.json, safetensors and a tokenizer. Nothing else is read.

Weights in .bin, .pt or .pth files are pickles, which run code as they are loaded: a folder that has only such
weights is refused. Code in a folder (`auto_map` in its config) is never run.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from emlocal.errors import ModelError
from emlocal.files import TOOL_USE, read_chat_template, read_json
from emlocal.models.gguf.header import shown
from emlocal.models.header import Weights
from emlocal.models.safetensors import SafeTensor, read_safetensors_header

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# In the order of the download: weights last, so that a folder with weights has everything.
_SMALL_FILES = (
    *("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json", f"additional_chat_templates/{TOOL_USE}.jinja"),
    *("tokenizer.json", CONFIG, INDEX),
)
_SHARD = re.compile(r"model-\d{5}-of-(?P<count>\d{5})\.safetensors")
_PICKLES = re.compile(r".+\.(?:bin|pt|pth|ckpt|pkl)")
_SAMPLING = {
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p")},
    "repetition_penalty": "repeat_penalty",
}


@dataclass(frozen=True)
class FolderHeader(Weights):
    """The facts that a model folder gives about itself. `files` are its weights."""

    path: Path
    files: tuple[Path, ...]
    file_size: int
    """Bytes of the weights' files."""
    config: Mapping[str, Any]
    """config.json; if it describes several models, the part on the language model."""
    tensors: Mapping[str, SafeTensor]

    def count(self, name: str) -> int:
        """Returns the number of weights in a tensor.

        MLX packs several weights into 32 bits, and stores scales and offsets beside them.
        """
        numbers = super().count(name)
        layer, _, kind = name.rpartition(".")
        weight = self.tensors.get(f"{layer}.weight")
        packed = self.config.get("quantization")
        if weight is None or weight.dtype != "U32" or not isinstance(packed, dict) or kind == "bias":
            return numbers
        if kind != "weight":
            return 0
        own = packed.get(layer)  # a layer can have a packing of its own
        bits = (own if isinstance(own, dict) else packed).get("bits")
        return numbers * 32 // bits if isinstance(bits, int) and bits > 0 else numbers

    @property
    def architecture(self) -> str:
        """`model_type`, such as "llama" or "qwen2"."""
        return str(self.config.get("model_type", ""))

    @property
    def name(self) -> str:
        """The folder's name; in the Hugging Face cache, the repository's."""
        if self.path.parent.name == "snapshots":
            return self.path.parent.parent.name.rpartition("--")[2]
        return self.path.resolve().name

    @property
    def license(self) -> str | None:
        return None

    @property
    def context_length(self) -> int:
        return self._number("max_position_embeddings")

    @property
    def embedding_length(self) -> int:
        return self._number("hidden_size")

    @property
    def block_count(self) -> int:
        return self._number("num_hidden_layers")

    @property
    def head_count(self) -> tuple[int, ...]:
        return (self._number("num_attention_heads"),) * self.block_count

    @property
    def head_count_kv(self) -> tuple[int, ...]:
        return (
            self._number("num_key_value_heads") or self._number("num_attention_heads"),
        ) * self.block_count

    @property
    def cached_heads(self) -> tuple[int, ...]:
        return self.head_count_kv

    @property
    def key_length(self) -> int:
        return self._number("head_dim") or self.embedding_length // max(
            self._number("num_attention_heads"), 1
        )

    @property
    def value_length(self) -> int:
        return self.key_length

    @property
    def feed_forward_length(self) -> int:
        return self._number("intermediate_size")

    @property
    def vocab_size(self) -> int:
        return self._number("vocab_size")

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja source of the chat template. It is untrusted: render it in a sandbox."""
        return read_chat_template(self.path)

    @cached_property
    def tool_template(self) -> str | None:
        """The one for conversations with tools, where the model has one of its own."""
        return read_chat_template(self.path, TOOL_USE)

    @cached_property
    def sampling(self) -> dict[str, float]:
        """The authors' sampling settings, by SamplingParams field."""
        return sampling_settings(self.path)

    @property
    def quantization(self) -> str:
        """The format of most bytes, such as "BF16"; "4-bit" and the like if the config says so."""
        packed = self.config.get("quantization") or self.config.get("quantization_config")
        if isinstance(packed, dict):
            bits, method = packed.get("bits"), packed.get("quant_method")
            return f"{bits}-bit" if isinstance(bits, int) else shown(str(method or "quantized"))
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.dtype] += tensor.nbytes
        return sizes.most_common(1)[0][0]

    def _number(self, name: str) -> int:
        value = self.config.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def sampling_settings(folder: Path) -> dict[str, float]:
    """Returns the authors' settings in generation_config.json, by SamplingParams field.

    Raises ModelError for a file that is not JSON.
    """
    said = read_json(folder / "generation_config.json", required=False)
    found = {ours: said.get(theirs) for theirs, ours in _SAMPLING.items()}
    return {k: v for k, v in found.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def has_folder_model(names: Iterable[str]) -> bool:
    """Returns whether files with these names look like a model folder, with weights of any kind."""
    found = set(names)
    return CONFIG in found and (bool(weight_files(found)) or bool(_pickles(found)))


def weight_files(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the weights among a folder's files: the single file, or all shards.

    Returns none if there are no weights, or if a shard is missing.
    """
    found = set(names)
    if WEIGHTS in found:
        return (WEIGHTS,)
    shards = sorted(n for n in found if _SHARD.fullmatch(n))
    counts = {int(match["count"]) for n in shards if (match := _SHARD.fullmatch(n))}
    return tuple(shards) if INDEX in found and counts == {len(shards)} else ()


def needed_files(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the needed files of a repository, weights last; none without a safetensors model."""
    found = set(names)
    weights = weight_files(found)
    if not weights or not {CONFIG, "tokenizer.json"} <= found:
        return ()
    return (*(n for n in _SMALL_FILES if n in found and (n != INDEX or len(weights) > 1)), *weights)


def why_not(names: Iterable[str]) -> str:
    """Returns why emlocal cannot use files with these names as a model in safetensors."""
    found = set(names)
    if _pickles(found) and not weight_files(found):
        return (
            f"its weights are in {_pickles(found)[0]} only, a format that can run code;"
            " emlocal loads safetensors"
        )
    for name in (CONFIG, "tokenizer.json"):
        if weight_files(found) and name not in found:
            return f"it has no {name}"
    return "its safetensors are missing or incomplete"


def _pickles(names: Iterable[str]) -> list[str]:
    return sorted(n for n in names if _PICKLES.fullmatch(n) and "/" not in n)


def read_folder_header(folder: Path) -> FolderHeader:
    """Reads and checks a model folder: its config, and the header of every file of its weights.

    Raises ModelError, in one line, if a file is missing or broken, or if the files contradict each other.
    """
    try:
        names = {p.name for p in folder.iterdir() if p.is_file()}
    except OSError as error:
        raise ModelError(f"cannot read {folder}: {error.strerror}") from error
    weights = weight_files(names)
    if not weights or not {CONFIG, "tokenizer.json"} <= names:
        raise ModelError(
            f"{folder} is not a model that emlocal can use: {why_not(names)}", hint="fetch the model again"
        )
    config = read_json(folder / CONFIG)
    inner = config.get("text_config")
    config = {**inner, "model_type": config.get("model_type")} if isinstance(inner, dict) else config
    headers = {name: read_safetensors_header(folder / name) for name in weights}
    if len(weights) > 1:
        _check_index(folder, {name: set(h.tensors) for name, h in headers.items()})
    tensors = {name: t for h in headers.values() for name, t in h.tensors.items()}
    files = tuple(folder / name for name in weights)
    header = FolderHeader(folder, files, sum(f.stat().st_size for f in files), config, tensors)
    for name in ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"):
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise ModelError(
                f"{folder / CONFIG} says {name} is {shown(str(value))}, not a number from 1",
                hint="use a text model that transformers or mlx-lm supports",
            )
    if not tensors:
        raise ModelError(f"{files[0]} has no tensors", hint="fetch the model again")
    return header


def _check_index(folder: Path, tensors_of: Mapping[str, set[str]]) -> None:
    """Checks that the index names every tensor of every shard, in its shard, and nothing else."""
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict):
        raise ModelError(f"{folder / INDEX} has no weight_map", hint="fetch the model again")
    real = [(tensor, file) for file, tensors in tensors_of.items() for tensor in tensors]
    twice = [tensor for tensor, count in Counter(t for t, _ in real).items() if count > 1]
    if twice:
        raise ModelError(
            f"{folder}: the tensor {shown(twice[0])} is in two of its files", hint="fetch the model again"
        )
    odd = sorted(map(str, set(real) ^ {(t, str(f)) for t, f in index.items()}))
    if odd:
        raise ModelError(
            f"{folder / INDEX} and its {len(tensors_of)} files differ in {len(odd):,} places,"
            f" such as {shown(odd[0])}",
            hint="fetch them again, all from one place",
        )
