"""emlocal's guards as a callback: training stops where the answers collapse, with the reason.

It looks at TRL's log entries, which are the same on all processes; `logging_steps` must be 1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from emlocal.methods.voting import repeated
from emlocal.training.rollouts import Guards, RolloutStats
from emlocal.training.settings import TrainingSettings


def note_repetition(trainer: Any, answers: Sequence[Sequence[int]]) -> None:
    """Logs the mean repeated share of the answers of all processes, as emlocal's loop computes it."""
    device = trainer.accelerator.device
    shares = torch.tensor([repeated(each) for each in answers], device=device)
    mode = "train" if trainer.model.training else "eval"
    trainer._metrics[mode]["repetition"].append(trainer.accelerator.gather(shares).mean().item())


class Guard(TrainerCallback):  # type: ignore[misc]
    """Looks at each log entry."""

    def __init__(self, settings: TrainingSettings) -> None:
        self.guards = Guards(settings)
        self.why: str | None = None
        """The reason that ended the training."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Stops the training if a limit is exceeded."""
        if not logs or "entropy" not in logs or "completions/mean_length" not in logs:
            return
        length, ended = logs["completions/mean_length"], 1 - logs["completions/clipped_ratio"]
        stats = RolloutStats(0, 0, logs["entropy"], length, ended, logs["repetition"])
        self.why = self.guards.look(stats)
        if self.why is None and "kl" in logs:
            self.why = self.guards.look_at_kl(logs["kl"])
        if self.why is not None:
            control.should_training_stop = True
            if state.is_world_process_zero:
                print(f"stopped: {self.why}")
