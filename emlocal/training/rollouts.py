"""Answers of the model as it is at this step: what a step trains on, and whether they show a collapse.

Micro-batches are rollouts of similar length together, each batch within a budget of tokens.

`Guards` stop a run by themselves: it may collapse, and no labels are there to show it. A model that only
minimizes its entropy ends in answers that are certain and worthless: loops, one-word answers, text without
end. These show in the answers themselves, against those of the model as it was before the first update: a
collapse can be over within one or two of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from emlocal.backends.base import Backend
from emlocal.backends.learner import OutOfMemoryError, Processes
from emlocal.errors import CancelledError, EmlocalError
from emlocal.generation import Completion, Finished, Job, Request, Scheduler
from emlocal.sampling import SamplingParams, Uniforms
from emlocal.sampling.draw import request_key
from emlocal.training.settings import Normalize, TrainingSettings

REPEATED = 4
"""Tokens of a run that counts as repeated when it occurs again in the same answer."""


@dataclass(frozen=True)
class Rollout:
    """One answer to one prompt."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """Every token that was drawn: the end token too, where one was."""
    ended: bool
    """Whether the model ended it, rather than a limit."""
    text: str
    entropy: float
    """Summed over the answer's tokens as they were drawn, nats, at temperature 1."""

    def __len__(self) -> int:
        """Tokens that go through the model to train on it."""
        return len(self.prompt) + len(self.answer) - 1


@dataclass(frozen=True)
class RolloutStats:
    """What the answers of a step are like."""

    answers: int
    tokens: int
    entropy: float
    """Mean over tokens, nats."""
    length: float
    """Mean tokens of an answer."""
    ended: float
    """Share of answers that the model ended."""
    repetition: float
    """Mean share of an answer's runs of 4 tokens that occurred in it before."""


def draw_rollouts(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    settings: TrainingSettings,
    step: int,
    parallel: int,
    *,
    places: Sequence[int] | None = None,
    samples: int = 1,
    cancelled: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Rollout]:
    """Answers to each prompt, in their order, from the plain distribution at `rollout_temperature`.

    `samples` to one prompt, then those to the next; a prompt is read once for all of them. The draws are
    addressed by seed, step and place, so a resumed run draws the same. `progress` takes how many are there.
    `places`: of the prompts in the step, where they are not all of it.

    Raises CancelledError, and what the engine raises.
    """
    params = SamplingParams(temperature=settings.rollout_temperature, min_p=0.0)
    jobs = [
        Job(
            prompt,
            [
                Request(
                    params, Uniforms(settings.seed, request_key(f"{step}/{place}"), k), settings.max_tokens
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
    """The statistics of a step's answers."""
    n, tokens = len(rollouts), sum(len(r.answer) for r in rollouts)
    return RolloutStats(
        n,
        tokens,
        sum(r.entropy for r in rollouts) / tokens,
        tokens / n,
        sum(r.ended for r in rollouts) / n,
        sum(repetition(r.answer) for r in rollouts) / n,
    )


def repetition(tokens: Sequence[int]) -> float:
    """The share of runs of 4 tokens that occurred before; 0 for fewer than 5 tokens, near 1 for a loop."""
    runs = list(zip(*(tokens[i:] for i in range(REPEATED)), strict=False))
    return 1 - len(set(runs)) / len(runs) if len(runs) > 1 else 0.0


_Result = TypeVar("_Result")


@dataclass
class MicroBatches:
    """Computes with a step's rollouts in parts that fit into memory."""

    budget: int
    """Tokens of a part, padding included. Halved when one did not fit, for the rest of the run."""
    forget: Callable[[], None]
    """Drops what parts have added to the gradient."""
    cancelled: Callable[[], bool]
    progress: Callable[[int, int, int], None]
    """Takes the step, rollouts done, and how many there are."""
    warn: Callable[[str], None]
    processes: Processes = field(default_factory=Processes)

    def run(
        self, step: int, rollouts: Sequence[Rollout], work: Callable[[list[int]], _Result]
    ) -> list[tuple[list[int], _Result]]:
        """Each part's indices, and what `work` makes of them.

        Where a part does not fit, all is forgotten and made anew in smaller ones.

        Raises CancelledError, and EmlocalError where a single rollout does not fit.
        """
        lengths = [len(rollout) for rollout in rollouts]
        while True:
            try:
                return self.run_parts(step, micro_batches(lengths, self.budget), work)
            except OutOfMemoryError:
                self.forget()
                if self.budget < max(lengths):
                    raise EmlocalError(
                        f"an answer of {max(lengths):,} tokens does not fit into memory by itself",
                        "give a smaller --max-tokens, or --gradient-checkpointing",
                    ) from None
                self.budget //= 2
                self.warn(f"out of memory: going on with micro-batches of {self.budget:,} tokens")

    def run_parts(
        self, step: int, parts: Sequence[list[int]], work: Callable[[list[int]], _Result]
    ) -> list[tuple[list[int], _Result]]:
        """The same with given parts, which the processes share among them.

        Raises CancelledError, and OutOfMemoryError: in all processes, whichever of them it came to.
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
    """Indices in batches whose padded size, number × longest, is within `budget` tokens.

    A single one that is longer has a batch to itself. Each index occurs once; the longest come first, so
    that what does not fit into memory shows at once.
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
    """The weight of each rollout's tokens in the step's loss.

    token: 1 / all tokens, so that each counts alike, however they are cut into micro-batches. sequence:
    1 / rollouts, the paper's eq. 2: a sum over the tokens, a mean over the answers.
    """
    if normalize == "sequence":
        return [1 / len(rollouts)] * len(rollouts)
    return [1 / sum(len(r.answer) for r in rollouts)] * len(rollouts)


WINDOW = 3
"""Steps whose mean decides whether to stop: a single step's few answers vary."""


@dataclass
class Guards:
    """Looks at each step's answers; `history` is all that it remembers."""

    settings: TrainingSettings
    history: list[dict[str, float]] = field(default_factory=list)

    def look(self, stats: RolloutStats) -> str | None:
        """Why the run has to stop, in words, by a step's answers; None while it is well."""
        self.history.append(
            {"entropy": stats.entropy, "repetition": stats.repetition, "length": stats.length}
        )
        return self._beyond(_mean(self.history[-WINDOW:]))

    def look_at_kl(self, kl: float) -> str | None:
        """The same by the mean KL to the base of the answers looked at last, nats a token."""
        self.history[-1]["kl"] = kl
        return self._beyond(_mean(self.history[-WINDOW:]))

    @property
    def sound(self) -> bool:
        """Whether the answers looked at last are within the limits by themselves.

        The mean of a window lags behind a collapse: the adapter to keep is one from before it.
        """
        return self._beyond(self.history[-1]) is None

    def _beyond(self, now: Mapping[str, float]) -> str | None:
        """Which limit is passed, in words."""
        first, limits = self.history[0], self.settings
        if now["entropy"] < limits.entropy_floor:
            return (
                f"the answers' entropy is {now['entropy']:.3f} nats a token,"
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
        if 0 < limits.max_kl < now.get("kl", 0.0):
            return f"the KL to the base is {now['kl']:.2f} nats a token, above --max-kl {limits.max_kl:g}"
        return None


def _mean(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of the numbers that every step has: the last one's KL may not be known yet."""
    names = set.intersection(*(set(step) for step in steps))
    return {name: sum(step[name] for step in steps) / len(steps) for name in names}
