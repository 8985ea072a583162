"""The processes that `accelerate launch` (or torchrun) started. accelerate does all communication."""

from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce

from emlocal.backends.learner import Processes

T = TypeVar("T")


class AcceleratedProcesses(Processes):
    """One of several processes."""

    def __init__(self, *, cpu: bool) -> None:
        self._state = PartialState(cpu=cpu)
        self.rank, self.count = self._state.process_index, self._state.num_processes
        self.device = str(self._state.device)

    def gather(self, own: T) -> list[T]:
        found: list[T] = gather_object([own])
        return found

    def add_up(self, gradient: torch.Tensor) -> None:
        gradient.copy_(reduce(gradient, "sum"))
