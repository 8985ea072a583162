"""EM-RL and EM-FT as methods of the training loop.

EM-RL: the rewards of several answers to a prompt, relative to each other, give a policy gradient.
`PolicyGradient.gradients` shows all of it: answers → rewards → advantages → losses → gradient. Each step's
equation is a function in `emlocal.em`; the regularisers of related methods are in `em.relatives`.

EM-FT: follows the gradient of the entropy of the answers' tokens (paper eq. 2).
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from emlocal.answers.gold import answer_of, label_of
from emlocal.backends.learner import (
    Descent,
    EntropyLearner,
    EntropyObjective,
    Floats,
    OutOfMemoryError,
    PolicyLearner,
    PolicyTerms,
    Scores,
    TokenLosses,
)
from emlocal.em.entropy import Float64
from emlocal.em.losses import PolicyObjective, averaging_weights
from emlocal.em.relatives import clip_cov, covariances, kl_cov, tw_grpo_weights
from emlocal.em.rewards import (
    grpo,
    majority_reward,
    rloo,
    self_certainty_reward,
    sequence_reward,
    token_reward,
    verifier_reward,
    vote_reward,
    weighted_sum,
    zero_variance,
)
from emlocal.errors import EmlocalError, UsageError
from emlocal.models.adapters.adapter import Adapter
from emlocal.sampling.draw import request_key
from emlocal.text import counted, plain
from emlocal.training.distillation import Distillation
from emlocal.training.engines import Objective
from emlocal.training.loop import Gradient
from emlocal.training.prompts import Prompt, check_answers
from emlocal.training.rl_settings import Reward, RLSettings
from emlocal.training.rollouts import AnswerTokens, MicroBatches, Rollout, token_weights
from emlocal.training.settings import FineTuneSettings

if TYPE_CHECKING:
    from emlocal.backends.engine import Opened

_ADVANTAGES = {"rloo": rloo, "grpo": grpo}


def objective_of(settings: RLSettings) -> PolicyObjective:
    """Returns the loss of a token. KL-Cov replaces clipping, so with it nothing is clipped."""
    free = settings.regularize == "kl-cov"
    return PolicyObjective(
        settings.loss,
        np.inf if free else settings.clip_low,
        np.inf if free else settings.clip_high,
        settings.kl_beta,
        settings.entropy_bonus,
    )


@dataclass(frozen=True)
class PolicyGradient:
    """Trains on N answers to each prompt, with `ppo_epochs` updates a step. A `loop.Method`."""

    settings: RLSettings
    learner: PolicyLearner
    labels: Sequence[str] = ()
    """The right answer to each prompt in the data, for the reward `verifier`."""
    draws_once: bool = False

    @property
    def samples(self) -> int:
        """Number of answers to each prompt."""
        return self.settings.samples

    def prepare(self, *_: object) -> None:
        """Does nothing: each step draws its own answers."""

    def taught(self, step: int) -> None:
        """Returns None: the model draws the answers."""

    def identity(self) -> dict[str, Any]:
        """Returns a digest of the labels, if the reward uses them."""
        if not self.settings.needs_labels:
            return {}
        return {"labels": hashlib.sha256(json.dumps(self.labels).encode()).hexdigest()}

    def gradients(
        self, step: int, chosen: Sequence[int], rollouts: Sequence[Rollout], batches: MicroBatches
    ) -> Iterator[Gradient]:
        """See `loop.Method`. Rewards, advantages and reference stay those of the answers as drawn."""
        s, tokens = self.settings, AnswerTokens(rollouts)
        # Scores of each token of the answers: by the model that drew them, and by the base.
        scores = self._scores(step, rollouts, batches, tokens) if s.needs_scores else None
        base = self._scores(step, rollouts, batches, tokens, base=True) if s.needs_reference else None
        # Rewards: one number for each answer, a weighted sum of the rewards in the settings.
        of_each = self.rewards(chosen, rollouts, scores, tokens)
        rewards = weighted_sum(list(of_each.values()), [weight for _, weight in s.reward])
        # Advantages: an answer's reward relative to those of the other answers to its prompt.
        groups = rewards.reshape(-1, s.samples)
        advantages = _ADVANTAGES[s.advantage](groups).ravel()
        # Losses: the cost of each token, given its answer's advantage.
        losses = self._losses(step, rollouts, batches, advantages, scores, base, tokens)
        row: dict[str, Any] = {
            "reward": float(rewards.mean()),
            "reward_std": float(groups.std(axis=1, ddof=1).mean()),
            "zero_variance": float(zero_variance(groups).mean()),
        }
        if len(of_each) > 1:
            row |= {f"reward_{name}": float(each.mean()) for name, each in of_each.items()}
        # Gradients: one for each update on these answers; the loop follows each before the next is computed.
        for _ in range(s.ppo_epochs):
            terms = self._accumulate(step, rollouts, batches, losses, tokens)
            count = sum(each.tokens for each in terms)
            row |= {
                "loss": sum(each.loss for each in terms),
                "policy_entropy": sum(each.entropy for each in terms) / count,
                "clipped": sum(each.clipped for each in terms) / count,
            }
            kl = sum(each.kl for each in terms) / count
            yield Gradient(kl if s.needs_reference else None, dict(row))

    def rewards(
        self, chosen: Sequence[int], rollouts: Sequence[Rollout], scores: Scores | None, tokens: AnswerTokens
    ) -> dict[Reward, Float64]:
        """Computes each reward in the settings for each answer; arrays of shape [P·N]."""
        return {
            name: self._reward(name, chosen, rollouts, scores, tokens) for name, _ in self.settings.reward
        }

    def _reward(
        self,
        name: Reward,
        chosen: Sequence[int],
        rollouts: Sequence[Rollout],
        scores: Scores | None,
        tokens: AnswerTokens,
    ) -> Float64:
        if name in ("token", "sequence", "self-certainty"):
            assert scores is not None
            if name == "token":
                return token_reward(scores.entropies, tokens.lengths, self.settings.normalize)
            if name == "sequence":
                return sequence_reward(scores.log_probs, tokens.lengths, self.settings.normalize)
            return self_certainty_reward(scores.self_certainties, tokens.lengths)
        answers = [answer_of(rollout.text) for rollout in rollouts]
        n = self.settings.samples
        groups = [answers[i : i + n] for i in range(0, len(answers), n)]
        if name == "verifier":
            pairs = zip(groups, chosen, strict=True)
            return np.concatenate([verifier_reward(group, label_of(self.labels[i])) for group, i in pairs])
        reward = majority_reward if name == "majority" else vote_reward
        return np.concatenate([reward(group) for group in groups])

    def _losses(
        self,
        step: int,
        rollouts: Sequence[Rollout],
        batches: MicroBatches,
        advantages: Float64,
        scores: Scores | None,
        base: Scores | None,
        tokens: AnswerTokens,
    ) -> TokenLosses:
        """Returns the loss terms of each token: its answer's advantage, changed as the settings ask."""
        s, pull = self.settings, None
        of_tokens = np.repeat(advantages, tokens.lengths)
        if s.token_weights == "tw-grpo":  # noqa: S105
            of_tokens *= self._token_weights(step, rollouts, batches)
        if s.regularize != "none":
            assert scores is not None
            cov = covariances(of_tokens, scores.log_probs)
            if s.regularize == "clip-cov":
                key = np.array([s.seed, request_key(f"clip-cov {step}")], dtype=np.uint64)
                uniforms = np.random.Generator(np.random.Philox(key=key)).random(len(cov))
                of_tokens[clip_cov(cov, uniforms, share=s.clip_cov_share)] = 0.0
            else:
                pull = np.where(kl_cov(cov, share=s.kl_cov_share), s.kl_cov_pull, 0.0).astype(np.float32)
        return TokenLosses(
            of_tokens.astype(np.float32),
            averaging_weights(tokens.lengths, s.averaging).astype(np.float32),
            None if scores is None else scores.log_probs,
            None if base is None else base.log_probs,
            pull,
        )

    def _token_weights(self, step: int, rollouts: Sequence[Rollout], batches: MicroBatches) -> Float64:
        """Returns TW-GRPO's weight of each token."""
        n = self.settings.samples
        groups = [list(range(i, i + n)) for i in range(0, len(rollouts), n)]
        try:
            found = batches.run_parts(
                step, groups, lambda group: self.learner.divergences([rollouts[i] for i in group])
            )
        except OutOfMemoryError:
            raise EmlocalError(
                f"{n} answers to a prompt do not fit in memory together, which TW-GRPO needs",
                "set fewer --samples or a smaller --max-tokens",
            ) from None
        weights: dict[int, Float64] = {}
        for group, divergences in found:
            of_positions = tw_grpo_weights(divergences, self.settings.tw_alpha)
            weights |= {i: of_positions[: len(rollouts[i].answer)] for i in group}
        return np.concatenate([weights[i] for i in range(len(rollouts))])

    def _scores(
        self,
        step: int,
        rollouts: Sequence[Rollout],
        batches: MicroBatches,
        tokens: AnswerTokens,
        *,
        base: bool = False,
    ) -> Scores:
        """Scores the tokens of all answers."""
        parts = batches.run(
            step, rollouts, lambda part: self.learner.score([rollouts[i] for i in part], base=base)
        )
        found: dict[str, Floats] = defaultdict(lambda: np.empty(tokens.count, dtype=np.float32))
        for part, scores in parts:
            for name, values in vars(scores).items():
                found[name][tokens.of(part)] = values
        return Scores(**found)

    def _accumulate(
        self,
        step: int,
        rollouts: Sequence[Rollout],
        batches: MicroBatches,
        losses: TokenLosses,
        tokens: AnswerTokens,
    ) -> list[PolicyTerms]:
        parts = batches.run(
            step,
            rollouts,
            lambda part: self.learner.accumulate([rollouts[i] for i in part], losses.of(tokens.of(part))),
        )
        return [terms for _, terms in parts]


def em_rl(settings: RLSettings, recipe: str | None = None) -> "Objective[PolicyLearner]":
    """Returns the objective of `emlocal rl`; `recipe`: the name of the recipe behind the settings."""

    def check(prompts: Sequence[Prompt]) -> None:
        if settings.needs_labels:
            check_answers(prompts, "the reward verifier")

    def learner(opened: "Opened", adapter: Adapter, descent: Descent, checkpointing: bool) -> PolicyLearner:
        return opened.policy_learner(
            adapter,
            descent,
            objective_of(settings),
            temperature=settings.rollout_temperature,
            checkpointing=checkpointing,
        )

    def method(made: PolicyLearner, prompts: Sequence[Prompt]) -> PolicyGradient:
        labels = [p.answer or "" for p in prompts] if settings.needs_labels else []
        return PolicyGradient(settings, made, labels)

    def told(prompts: int) -> Sequence[str]:
        s = settings
        parts = [name if w == 1 else f"{plain(w)} · {name}" for name, w in s.reward]
        worth = " + ".join(parts).replace("+ -", "- ")
        return (
            f"recipe {recipe or 'default'}: {counted(s.steps, 'step')} of {s.samples:,} answers to each of"
            f" {s.prompts_per_step:,} of {counted(prompts, 'prompt')},",
            f"reward {worth}, advantage {s.advantage}, loss {s.loss}, β {plain(s.kl_beta)},",
            f"learning rate {plain(s.learning_rate)}, rank {s.rank}, seed {s.seed}",
        )

    return Objective("rl", settings, check, learner, method, told, "em-rl")


@dataclass(frozen=True)
class FineTune:
    """Trains on one answer to each prompt, with one update a step. A `loop.Method`."""

    settings: FineTuneSettings
    learner: EntropyLearner
    samples: int = 1
    draws_once: bool = False

    def prepare(self, *_: object) -> None:
        """Does nothing: each step draws its own answers."""

    def taught(self, step: int) -> None:
        """Returns None: the model draws the answers."""

    def identity(self) -> dict[str, Any]:
        """Returns an empty table: only the prompts matter."""
        return {}

    def gradients(
        self, step: int, chosen: Sequence[int], rollouts: Sequence[Rollout], batches: MicroBatches
    ) -> Iterator[Gradient]:
        """See `loop.Method`."""
        weights = token_weights(rollouts, self.settings.normalize)
        parts = batches.run(
            step,
            rollouts,
            lambda part: self.learner.accumulate([rollouts[i] for i in part], [weights[i] for i in part]),
        )
        tokens = sum(terms.tokens for _, terms in parts)
        kl = sum(terms.kl for _, terms in parts) / tokens
        yield Gradient(
            kl if self.settings.measures_kl else None,
            {
                "loss": sum(terms.loss for _, terms in parts),
                "loss_entropy": sum(terms.entropy for _, terms in parts) / tokens,
            },
        )


def em_ft(settings: FineTuneSettings, recipe: str = "default") -> Objective[EntropyLearner]:
    """Returns the objective of EM-FT; `recipe`: the name of the recipe behind the settings."""

    def check(prompts: Sequence[Prompt]) -> None:
        if recipe == "one-shot" and len(prompts) > 1:
            raise UsageError(
                f"--recipe one-shot trains on one prompt; there are {len(prompts):,}",
                "use one prompt: --limit 1",
            )

    def learner(opened: "Opened", adapter: Adapter, descent: Descent, checkpointing: bool) -> EntropyLearner:
        objective = EntropyObjective(settings.kl_beta, settings.measures_kl, settings.temperature)
        return opened.entropy_learner(adapter, descent, objective, checkpointing=checkpointing)

    def told(prompts: int) -> Sequence[str]:
        s = settings
        return (
            f"recipe {recipe}: {counted(s.steps, 'step')} of {counted(s.prompts_per_step, 'answer')}"
            f" to {counted(prompts, 'prompt')},",
            f"learning rate {plain(s.learning_rate)}, β {plain(s.kl_beta)}, rank {s.rank}, seed {s.seed}",
        )

    return Objective(
        "finetune", settings, check, learner, lambda made, _: FineTune(settings, made), told, "em-ft"
    )


def distillation(settings: FineTuneSettings, recipe: str = "vote") -> Objective[PolicyLearner]:
    """Returns the objective of `emlocal finetune --learn vote`; `recipe`: the recipe behind the settings."""

    def learner(opened: "Opened", adapter: Adapter, descent: Descent, checkpointing: bool) -> PolicyLearner:
        objective = PolicyObjective("reinforce", beta=settings.kl_beta)
        return opened.policy_learner(
            adapter, descent, objective, temperature=1.0, checkpointing=checkpointing
        )

    def told(prompts: int) -> Sequence[str]:
        s = settings
        return (
            f"recipe {recipe}: {counted(s.samples, 'sample')} of each of {counted(prompts, 'prompt')} vote;"
            f" {counted(s.steps, 'step')} of {counted(s.prompts_per_step, 'answer')} that won",
            f"by a margin of {s.margin:g},"
            f" learning rate {plain(s.learning_rate)}, β {plain(s.kl_beta)}, rank {s.rank}, seed {s.seed}",
        )

    return Objective(
        "finetune",
        settings,
        lambda prompts: None,
        learner,
        lambda made, _: Distillation(settings, made),
        told,
        "em-rl",
    )


def fine_tuning(settings: FineTuneSettings, recipe: str = "default") -> Objective[Any]:
    """Returns the objective of `emlocal finetune`: entropy, or the winners of votes."""
    return (distillation if settings.learn == "vote" else em_ft)(settings, recipe)
