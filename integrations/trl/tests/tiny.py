"""A tiny model with an adapter, and trainers whose answers are given.

`python tiny.py KIND OUT` trains one step and writes the adapter's gradients, for one process or several:
torchrun starts it.
"""

import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from emlocal_trl.em_ft import EMFTTrainer
from emlocal_trl.em_rl import EMRLTrainer
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import RLOOConfig

from emlocal.training.rl_settings import RLSettings
from emlocal.training.settings import FineTuneSettings

VOCABULARY = 64
PROMPTS = [f"w{i} w{i + 1}" for i in range(8)]


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i + 2 for i in range(VOCABULARY - 2)}}
    own = Tokenizer(models.WordLevel(words))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=own, **special)


def model() -> PeftModel:
    """A model whose adapter has changed already, so that all gradients and the KL count."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        initializer_range=0.2,
    )  # fmt: skip
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    found = get_peft_model(LlamaForCausalLM(config), lora)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return found


def answer(prompt: str, place: int) -> list[int]:
    """Returns the given answer: its length and tokens follow from the prompt and its place in the group."""
    random = np.random.default_rng(zlib.crc32(f"{prompt}/{place}".encode()))
    return [*random.integers(2, VOCABULARY, size=random.integers(1, 7)).tolist(), 1]


class Given:
    """Mixed into a trainer: the answers are given, not drawn."""

    def _generate_single_turn(self, prompt_ids: Any, *_: Any) -> list[list[int]]:
        seen: dict[str, int] = {}
        found = []
        for ids in prompt_ids:
            prompt = " ".join(map(str, ids))
            found.append(answer(prompt, seen.get(prompt, 0)))
            seen[prompt] = seen.get(prompt, 0) + 1
        return found


class GivenFT(Given, EMFTTrainer): ...


class GivenRL(Given, EMRLTrainer): ...


class Gradients(TrainerCallback):
    """Keeps the gradients as the optimiser gets them."""

    def __init__(self) -> None:
        self.found: dict[str, np.ndarray] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.found[name.removeprefix("module.")] = parameter.grad.numpy().copy()


def arguments(out: Path, processes: int, **more: Any) -> RLOOConfig:
    """One step on all prompts, two answers each, in micro-batches of four on each process."""
    own = {
        "output_dir": str(out),
        "use_cpu": True,
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4 // processes,
        "num_generations": 2,
        "max_completion_length": 8,
        "learning_rate": 0.05,
        "max_grad_norm": 0.0,
        "beta": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "bf16": False,
        "shuffle_dataset": False,
        "seed": 3,
        "gradient_checkpointing": False,
    }
    return RLOOConfig(**{**own, **more})


def trainer(kind: str, out: Path, processes: int = 1, cls: Any = None, **more: Any) -> Any:
    """Returns a trainer: "ft", "ft-sequence" or "rl-token", "rl-sequence"."""
    data = Dataset.from_dict({"prompt": PROMPTS})
    args = arguments(out, processes, **more)
    own = {"train_dataset": data, "processing_class": tokenizer(), "callbacks": [Gradients()]}
    if kind.startswith("ft"):
        settings = FineTuneSettings(
            kl_beta=0.7, temperature=1.3, normalize="sequence" if "sequence" in kind else "token", max_kl=0,
        )  # fmt: skip
        return (cls or GivenFT)(model(), args, settings, **own)
    return (cls or GivenRL)(model(), args, kind.removeprefix("rl-"), RLSettings(max_kl=0), **own)


def gradients_of(training: Any) -> dict[str, np.ndarray]:
    (kept,) = [each for each in training.callback_handler.callbacks if isinstance(each, Gradients)]
    return kept.found


if __name__ == "__main__":
    kind, out, processes = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    training = trainer(kind, out, processes)
    training.train()
    if training.accelerator.is_main_process:
        np.savez(out / "gradients.npz", **gradients_of(training))
        training.save_model(str(out / "adapter"))
