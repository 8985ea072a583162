"""Prompts in, completions out: the runner and its scheduler above an engine, stop strings, streamed text."""

from emlocal.cancel import Cancellation, interruptible
from emlocal.errors import CancelledError
from emlocal.generation.runner import Completed, Event, Finished, Handle, Job, Runner, Timings, Token
from emlocal.generation.sample import Completion, FinishReason, Request, joined
from emlocal.generation.scheduler import Scheduler

__all__ = [
    "Cancellation",
    "CancelledError",
    "Completed",
    "Completion",
    "Event",
    "FinishReason",
    "Finished",
    "Handle",
    "Job",
    "Request",
    "Runner",
    "Scheduler",
    "Timings",
    "Token",
    "interruptible",
    "joined",
]
