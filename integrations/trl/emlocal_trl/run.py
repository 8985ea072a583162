"""Starts a trainer from emlocal's settings, on one process or several:

    torchrun --nproc_per_node 2 -m emlocal_trl.run finetune MODEL PROMPTS OUT steps=10 prompts_per_step=8
    torchrun --nproc_per_node 2 -m emlocal_trl.run rl MODEL PROMPTS OUT reward=token samples=4

MODEL is a transformers folder or a name on the Hub, PROMPTS a file that `emlocal finetune --data` reads. The
rest are emlocal's settings by name, and `cpu=true`. A checkpoint in OUT is resumed. The adapter ends in
OUT/adapter.
"""

import os
import sys
from pathlib import Path
from typing import Any, TypeVar

from datasets import Dataset
from peft import LoraConfig
from transformers.trainer_utils import get_last_checkpoint
from trl import RLOOConfig

from emlocal.errors import EmlocalError, UsageError
from emlocal.settings.table import NAMES, Table
from emlocal.training.prompts import read_prompts
from emlocal.training.rl_settings import RLSettings
from emlocal.training.settings import FineTuneSettings, TrainingSettings, settings_of_run
from emlocal_trl.em_ft import EMFTTrainer
from emlocal_trl.em_rl import EMRLTrainer

S = TypeVar("S", bound=TrainingSettings)
_GENERATIONS = 2
"""Answers to each prompt of an EM-FT step: the fewest that TRL draws."""
_ROWS = 4
"""Answers in a micro-batch at most."""


def arguments(
    settings: TrainingSettings, out: str, generations: int, processes: int, cpu: bool
) -> RLOOConfig:
    """Returns TRL's arguments. Raises UsageError for a step that the processes cannot share."""
    answers = settings.prompts_per_step * generations
    rows = next((n for n in range(_ROWS, 0, -1) if answers % (n * processes) == 0), 0)
    if not rows:
        raise UsageError(f"a step of {answers} answers cannot be shared by {processes} processes")
    return RLOOConfig(
        output_dir=out,
        use_cpu=cpu,
        bf16=not cpu,
        max_steps=settings.steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=answers // (rows * processes),
        num_generations=generations,
        max_completion_length=settings.max_tokens,
        temperature=settings.rollout_temperature,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup,
        lr_scheduler_type=settings.schedule,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        beta=settings.kl_beta if isinstance(settings, RLSettings) else 0.0,
        logging_steps=1,
        save_steps=5,
        report_to=[],
    )


def trainer(kind: str, model: str, data: str, out: str, given: dict[str, str]) -> Any:
    """Returns a trainer. Raises EmlocalError."""
    cpu = given.pop("cpu", "false") == "true"
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    prompts = read_prompts(Path(data))
    rows = [
        {"prompt": [{"role": each["role"], "content": each["content"]} for each in prompt.messages]}
        for prompt in prompts
    ]
    if kind == "finetune":
        tuning = _read(FineTuneSettings, given)
        args, lora = arguments(tuning, out, _GENERATIONS, processes, cpu), _lora(tuning)
        return EMFTTrainer(model, args, tuning, train_dataset=Dataset.from_list(rows), peft_config=lora)
    if kind != "rl":
        raise UsageError(f"{kind!r} is not a training method; it must be finetune or rl")
    learning = _read(RLSettings, given)
    ((reward, _), *more) = learning.reward
    if more or reward not in ("token", "sequence"):
        raise UsageError("the rewards on TRL are token and sequence", "use emlocal rl for others")
    args, lora = arguments(learning, out, learning.samples, processes, cpu), _lora(learning)
    return EMRLTrainer(model, args, reward, learning, train_dataset=Dataset.from_list(rows), peft_config=lora)


def _read(cls: type[S], given: dict[str, str]) -> S:
    table = Table.of(cls)
    values: dict[str, Any] = {}
    for name, text in given.items():
        values |= table.read_text(name, text, NAMES)
    return settings_of_run(cls, values)


def _lora(settings: TrainingSettings) -> LoraConfig:
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(settings.target_modules),
        task_type="CAUSAL_LM",
    )


def main(words: list[str]) -> int:
    """Runs the training. Returns the exit code."""
    if len(words) < 4 or not all("=" in word for word in words[4:]):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        training = trainer(*words[:4], dict(word.split("=", 1) for word in words[4:]))  # type: ignore[call-arg]
    except EmlocalError as error:
        print(f"error: {error.message}\nfix: {error.hint}", file=sys.stderr)
        return 2
    out = Path(words[3])
    training.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if out.is_dir() else None)
    training.save_model(str(out / "adapter"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
