"""The results of a step's answers, token by token, compared with loops written from the equations."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from emlocal.backends.learner import Answer, Descent, OutOfMemoryError, PolicyTerms, TokenLosses
from emlocal.backends.torch.learner import TorchPolicyLearner
from emlocal.em.losses import PolicyObjective
from emlocal.errors import EmlocalError
from emlocal.sampling.draw import request_key
from emlocal.training.rl import PolicyGradient, objective_of
from emlocal.training.rl_settings import RLSettings
from emlocal.training.rollouts import MicroBatches, Rollout
from tests.tiny_pair import ModelPair, random_adapter

Rows = list[list[list[float]]]
"""log p by answer, token and word of the vocabulary."""

STEP, CHOSEN, SAMPLES = 4, (6, 1, 3), 3
LABELS = ["7", "12", "no", "x", "no", "no", r"it is \boxed{3.0}", "no"]
TEXTS = ["\\boxed{3}", "so 3.", "so 4", "12", "none", "13", "x", "y", "5"]
"""Texts of which the first two and the fourth are right.

The labels of the chosen prompts are 3, 12, and x. None of the last three texts matches x, because only
numbers and boxed texts are answers.
"""
SCALED = {"reward": (("token", 0.5), ("sequence", -0.2), ("verifier", 3.0))}


def answers() -> list[Rollout]:
    """Makes three answers to each prompt.

    Their lengths differ, so micro-batches take them in another order.
    """
    random = np.random.default_rng(2)
    lengths = [3, 7, 1, 4, 9, 2, 5, 5, 6]
    found = []
    for i, (n, text) in enumerate(zip(lengths, TEXTS, strict=True)):
        prompt = (5 + CHOSEN[i // SAMPLES], 9, 11)[: 1 + i // SAMPLES]
        found.append(Rollout(prompt, tuple(random.integers(3, 200, n).tolist()), True, text, 0.0))
    return found


class Recording(TorchPolicyLearner):
    """Records the loss of each answer's tokens."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.given: list[dict[tuple[int, ...], list[TokenLosses]]] = []

    def accumulate(self, batch: Sequence[Answer], losses: TokenLosses) -> PolicyTerms:
        end = 0
        for each in batch:
            end += len(each.answer)
            places = np.arange(end - len(each.answer), end)
            self.given[-1].setdefault(tuple(each.answer), []).append(losses.of(places))
        assert end == len(losses.weights)
        return super().accumulate(batch, losses)


def learner_of(pair: ModelPair, settings: RLSettings) -> Recording:
    model = AutoModelForCausalLM.from_pretrained(pair.folder, dtype=torch.float32)
    return Recording(
        model,
        random_adapter(),
        Descent(),
        objective_of(settings),
        temperature=settings.rollout_temperature,
    )


def batches_of(learner: Recording, budget: int = 25) -> MicroBatches:
    return MicroBatches(budget, learner.forget, lambda: False, lambda *_: None, lambda text: None)


def rows_of(learner: Recording, temperature: float, *, base: bool = False) -> Rows:
    """Returns the rows, one prefix after the other."""
    found: Rows = []
    with torch.no_grad():
        for each in answers():
            found.append([])
            for i in range(len(each.answer)):
                prefix = torch.tensor([[*each.prompt, *each.answer[:i]]])
                logits = learner.model(prefix).logits[0, -1].double() / temperature
                found[-1].append(logits.log_softmax(-1).tolist())
    return found


class ByLoops:
    """The same step, one number at a time."""

    def __init__(self, settings: RLSettings, rows: Rows) -> None:
        self.settings, self.rows, self.rollouts = settings, rows, answers()

    def log_prob(self, i: int, t: int) -> float:
        return self.rows[i][t][self.rollouts[i].answer[t]]

    def worth(self, name: str, i: int) -> float:
        length, first = len(self.rows[i]), i // SAMPLES * SAMPLES
        scale = 1 / length if self.settings.normalize == "mean" else 1.0
        keys = {"\\boxed{3}": "3", "so 3.": "3", "so 4": "4", "none": None, "x": None, "y": None}
        group = [keys.get(text, text) for text in TEXTS[first : first + SAMPLES]]
        own, label = group[i - first], {0: "3", 1: "12", 2: "x"}[i // SAMPLES]
        agree = 1 if own is None else group.count(own)
        most = max([group.count(key) for key in group if key is not None], default=0)
        winner = next((key for key in group if key is not None and group.count(key) == most), None)
        return {
            "token": lambda: scale * sum(math.exp(x) * x for row in self.rows[i] for x in row),
            "sequence": lambda: scale * sum(self.log_prob(i, t) for t in range(length)),
            "self-certainty": lambda: (
                sum(-math.log(len(row)) - sum(row) / len(row) for row in self.rows[i]) / length
            ),
            "majority": lambda: agree / SAMPLES,
            "vote": lambda: float(own is not None and own == winner),
            "verifier": lambda: float(own == label),
        }[name]()

    def rewards(self) -> list[float]:
        return [sum(w * self.worth(name, i) for name, w in self.settings.reward) for i in range(len(TEXTS))]

    def advantage(self, i: int) -> float:
        first, rewards = i // SAMPLES * SAMPLES, self.rewards()
        group, own = rewards[first : first + SAMPLES], rewards[i]
        if max(group) == min(group):
            return 0.0
        if self.settings.advantage == "rloo":
            return own - (sum(group) - own) / (SAMPLES - 1)
        mean = sum(group) / SAMPLES
        return (own - mean) / (math.sqrt(sum((r - mean) ** 2 for r in group) / (SAMPLES - 1)) + 1e-6)

    def position_weight(self, i: int, t: int) -> float:
        """Returns TW-GRPO's weight."""
        if self.settings.token_weights == "none":  # noqa: S105
            return 1.0
        first = i // SAMPLES * SAMPLES
        group = self.rows[first : first + SAMPLES]
        all_of_them = [self._disagreement(group, at) for at in range(max(map(len, group)))]
        least, most = min(all_of_them), max(all_of_them)
        return 1 + (self.settings.tw_alpha - 1) * (all_of_them[t] - least) / (most - least)

    def _disagreement(self, group: Rows, t: int) -> float:
        size, total = len(group[0][0]), 0.0
        rows = [of_answer[t] if t < len(of_answer) else [-math.log(size)] * size for of_answer in group]
        for row in rows:
            for v in range(size):
                d = min(max(sum(other[v] for other in rows) / SAMPLES - row[v], -11.0), 11.0)
                total += (math.exp(d) - d - 1) / SAMPLES
        return total

    def tokens(self) -> tuple[list[list[float]], list[list[float]]]:
        """Returns the advantages and pulls of each answer's tokens."""
        s = self.settings
        advantages = [
            [self.advantage(i) * self.position_weight(i, t) for t in range(len(row))]
            for i, row in enumerate(self.rows)
        ]
        places = [(i, t) for i, row in enumerate(self.rows) for t in range(len(row))]
        m = len(places)
        mean_a = sum(advantages[i][t] for i, t in places) / m
        mean_l = sum(self.log_prob(i, t) for i, t in places) / m
        cov = {(i, t): (advantages[i][t] - mean_a) * (self.log_prob(i, t) - mean_l) for i, t in places}
        pulls = [[0.0] * len(row) for row in self.rows]
        if s.regularize == "kl-cov":
            for i, t in sorted(places, key=lambda place: -cov[place])[: max(1, int(s.kl_cov_share * m))]:
                pulls[i][t] = s.kl_cov_pull
        if s.regularize == "clip-cov":
            key = np.array([s.seed, request_key(f"clip-cov {STEP}")], dtype=np.uint64)
            drawn = np.random.Generator(np.random.Philox(key=key)).random(m)
            uniforms = dict(zip(places, drawn, strict=True))
            within = sorted((place for place in places if 1 < cov[place] < 5), key=uniforms.__getitem__)
            for i, t in within[: max(1, int(s.clip_cov_share * m))]:
                advantages[i][t] = 0.0
        return advantages, pulls

    def weight(self, i: int) -> float:
        n, total = len(self.rows), sum(map(len, self.rows))
        return {"token": 1 / total, "sequence": 1 / (n * len(self.rows[i])), "sum": 1 / n}[
            self.settings.averaging
        ]


@pytest.mark.parametrize(
    "changes",
    [
        {"reward": (("token", 1.0),)},
        {"reward": (("token", 1.0),), "normalize": "mean", "averaging": "sum"},
        {"reward": (("sequence", 1.0),), "rollout_temperature": 0.7},
        {"reward": (("self-certainty", 1.0),), "advantage": "grpo", "loss": "ppo-clip"},
        {"reward": (("majority", 1.0),), "averaging": "sequence"},
        {"reward": (("vote", 1.0),), "advantage": "grpo", "kl_beta": 0.0, "max_kl": 0.0},
        {"reward": (("verifier", 1.0),), "kl_beta": 0.0},
        {**SCALED, "loss": "ppo-clip", "ppo_epochs": 2, "regularize": "clip-cov", "clip_cov_share": 0.1},
        {**SCALED, "loss": "ppo-clip", "ppo_epochs": 2, "regularize": "kl-cov", "kl_cov_share": 0.2,
         "kl_cov_pull": 0.5},
        {**SCALED, "token_weights": "tw-grpo", "tw_alpha": 2.5},
        {**SCALED, "advantage": "grpo", "token_weights": "tw-grpo", "regularize": "clip-cov",
         "clip_cov_share": 0.3, "averaging": "sequence", "rollout_temperature": 1.4, "seed": 9},
    ],
    ids=str,
)  # fmt: skip
def test_each_token_has_the_loss_of_its_answer(pair: ModelPair, changes: dict[str, Any]) -> None:
    settings = replace(RLSettings(samples=SAMPLES, prompts_per_step=3, kl_beta=0.01), **changes)
    learner, rollouts = learner_of(pair, settings), answers()
    rows = rows_of(learner, settings.rollout_temperature)
    by_loops = ByLoops(settings, rows)
    advantages, pulls = by_loops.tokens()
    base = learner.score(rollouts, base=True).log_probs  # compared with a loop in test_policy_learner
    ends = np.cumsum([len(each.answer) for each in rollouts])
    method = PolicyGradient(settings, learner, LABELS)
    learner.given.append({})
    told = []
    for gradient in method.gradients(STEP, CHOSEN, rollouts, batches_of(learner)):
        told.append(gradient)
        learner.update(1e-2)
        learner.given.append({})
    assert len(told) == settings.ppo_epochs
    for given in learner.given[:-1]:
        assert len(given) == len(rollouts)
        for i, rollout in enumerate(rollouts):
            (losses,) = given[rollout.answer]
            assert losses.advantages == pytest.approx(advantages[i], rel=1e-3, abs=1e-3)
            assert losses.weights == pytest.approx([by_loops.weight(i)] * len(rows[i]), rel=1e-6)
            if settings.needs_scores:
                old = [by_loops.log_prob(i, t) for t in range(len(rows[i]))]
                assert losses.old == pytest.approx(old, abs=1e-4)
            if settings.needs_reference:
                assert losses.reference == pytest.approx(base[ends[i] - len(rows[i]) : ends[i]], abs=1e-4)
            assert (losses.reference is None) == (not settings.needs_reference)
            assert (losses.pull is None) == (settings.regularize != "kl-cov")
            assert losses.pull is None or losses.pull == pytest.approx(pulls[i])
    _assert_told(told, by_loops)


def _assert_told(told: list[Any], by_loops: ByLoops) -> None:
    """Checks the metrics of a step's first gradient."""
    settings, rewards = by_loops.settings, by_loops.rewards()
    groups = np.reshape(rewards, (-1, SAMPLES))
    row = told[0].row
    assert row["reward"] == pytest.approx(np.mean(rewards), abs=1e-4)
    assert row["reward_std"] == pytest.approx(groups.std(axis=1, ddof=1).mean(), abs=1e-4)
    assert row["zero_variance"] == sum(len(set(group)) == 1 for group in groups.tolist()) / 3
    entropies = [-sum(math.exp(x) * x for x in row) for answer in by_loops.rows for row in answer]
    assert row["policy_entropy"] == pytest.approx(np.mean(entropies), abs=1e-4)
    assert row["clipped"] == 0
    assert (told[0].kl is None) == (not settings.needs_reference)
    if len(settings.reward) > 1:
        for name, _ in settings.reward:
            each = [by_loops.worth(name, i) for i in range(len(TEXTS))]
            assert row[f"reward_{name}"] == pytest.approx(np.mean(each), abs=1e-4)
    if settings.ppo_epochs == 2 and settings.regularize != "kl-cov":
        assert told[1].row["clipped"] > 0  # for the policy after the first update
    if settings.ppo_epochs == 2:
        assert told[1].row["reward"] == row["reward"]


def test_the_texts_are_what_the_loops_take_them_for(pair: ModelPair) -> None:
    settings = RLSettings(samples=SAMPLES, reward=(("verifier", 1.0),), kl_beta=0, max_kl=0)
    learner = learner_of(pair, settings)
    learner.given.append({})
    method = PolicyGradient(settings, learner, LABELS)
    (gradient,) = method.gradients(STEP, CHOSEN, answers(), batches_of(learner))
    assert gradient.row["reward"] == pytest.approx(3 / 9)
    assert gradient.row["zero_variance"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("budget", [9, 1000])
def test_how_a_step_is_cut_up_does_not_matter(pair: ModelPair, budget: int) -> None:
    settings = RLSettings(samples=SAMPLES, token_weights="tw-grpo", regularize="clip-cov")  # noqa: S106
    found = []
    for each in (budget, 40):
        learner = learner_of(pair, settings)
        learner.given.append({})
        method = PolicyGradient(settings, learner)
        (gradient,) = method.gradients(STEP, CHOSEN, answers(), batches_of(learner, each))
        found.append((gradient.row["loss"], gradient.kl, learner.update(1e-3)))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("where", ["score", "accumulate"])
def test_without_memory_a_step_is_made_anew_in_smaller_parts(
    pair: ModelPair, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    settings = RLSettings(samples=SAMPLES, loss="ppo-clip", ppo_epochs=2)
    rooms = (1000, 12)  # tokens that a part may have
    found = []
    for room in rooms:
        learner = learner_of(pair, settings)
        learner.given.append({})
        with monkeypatch.context() as patch:
            patch.setattr(learner, where, _cramped(getattr(learner, where), room))
            method, batches = PolicyGradient(settings, learner), batches_of(learner, 48)
            norms = [learner.update(1e-3) for _ in method.gradients(STEP, CHOSEN, answers(), batches)]
        assert batches.budget == (48 if room == 1000 else 12)
        found.append(norms)
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def _cramped(real: Callable[..., Any], room: int) -> Callable[..., Any]:
    def run(batch: Sequence[Rollout], *args: Any, **more: Any) -> Any:
        result = real(batch, *args, **more)  # adds to the gradient, and then does not fit
        if len(batch) * max(map(len, batch)) > room:
            raise OutOfMemoryError
        return result

    return run


def test_a_group_that_tw_grpo_cannot_hold_at_once_is_said(
    pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = RLSettings(samples=SAMPLES, token_weights="tw-grpo")  # noqa: S106
    learner = learner_of(pair, settings)
    monkeypatch.setattr(learner, "divergences", _cramped(learner.divergences, 5))
    method = PolicyGradient(settings, learner)
    with pytest.raises(EmlocalError, match="3 answers to a prompt do not fit in memory together") as caught:
        next(method.gradients(STEP, CHOSEN, answers(), batches_of(learner)))
    assert "--samples" in caught.value.hint


def test_kl_cov_takes_the_clip_out() -> None:
    held = RLSettings(loss="ppo-clip", regularize="kl-cov", ppo_epochs=2, clip_low=0.1, entropy_bonus=0.3)
    assert objective_of(held) == PolicyObjective("ppo-clip", math.inf, math.inf, 0.001, 0.3)
    clipped = replace(held, regularize="clip-cov", clip_high=0.4)
    assert objective_of(clipped) == PolicyObjective("ppo-clip", 0.1, 0.4, 0.001, 0.3)
