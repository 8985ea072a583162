"""Answers of the current model, on which a step trains, and guards that detect a collapse.

`MicroBatches` groups rollouts of similar length into batches within a budget of tokens.

`Guards` stop a run by themselves, because it may collapse and there are no labels to show it. A model that
only minimises its entropy ends in answers that are certain and worthless: loops, one-word answers, text
without end. The answers show this when compared with those of the model before the first update. A collapse
may take only one or two updates.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from emlocal.backends.base import Backend
from emlocal.backends.learner import OutOfMemoryError, Processes
from emlocal.errors import CancelledError, EmlocalError
from emlocal.generation import Completion, Finished, Job, Request, Scheduler
from emlocal.generation.thinking import Reasoning
from emlocal.methods.voting import repeated
from emlocal.sampling import SamplingParams, Uniforms
from emlocal.sampling.draw import request_key
from emlocal.training.settings import Normalize, TrainingSettings


@dataclass(frozen=True)
class Rollout:
    """One answer to one prompt."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """All tokens that were drawn, including an end token."""
    ended: bool
    """Whether the model ended the answer, rather than a limit."""
    text: str
    entropy: float
    """Sum over the answer's tokens as they were drawn, in nats, at temperature 1."""

    def __len__(self) -> int:
        """Returns the number of tokens that go through the model to train on this answer."""
        return len(self.prompt) + len(self.answer) - 1


@dataclass(frozen=True)
class RolloutStats:
    """Statistics of a step's answers."""

    answers: int
    tokens: int
    entropy: float
    """Mean over tokens, in nats."""
    length: float
    """Mean number of tokens of an answer."""
    ended: float
    """Share of answers that the model ended."""
    repetition: float
    """Mean share of an answer's sequences of 4 tokens that occurred earlier in it."""


def draw_rollouts(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    settings: TrainingSettings,
    step: int,
    parallel: int,
    *,
    places: Sequence[int] | None = None,
    samples: int = 1,
    params: SamplingParams | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Rollout]:
    """Draws answers to each prompt from the plain distribution at `rollout_temperature`.

    The result has `samples` answers to the first prompt, then those to the next; a prompt is read once for
    all of them. The draws depend on seed, step and place, so a resumed run draws the same. `progress`
    receives the number of answers so far. `places`: the places of the prompts in the step, if they are not
    the whole step. `params`: replaces the plain distribution.

    Raises CancelledError, and the engine's errors.
    """
    params = params or SamplingParams(temperature=settings.rollout_temperature, min_p=0.0)
    jobs = [
        Job(
            prompt,
            [
                Request(
                    params,
                    Uniforms(settings.seed, request_key(f"{step}/{place}"), k),
                    settings.max_tokens,
                    reasoning=Reasoning(),  # rewards look at the answer alone
                )
                for k in range(samples)
            ],
        )
        for place, prompt in zip(places or range(len(prompts)), prompts, strict=True)
    ]
    done: dict[Job, list[Rollout]] = {}
    waiting = iter(jobs)
    with Scheduler(backend, parallel) as runner:
        for event in runner.run(lambda: next(waiting, None), cancelled):
            if isinstance(event, Finished):
                job = event.handle.job
                done[job] = [_rollout(job.prompt, each) for each in event.handle.result()]
                progress(samples * len(done))
    return [rollout for job in jobs for rollout in done[job]]


def _rollout(prompt: Sequence[int], completion: Completion) -> Rollout:
    return Rollout(
        tuple(prompt),
        tuple(draw.token for draw in completion.draws),
        completion.finish_reason == "stop",
        completion.text,
        sum(draw.entropy_before for draw in completion.draws),
    )


def describe(rollouts: Sequence[Rollout]) -> RolloutStats:
    """Computes the statistics of a step's answers."""
    n, tokens = len(rollouts), sum(len(r.answer) for r in rollouts)
    return RolloutStats(
        n,
        tokens,
        sum(r.entropy for r in rollouts) / tokens,
        tokens / n,
        sum(r.ended for r in rollouts) / n,
        sum(repeated(r.answer) for r in rollouts) / n,
    )


class AnswerTokens:
    """The positions of each answer's tokens in the concatenation of all answers."""

    def __init__(self, rollouts: Sequence[Rollout]) -> None:
        self.lengths = np.array([len(rollout.answer) for rollout in rollouts])
        self.count = int(self.lengths.sum())
        self._ends = np.cumsum(self.lengths)

    def of(self, answers: Sequence[int]) -> NDArray[np.intp]:
        """Returns the token positions of some answers, in their order."""
        ends, lengths = self._ends[answers], self.lengths[answers]
        return np.concatenate([np.arange(e - n, e) for e, n in zip(ends, lengths, strict=True)])


_Result = TypeVar("_Result")


@dataclass
class MicroBatches:
    """Processes a step's rollouts in parts that fit into memory."""

    budget: int
    """Tokens of a part, padding included. It is halved for the rest of the run if a part does not fit."""
    forget: Callable[[], None]
    """Drops the parts' contributions to the gradient."""
    cancelled: Callable[[], bool]
    progress: Callable[[int, int, int], None]
    """Receives the step, the number of rollouts done, and the total."""
    warn: Callable[[str], None]
    processes: Processes = field(default_factory=Processes)

    def run(
        self, step: int, rollouts: Sequence[Rollout], work: Callable[[list[int]], _Result]
    ) -> list[tuple[list[int], _Result]]:
        """Returns each part's indices and the result of `work` for it.

        If a part does not fit, all results are dropped and computed again in smaller parts.

        Raises CancelledError, and EmlocalError if a single rollout does not fit.
        """
        lengths = [len(rollout) for rollout in rollouts]
        while True:
            try:
                return self.run_parts(step, micro_batches(lengths, self.budget), work)
            except OutOfMemoryError:
                self.forget()
                if self.budget < max(lengths):
                    raise EmlocalError(
                        f"an answer of {max(lengths):,} tokens does not fit in memory",
                        "set a smaller --max-tokens, or add --gradient-checkpointing",
                    ) from None
                self.budget //= 2
                self.warn(f"out of memory: continuing with micro-batches of {self.budget:,} tokens")

    def run_parts(
        self, step: int, parts: Sequence[list[int]], work: Callable[[list[int]], _Result]
    ) -> list[tuple[list[int], _Result]]:
        """Does the same with given parts, which the processes share among them.

        Raises CancelledError or OutOfMemoryError in all processes, whichever of them met it.
        """
        own, total, done = parts[self.processes.rank :: self.processes.count], sum(map(len, parts)), 0
        results: list[tuple[list[int], _Result]] = []
        failure: type[Exception] | None = None
        for part in own:
            if self.cancelled():
                failure = CancelledError
                break
            try:
                results.append((part, work(part)))
            except OutOfMemoryError:
                failure = OutOfMemoryError
                break
            done += len(part)
            self.progress(step, done * self.processes.count, total)
        everyone = self.processes.gather((results, failure))
        for _, found in everyone:
            if found is not None:
                raise found
        return [result for theirs, _ in everyone for result in theirs]


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Groups indices into batches whose padded size, number × longest, is within `budget` tokens.

    A rollout that is longer gets a batch of its own. Each index occurs once. The longest come first, so that
    a batch that does not fit into memory fails at once.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def token_weights(rollouts: Sequence[Rollout], normalize: Normalize) -> list[float]:
    """Returns the weight of each rollout's tokens in the step's loss.

    token: 1 / all tokens, so that each token counts the same in any micro-batch. sequence: 1 / rollouts, the
    paper's eq. 2: a sum over the tokens, a mean over the answers.
    """
    if normalize == "sequence":
        return [1 / len(rollouts)] * len(rollouts)
    return [1 / sum(len(r.answer) for r in rollouts)] * len(rollouts)


WINDOW = 3
"""Number of steps whose mean decides whether to stop, because the few answers of one step vary."""


@dataclass
class Guards:
    """Checks each step's answers. `history` is its whole state."""

    settings: TrainingSettings
    history: list[dict[str, float]] = field(default_factory=list)

    def pass_over(self) -> None:
        """Records a step whose answers the current model did not draw; only its KL is checked."""
        self.history.append({})

    def look(self, stats: RolloutStats) -> str | None:
        """Checks a step's answers. Returns the reason to stop, in words, or None."""
        self.history.append(
            {"entropy": stats.entropy, "repetition": stats.repetition, "length": stats.length}
        )
        return self._beyond(_mean(self.history[-WINDOW:]))

    def look_at_kl(self, kl: float) -> str | None:
        """Checks the mean KL of the latest answers to the base, in nats a token.

        Returns a reason to stop, or None.
        """
        self.history[-1]["kl"] = kl
        return self._beyond(_mean(self.history[-WINDOW:]))

    @property
    def sound(self) -> bool:
        """Whether the latest answers are within the limits by themselves.

        The mean of a window lags behind a collapse, and the adapter to keep is one from before it.
        """
        return self._beyond(self.history[-1]) is None

    def _beyond(self, now: Mapping[str, float]) -> str | None:
        """Names the limit that is exceeded, in words; None if there is none."""
        limits = self.settings
        if "entropy" in now and (why := self._answers_beyond(now)) is not None:
            return why
        if 0 < limits.max_kl < now.get("kl", 0.0):
            return f"the KL to the base is {now['kl']:.2f} nats per token, above --max-kl {limits.max_kl:g}"
        return None

    def _answers_beyond(self, now: Mapping[str, float]) -> str | None:
        first, limits = self.history[0], self.settings
        if now["entropy"] < limits.entropy_floor:
            return (
                f"the answers' entropy is {now['entropy']:.3f} nats per token,"
                f" below --entropy-floor {limits.entropy_floor:g}"
            )
        if now["repetition"] > first["repetition"] + limits.max_repetition:
            return (
                f"{now['repetition']:.0%} of the answers' text is repeated,"
                f" {first['repetition']:.0%} at first (--max-repetition {limits.max_repetition:g})"
            )
        change = now["length"] / first["length"]
        if not 1 / limits.max_length_change <= change <= limits.max_length_change:
            return (
                f"the answers have {now['length']:.0f} tokens, {first['length']:.0f} at first"
                f" (--max-length-change {limits.max_length_change:g})"
            )
        return None


def _mean(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Averages the numbers that every step has; the last step's KL may not be known yet."""
    names = set.intersection(*(set(step) for step in steps))
    return {name: sum(step[name] for step in steps) / len(steps) for name in names}
