"""Answers of the model as it is at this step: what a step trains on, and how it is judged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from emlocal.backends.base import Backend
from emlocal.generation import Completion, Finished, Job, Request, Scheduler
from emlocal.sampling import SamplingParams, Uniforms
from emlocal.sampling.draw import request_key
from emlocal.training.settings import TrainingSettings

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
