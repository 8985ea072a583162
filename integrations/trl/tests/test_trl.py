"""The TRL trainers against emlocal's reference: losses, gradients, processes, adapters."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from emlocal_trl.em_ft import EMFTTrainer

from emlocal.em.entropy import entropy, log_softmax
from emlocal.em.losses import PolicyObjective, averaging_weights, em_ft, log_prob_gradient, policy_loss
from emlocal.em.rewards import rloo, sequence_reward, token_reward
from emlocal.errors import UsageError
from emlocal.models.adapters import read_adapter
from emlocal.training.settings import FineTuneSettings

KINDS = ["ft", "ft-sequence", "rl-token", "rl-sequence"]
Rows = list[tuple[torch.Tensor, list[int], np.ndarray]]


def answers() -> Iterator[tuple[list[int], list[int]]]:
    """Yields (prompt, answer) of the step, two for each prompt."""
    own = tiny.tokenizer()
    for prompt in tiny.PROMPTS:
        ids = own(prompt)["input_ids"]
        for place in range(2):
            yield ids, tiny.answer(" ".join(map(str, ids)), place)


def rows_of(model: Any) -> Rows:
    """Returns logits that predict an answer, with a graph; its tokens; the base model's logits."""
    found: Rows = []
    for prompt, answer in answers():
        ids = torch.tensor([prompt + answer])
        with model.disable_adapter(), torch.no_grad():
            base = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        found.append((model(input_ids=ids).logits[0, len(prompt) - 1 : -1], answer, base.numpy()))
    return found


def reference(kind: str) -> tuple[float, dict[str, np.ndarray]]:
    """Returns the loss of the step and the adapter's gradients, by emlocal's reference over all logits."""
    model = tiny.model()
    rows = rows_of(model)
    lengths = [len(answer) for _, answer, _ in rows]
    z = [logits.detach().double().numpy() for logits, _, _ in rows]
    if kind.startswith("ft"):
        weights = averaging_weights(lengths, "sum" if "sequence" in kind else "token")
        found = em_ft(np.concatenate(z), np.concatenate([b for _, _, b in rows]), beta=0.7, temperature=1.3)
        loss = float((weights * (found.entropy + 0.7 * found.kl)).sum())
        gradient = weights[:, None] * found.gradient
    else:
        tokens = [token for _, answer, _ in rows for token in answer]
        log_p = log_softmax(np.concatenate(z))
        log_probs = log_p[np.arange(len(tokens)), tokens]
        if kind == "rl-token":
            rewards = token_reward(entropy(np.concatenate(z)), lengths)
        else:
            rewards = sequence_reward(log_probs, lengths)
        advantages = rloo(rewards.reshape(-1, 2)).ravel()

        terms = policy_loss(log_probs, np.repeat(advantages, lengths), PolicyObjective())
        slope = terms.slope * averaging_weights(lengths, "sum")
        gradient = np.stack(
            [s * log_prob_gradient(row, t) for s, row, t in zip(slope, log_p, tokens, strict=True)]
        )
        loss = float(-advantages.mean())  # TRL's: the ratio is 1
    sum_of = sum(
        (logits * torch.from_numpy(part).float()).sum()
        for (logits, _, _), part in zip(rows, np.split(gradient, np.cumsum(lengths)[:-1]), strict=True)
    )
    assert isinstance(sum_of, torch.Tensor)
    sum_of.backward()
    return loss, {
        name: parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(np.abs(each).max()) for each in expected.values())
    assert scale > 1e-4
    for name, each in expected.items():
        assert np.abs(found[name] - each).max() <= tolerance * scale, name


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_the_references(kind: str, tmp_path: Path) -> None:
    training = tiny.trainer(kind, tmp_path)
    training.train()
    loss, gradients = reference(kind)
    same(tiny.gradients_of(training), gradients, 1e-4)
    logged = [entry["loss"] for entry in training.state.log_history if "loss" in entry]
    assert logged[0] == pytest.approx(loss, abs=1e-4 * max(1.0, abs(loss)))


@pytest.mark.parametrize("kind", ["ft", "rl-token"])
def test_two_processes_are_one(kind: str, tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        # `accelerate launch --cpu` starts one process only
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        launch += ["--standalone"]
        script = str(Path(__file__).parent / "tiny.py")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*launch, script, kind, str(out), str(processes)], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr[-3000:]
        with np.load(out / "gradients.npz") as file:
            found.append(dict(file))
    same(found[1], found[0], 1e-5)
    one, two = (read_adapter(tmp_path / str(n) / "adapter") for n in (1, 2))
    for name, pair in one.pairs.items():
        np.testing.assert_allclose(two.pairs[name].a, pair.a, atol=2e-5)
        np.testing.assert_allclose(two.pairs[name].b, pair.b, atol=2e-5)


def test_the_adapter_is_emlocals_too(tmp_path: Path) -> None:
    training = tiny.trainer("ft", tmp_path)
    training.train()
    training.save_model(str(tmp_path / "adapter"))
    adapter = read_adapter(tmp_path / "adapter")
    own = dict(training.model.named_parameters())
    assert len(adapter.pairs) == 6
    for name, pair in adapter.pairs.items():
        (a,) = [own[key] for key in own if f"{name}.lora_A.default" in key]
        np.testing.assert_array_equal(pair.a, a.detach().numpy())


def test_killed_and_resumed_is_the_same(tmp_path: Path) -> None:
    whole = tiny.trainer("ft", tmp_path / "whole", max_steps=4)
    whole.train()
    first = tiny.trainer("ft", tmp_path / "parts", max_steps=4, save_strategy="steps", save_steps=2)
    first.args.save_strategy = "steps"
    first.train()
    again = tiny.trainer("ft", tmp_path / "parts", max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    for (name, one), (_, other) in zip(
        whole.model.named_parameters(), again.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, msg=name)


def test_the_guards_stop(tmp_path: Path) -> None:
    training = tiny.trainer("ft", tmp_path, max_steps=5)
    (guard,) = [each for each in training.callback_handler.callbacks if hasattr(each, "guards")]
    guard.guards.settings = FineTuneSettings(entropy_floor=50.0)
    training.train()
    assert training.state.global_step == 1
    assert "below --entropy-floor 50" in guard.why


def test_what_em_ft_cannot_do_is_refused(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path, 1, num_iterations=2)
    with pytest.raises(UsageError, match="one optimiser step"):
        EMFTTrainer(tiny.model(), args)
