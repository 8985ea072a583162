"""The facts that emlocal needs of a model before loading it, for weights in either format."""

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Protocol

# The embedding table and the output matrix: in GGUF, and in folders below any prefix.
_TABLE = re.compile(r"token_embd\.weight|(.+\.)?embed_tokens\.weight")
_OUTPUT = re.compile(r"output\.weight|(.+\.)?lm_head\.weight")


class Tensor(Protocol):
    """A tensor of a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


class Weights:
    """The counts of a header's tensors, for both kinds of header."""

    tensors: Mapping[str, Tensor]

    @property
    def weights_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(self.count(name) for name in self.tensors)

    def count(self, name: str) -> int:
        """Returns the number of weights in a tensor."""
        return prod(self.tensors[name].shape)

    @property
    def multiplied_parameters(self) -> int:
        """The P of 2PD, the FLOPs of D tokens: the number of weights that a token is multiplied with.

        A table that tokens are only looked up in does not count: the embedding, if the output has its own
        matrix. In a mixture of experts all experts count.
        """
        if not any(map(_OUTPUT.fullmatch, self.tensors)):
            return self.parameters
        return self.parameters - sum(self.count(name) for name in self.tensors if _TABLE.fullmatch(name))


class ModelHeader(Protocol):
    """The facts that a model gives about itself: a `GGUFHeader`, or the `FolderHeader` of a model folder.

    For facts that it does not give, numbers are 0 and tuples empty. Sizes are in bytes, lengths in tokens.
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
    def cached_heads(self) -> tuple[int, ...]:
        """Heads in the KV cache, one number per layer; 0 for layers without a cache."""

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
    def tool_template(self) -> str | None: ...
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
