"""Measures training speed and memory of `emlocal finetune` against TRL's SFT trainer.

Both train rank-16 adapters of all linear layers of the same bfloat16 model on the same sequences: 80 tokens
of prompt, 200 of answer. A step has 16 of them in micro-batches of 4, without gradient checkpointing. TRL
minimises the cross-entropy of the answers. emlocal minimises their entropy, without the KL term, which TRL's
trainer lacks. Each runs in its own process, in turns; loading and the first step do not count.

Needs `pip install trl`. The model is a folder with safetensors; `emlocal finetune` unpacks GGUF files into
~/.cache/emlocal/unpacked.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Noise, circumstances, say, wait_until_quiet

PROMPT, ANSWER, PER_STEP, MICRO = 80, 200, 16, 4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def sequences(steps: int, vocabulary: int) -> list[list[int]]:
    import numpy as np

    random = np.random.default_rng(0)
    return random.integers(10, min(vocabulary, 40_000), (steps * PER_STEP, PROMPT + ANSWER)).tolist()


def emlocal(folder: Path, steps: int, threads: int) -> dict[str, float]:
    from emlocal.backends.learner import Descent, EntropyObjective
    from emlocal.backends.torch.backend import open_model
    from emlocal.backends.torch.learner import TorchEntropyLearner
    from emlocal.backends.torch.model import linear_layers
    from emlocal.machine import peak_memory
    from emlocal.training.engines import new_adapter
    from emlocal.training.rollouts import Rollout, micro_batches, token_weights
    from emlocal.training.settings import FineTuneSettings

    opened = open_model(folder, dtype="bfloat16", threads=threads)
    learner = TorchEntropyLearner(
        opened.model,
        new_adapter(linear_layers(opened.model), FineTuneSettings()),
        Descent(),
        EntropyObjective(),
    )
    loaded = peak_memory()
    times = []
    rows = sequences(steps, opened.info.vocabulary)
    for step in range(steps):
        part = rows[step * PER_STEP : (step + 1) * PER_STEP]
        rollouts = [Rollout(tuple(r[:PROMPT]), tuple(r[PROMPT:]), True, "", 0.0) for r in part]
        started = time.perf_counter()
        weights = token_weights(rollouts, "token")
        for batch in micro_batches([len(r) for r in rollouts], MICRO * (PROMPT + ANSWER)):
            learner.accumulate([rollouts[i] for i in batch], [weights[i] for i in batch])
        learner.update(1e-4)
        times.append(time.perf_counter() - started)
    return {"seconds": sum(times[1:]), "loaded": loaded, "peak": peak_memory()}


def trl(folder: Path, steps: int, threads: int) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from emlocal.machine import peak_memory

    torch.set_num_threads(threads)
    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter() - self.started)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    rows = sequences(steps, model.config.vocab_size)
    labels = [[-100] * PROMPT + row[PROMPT:] for row in rows]
    data = Dataset.from_dict({"input_ids": rows, "labels": labels})
    with tempfile.TemporaryDirectory() as out:
        settings = SFTConfig(
            output_dir=out,
            per_device_train_batch_size=MICRO,
            gradient_accumulation_steps=PER_STEP // MICRO,
            max_steps=steps,
            learning_rate=1e-4,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            bf16=True,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model,
            settings,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM"),
            callbacks=[Clock()],
        )
        loaded = peak_memory()
        trainer.train()
    return {"seconds": sum(times[1:]), "loaded": loaded, "peak": peak_memory()}


WAYS = {"emlocal": emlocal, "trl": trl}


def measure(way: str, chosen: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--folder", str(chosen.folder), "--one", way]
    command += ["--steps", str(chosen.steps), "--threads", str(chosen.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    say(f"{way}: {found['seconds']:.1f} s, peak {found['peak'] / 1e9:.2f} GB")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--one", choices=WAYS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(WAYS[chosen.one](chosen.folder, chosen.steps, chosen.threads)))
        return
    wait_until_quiet(120)
    noise = Noise()
    rounds = [{way: measure(way, chosen) for way in WAYS} for _ in range(chosen.rounds)]
    tokens = (chosen.steps - 1) * PER_STEP * (PROMPT + ANSWER)
    around = circumstances()
    print(f"`{around['command']}`, commit {around['commit']}, {around['date']}; others {noise.share():.0%}\n")
    print("| | tokens/s, median | peak memory, GB |\n|---|---|---|")
    for way in WAYS:
        speed = statistics.median(tokens / found[way]["seconds"] for found in rounds)
        peak = statistics.median(found[way]["peak"] for found in rounds)
        print(f"| {way} | {speed:.0f} | {peak / 1e9:.2f} |")
    ratios = [found["trl"]["seconds"] / found["emlocal"]["seconds"] for found in rounds]
    print(
        f"\nemlocal : TRL {statistics.median(ratios):.2f} × the speed"
        f" [{min(ratios):.2f}, {max(ratios):.2f}], n = {len(rounds)}"
    )


if __name__ == "__main__":
    main()
