"""Prompts in, completions out: the decode loop above a backend, stop strings, streaming text."""

from emlocal.generation.cancel import Cancellation, interruptible
from emlocal.generation.decode import Completion, FinishReason, Generator, Piece, Request, Timings

__all__ = [
    "Cancellation",
    "Completion",
    "FinishReason",
    "Generator",
    "Piece",
    "Request",
    "Timings",
    "interruptible",
]
