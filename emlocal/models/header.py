"""What emlocal asks of a model before it is loaded, whichever format its weights are in."""

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Protocol

# The table that tokens are looked up in, and the output matrix: in GGUF, and in folders below any prefix.
_TABLE = re.compile(r"token_embd\.weight|(.+\.)?embed_tokens\.weight")
_OUTPUT = re.compile(r"output\.weight|(.+\.)?lm_head\.weight")


class Tensor(Protocol):
    """A tensor of a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


class Weights:
    """What both kinds of header count in their tensors."""

    tensors: Mapping[str, Tensor]

    @property
    def weights_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(self.count(name) for name in self.tensors)

    def count(self, name: str) -> int:
        """Number of weights in a tensor."""
        return prod(self.tensors[name].shape)

    @property
    def multiplied_parameters(self) -> int:
        """The P of 2PD, the FLOPs of D tokens: the weights that a token is multiplied with.

        A table that tokens are only looked up in is none of them: the embedding, where the output has its own
        matrix. Of a mixture of experts all are counted.
        """
        if not any(map(_OUTPUT.fullmatch, self.tensors)):
            return self.parameters
        return self.parameters - sum(self.count(name) for name in self.tensors if _TABLE.fullmatch(name))


class ModelHeader(Protocol):
    """What a model says of itself: a `GGUFHeader`, or the `FolderHeader` of a Hugging Face model folder.

    Where it does not say, numbers are 0 and tuples empty. Sizes are in bytes, lengths in tokens.
    """

    @property
    def path(self) -> Path: ...
    @property
    def files(self) -> tuple[Path, ...]: ...
    @property
    def file_size(self) -> int: ...
    @property
    def architecture(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def license(self) -> str | None: ...
    @property
    def context_length(self) -> int: ...
    @property
    def embedding_length(self) -> int: ...
    @property
    def block_count(self) -> int: ...
    @property
    def head_count(self) -> tuple[int, ...]: ...
    @property
    def head_count_kv(self) -> tuple[int, ...]: ...
    @property
    def key_length(self) -> int:
        """Numbers in a head's key."""

    @property
    def value_length(self) -> int:
        """Numbers in a head's value."""

    @property
    def feed_forward_length(self) -> int:
        """Width of the widest layer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def sampling(self) -> Mapping[str, float]: ...
    @property
    def weights_bytes(self) -> int: ...
    @property
    def parameters(self) -> int: ...
    @property
    def multiplied_parameters(self) -> int: ...
    @property
    def quantization(self) -> str: ...
