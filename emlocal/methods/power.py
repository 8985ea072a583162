"""Power-SMC: draws answers from the distribution p(answer)^α with particles (arXiv 2602.10273).

A low temperature gives another distribution: it sharpens each token without regard to later ones. Here N
answers are written in parallel, and each token is drawn from p^α of its row. The product of the rows' Σ p^α
is an answer's weight. Answers with little weight are replaced by copies of others. α is constant, without the
paper's ramp from 1. There is no truncation, because it would change the distribution.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, ClassVar, Literal

from emlocal.em.steps.power import Power as Raised
from emlocal.errors import CancelledError, ContextFullError, UsageError
from emlocal.methods.method import Answering, Method, Outcome
from emlocal.settings import SamplingParams, check_settings, records_of, setting
from emlocal.text import counted

if TYPE_CHECKING:
    from emlocal.generation import Completion, FinishReason, Handle, Job
    from emlocal.methods.asking import Question
    from emlocal.sampling import Draw

KAPPA = 0.5
"""Particles are resampled if the effective number of them falls below this share."""
_PARTICLES = 8  # default number of particles
_CHOICES = 1 << 20  # the round whose draws decide resampling and the final choice
_LEAST = 1e-45  # smallest positive float32: a drawn token had some probability


def log_weight(draws: "Sequence[Draw]", alpha: float) -> float:
    """Returns Σ over tokens of α·log p − log q with q = p^α / Σ p^α, that is of log Σ p^α over each row."""
    return math.fsum(
        alpha * math.log(max(draw.p_before, _LEAST)) - math.log(max(draw.p_after, _LEAST)) for draw in draws
    )


def normalized(log_weights: Sequence[float]) -> list[float]:
    """Returns the exponentials of the log weights, divided by their sum."""
    top = max(log_weights)
    weights = [math.exp(each - top) for each in log_weights]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def systematic(weights: Sequence[float], u: float) -> list[int]:
    """Draws N indices in ascending order: index i occurs ⌊N·w_i⌋ or ⌈N·w_i⌉ times.

    Its mean number over u in [0, 1) is N·w_i.

    Args:
        weights: N numbers that sum to 1.
    """
    n, chosen = len(weights), list[int]()
    for i, reached in enumerate(accumulate(weights)):
        while len(chosen) < n and (len(chosen) + u) / n < reached:
            chosen.append(i)
    return chosen + [_last(weights)] * (n - len(chosen))


@dataclass(frozen=True)
class _Particle:
    """An answer in progress."""

    parts: "Sequence[Completion]" = ()
    tokens: tuple[int, ...] = ()
    log_weight: float = 0.0

    @property
    def goes_on(self) -> bool:
        return not self.parts or self.parts[-1].finish_reason == "pause"

    @property
    def where(self) -> tuple[bool, tuple[int, ...]]:
        """Equal for copies that continue from the same place."""
        return self.goes_on, self.tokens

    def then(self, part: "Completion", alpha: float) -> "_Particle":
        more = self.log_weight + log_weight(part.draws, alpha)
        return _Particle([*self.parts, part], (*self.tokens, *part.tokens), more)

    def answer(self, sample: int, broken: "FinishReason | None") -> "Completion":
        """Returns the whole answer; `broken` is its finish reason if it was interrupted."""
        from emlocal.generation import joined

        answer = joined(self.parts, sample)
        if broken is not None and self.goes_on:
            answer.finish_reason = broken
        return answer


@dataclass(frozen=True)
class Power(Method):
    """`power:N` uses N particles."""

    name: ClassVar[str] = "power"
    collects: ClassVar[bool] = True
    value: ClassVar[str] = "samples"
    sampling: ClassVar[Mapping[str, float]] = {
        "temperature": 1.0,
        "dynatemp_range": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repeat_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    fixed: ClassVar[frozenset[str]] = frozenset({"temperature", "dynatemp_range", "top_k", "top_p", "min_p"})

    alpha: float = setting(
        2.0,
        "--power-alpha",
        1,
        100,
        "Set the exponent α of --method power: it samples from p^α.",
        name="power_alpha",
    )
    block: int = setting(
        32,
        "--power-block",
        1,
        4096,
        "Resample the particles of --method power after this many tokens.",
        unit="tokens",
        name="power_block",
    )

    def __post_init__(self) -> None:
        check_settings(self)

    def samples(self, asked: int | None) -> int:
        return asked or _PARTICLES

    def answer(self, question: "Question") -> Answering:
        self.check(question.plan.params)
        n = question.plan.samples
        choices = question.uniforms(_CHOICES, 0)
        particles = [_Particle()] * n
        handles: list[Handle] = []
        rounds = resampled = 0
        broken: Literal["context", "cancelled"] | None = None
        while broken is None and any(particle.goes_on for particle in particles):
            try:
                done = yield self._jobs(question, particles, rounds)
            except (ContextFullError, CancelledError) as error:  # the context is full, or the user cancelled
                if not handles:
                    raise
                broken = "cancelled" if isinstance(error, CancelledError) else "context"
                break
            handles += done
            rounds += 1
            for part in (part for handle in done for part in handle.completions):
                particles[part.sample] = particles[part.sample].then(part, self.alpha)
                broken = "cancelled" if part.finish_reason == "cancelled" else broken
            weights = normalized([particle.log_weight for particle in particles])
            some_go_on = broken is None and any(particle.goes_on for particle in particles)
            if some_go_on and _effective(weights) < KAPPA * n:
                particles = [
                    replace(particles[i], log_weight=0.0) for i in systematic(weights, choices[rounds])
                ]
                resampled += 1
        weights = normalized([particle.log_weight for particle in particles])
        fields = {"resampled": resampled, "effective_particles": round(_effective(weights), 2)}
        answers = [particle.answer(i, broken) for i, particle in enumerate(particles)]
        return Outcome(handles, answers, _drawn(weights, choices[0]), fields)

    def _jobs(self, question: "Question", particles: Sequence[_Particle], round: int) -> "list[Job]":
        """Returns jobs for the next block of all unfinished particles; adjacent copies share one job."""
        params = replace(question.plan.params, em=Raised(self.alpha))
        jobs = []
        for (goes_on, tokens), alike in groupby(range(len(particles)), lambda i: particles[i].where):
            first, *others = alike
            if goes_on:
                job = question.job(
                    round,
                    samples=range(first, first + 1 + len(others)),
                    params=params,
                    after=tokens,
                    pause=lambda text, tokens: tokens >= self.block,
                )
                jobs.append(job)
        return jobs

    def describe(self, samples: int) -> list[str]:
        return [f"one of {counted(samples, 'particle')} by p^{self.alpha:g}"]

    def check(self, params: SamplingParams) -> None:
        if params.em is not None:
            raise UsageError(
                "--method power and the EM flags contradict each other: power sharpens by itself",
                "leave one of them out",
            )
        for name in sorted(self.fixed):
            if vars(params)[name] != self.sampling[name]:
                flag = records_of(SamplingParams)[name].flag
                raise UsageError(
                    f"--method power and {flag} contradict each other: power samples from p^α",
                    "leave one of them out",
                )


def _effective(weights: Sequence[float]) -> float:
    """Returns the effective number of particles, from 1 to N; `weights` sum to 1."""
    return 1 / math.fsum(weight * weight for weight in weights)


def _drawn(weights: Sequence[float], u: float) -> int:
    """Draws an index with probability by weight; the weights sum to 1, u is in [0, 1)."""
    reached = accumulate(weights)
    return next((i for i, sum_ in enumerate(reached) if u < sum_), _last(weights))


def _last(weights: Sequence[float]) -> int:
    """Returns the last index with a positive weight. It is the right one if rounding kept the sum below u."""
    return max(i for i, weight in enumerate(weights) if weight > 0)
