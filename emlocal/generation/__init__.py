"""Prompts in, completions out: the decode loop above a backend, stop strings, streaming text."""

from emlocal.cancel import Cancellation, interruptible
from emlocal.errors import CancelledError
from emlocal.generation.decode import Generator, Timings
from emlocal.generation.sample import Completion, FinishReason, Piece, Request

__all__ = [
    "Cancellation",
    "CancelledError",
    "Completion",
    "FinishReason",
    "Generator",
    "Piece",
    "Request",
    "Timings",
    "interruptible",
]
