"""How a model is to be loaded. No numpy: a model is on its way into memory before that is imported."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from emlocal.errors import UsageError

if TYPE_CHECKING:
    from emlocal.models.adapters.adapter import Adapter

KVType = Literal["f32", "f16", "q8_0", "q4_0"]
DEFAULT_CONTEXT = 8192
BATCH_CONTEXT = 2048
"""Tokens of a sequence in a batch, where nobody says: each has this room to itself."""


def python_warning(message: str) -> None:
    """Say it as Python says warnings."""
    warnings.warn(message, UserWarning, stacklevel=2)


@dataclass(frozen=True)
class LoadOptions:
    """How to load a model."""

    context: int | None = None
    """The most tokens of a sequence; None: the model's own length, at most `DEFAULT_CONTEXT`."""
    sequences: int = 4
    """The most sequences held at once."""
    shared: bool = True
    """Whether they share room for `context` tokens in all. If not, each has that room to itself: that takes
    their number times the memory, and decoding many at once is faster (docs/decisions.md). In torch and mlx
    each has that room in any case; it is taken at once where it is not shared, else as it is needed."""
    threads: int | None = None
    """None: one per physical core. MLX chooses for itself."""
    kv_type: KVType | None = None
    """None: f16 in llama.cpp, the model's own in torch and mlx."""
    adapters: tuple[tuple["Adapter | Path", float], ...] = ()
    """(LoRA adapter: as it was read, or a GGUF file, a PEFT or an MLX folder; scale)."""
    warn: Callable[[str], None] = python_warning
    """Told what the user should know while the model runs. An engine does not print."""


def context_length(asked: int | None, trained: int) -> int:
    """The tokens asked for; else the model's own length, at most `DEFAULT_CONTEXT`.

    Raises UsageError for more than the model was trained for.
    """
    if asked is None:
        return min(trained, DEFAULT_CONTEXT)
    if asked > trained:
        raise UsageError(
            f"--context {asked:,} is longer than the {trained:,} tokens the model was trained for",
            f"use at most --context {trained}",
        )
    return asked
