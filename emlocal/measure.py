"""Measurements: interleaved pairs of equal work, their ratios, and the figures of `emlocal bench`.

Machines are shared and clock rates vary, so nothing is compared across runs. Two ways of doing the same work
run side by side in one process, in alternating order. The result is the median, over the pairs, of their
ratios.

Decoding is measured in rounds. Each round decodes the same positions with EM off, with EM on, and with a bare
loop. A round has its own prompt and draws, which its sides share; the sides take turns at going first. End
tokens are ignored, so every side takes the same number of steps at the same positions of one sequence: equal
work for the engine, whatever the tokens are. A step is what happens between two tokens that a caller of
`Runner.follow` receives: the forward pass, the sampler and the handling of text. The intervals of medians
assume no distribution.

The sampler is also measured by itself, on rows of a real model: with EM, without EM, and against plain numpy.
Rows are visited one after the other, so each row comes from outside the processor's inner caches, like a row
that an engine has just written. The three ways take turns, sweep by sweep.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from emlocal.backends import ENGINES
from emlocal.backends.base import Backend, Feed
from emlocal.backends.engine import engine
from emlocal.errors import UsageError
from emlocal.generation import Job, Request, Scheduler, Token
from emlocal.generation.prompt import for_template, prompt_tokens
from emlocal.sampling import Sampler, SamplingParams, Uniforms
from emlocal.text import counted

CONFIDENCE = 0.95
_FEWEST_PAIRS = 6  # of five, even the least and the largest enclose the median with 93.75 % only


@dataclass(frozen=True)
class Ratio:
    """The ratio of two ways of doing the same work, over pairs."""

    median: float
    low: float
    high: float
    n: int
    """Number of pairs."""
    bounds: Literal["95% interval", "range"]
    """The meaning of `low` and `high`.

    They are the ends of the median's 95 % interval or, with too few pairs for one, the least and the largest
    ratio.
    """

    def __str__(self) -> str:
        ends = f"{self.low:.3f} to {self.high:.3f}"
        if self.bounds == "range":
            return f"{self.median:.3f}  ({counted(self.n, 'round')}: {ends})"
        return f"{self.median:.3f}  (95 %: {ends}, {self.n} rounds)"


def speed_ratio(seconds: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Returns the speed of the first relative to the reference; above 1 is faster.

    Pairs have the same index.
    """
    return ratio([r / s for s, r in zip(seconds, reference, strict=True)])


def ratio(pairs: Sequence[float]) -> Ratio:
    """Returns the median of ratios with its interval; with their range if they are too few for one."""
    ordered = sorted(pairs)
    n = len(ordered)
    skip = _ranks_outside(n)
    bounds: Literal["95% interval", "range"] = "range" if n < _FEWEST_PAIRS else "95% interval"
    return Ratio(statistics.median(ordered), ordered[skip], ordered[n - 1 - skip], n, bounds)


def _ranks_outside(n: int) -> int:
    """Returns how many of n sorted values lie outside each end of the median's exact binomial interval."""
    tail, skip = 0.0, 0
    while skip < n // 2:
        tail += math.comb(n, skip) / 2**n  # P(no more than `skip` values lie below the median)
        if tail > (1 - CONFIDENCE) / 2:
            break
        skip += 1
    return max(0, skip - 1)


PROMPTS = (
    "Tell me a long story about a lighthouse.",
    "Explain how a heat pump works, step by step.",
    "Write a Python program that plays chess.",
    "What should I see in Lisbon in three days?",
    "Solve: a train leaves at 9:40 and drives 150 km at 80 km/h. When does it arrive?",
    "Compare the French and the American revolution.",
    "Write a letter to a landlord about a broken heater.",
    "List ideas for a science fair, with what each needs.",
)
SIDES = ("bare", "off", "on")


@dataclass
class Decoding:
    """The seconds that each round's steps took, by side; `bare` is empty if the engine has no such loop."""

    tokens: int
    """Steps of a round."""
    seconds: dict[str, list[float]] = field(default_factory=lambda: {side: [] for side in SIDES})
    touched: int = 0
    """How many tokens, of those drawn with EM on, come from a row that EM changed."""

    def speed(self, side: str) -> float | None:
        """Returns tokens per second: the median of the rounds."""
        measured = self.seconds[side]
        return self.tokens / statistics.median(measured) if measured else None

    def ratio(self, side: str, reference: str) -> Ratio | None:
        """Returns how fast `side` is relative to `reference`; 1 is equal."""
        if not self.seconds[side] or not self.seconds[reference]:
            return None
        return speed_ratio(self.seconds[side], self.seconds[reference])


@contextmanager
def endless(backend: Backend) -> Iterator[None]:
    """Lets no token end an answer within this block."""
    info = backend.info
    backend.info = replace(info, end_tokens=frozenset())
    try:
        yield
    finally:
        backend.info = info


def question_tokens(backend: Backend, text: str) -> list[int]:
    """Returns a prompt's tokens as chat would send it, or the plain text's if the model has no template."""
    asked = for_template(backend.info, [{"role": "user", "content": text}], lambda _: None)
    return prompt_tokens(backend, asked)


def check_room(backend: Backend, tokens: int) -> None:
    """Raises UsageError if the prompts and `tokens` more tokens do not fit the context."""
    longest = max(len(question_tokens(backend, prompt)) for prompt in PROMPTS)
    if longest + tokens + 1 > backend.context:
        raise UsageError(
            f"--tokens {tokens} after a prompt of {longest} exceed the context of {backend.context:,}",
            f"use --tokens {max(1, backend.context - longest - 1)} or a larger --context",
        )


def measure_decoding(
    runner: Scheduler,
    params: SamplingParams,
    *,
    tokens: int,
    rounds: int,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
    expected: Callable[[float], None] = lambda seconds: None,
) -> Decoding:
    """Decodes `rounds` rounds of `tokens` steps on each side, after a short round that does not count.

    `expected` takes the seconds that all rounds will take, from the short one.
    """
    result = Decoding(tokens)
    short = Decoding(4)
    decode_round(short, runner, params, number=rounds, seed=seed)
    step = sum(sum(seconds) for seconds in short.seconds.values()) / short.tokens
    expected(rounds * tokens * step)
    for number in range(rounds):
        progress(number)
        decode_round(result, runner, params, number=number, seed=seed)
    return result


def decode_round(
    result: Decoding, runner: Scheduler, params: SamplingParams, *, number: int, seed: int
) -> None:
    """Adds one round to `result`; its number chooses the prompt, the draws and the side that goes first."""
    turn = number % len(SIDES)
    order = SIDES[turn:] + SIDES[:turn]
    order = order if number // len(SIDES) % 2 == 0 else order[::-1]
    prompt = question_tokens(runner.backend, PROMPTS[number % len(PROMPTS)])
    with endless(runner.backend):
        _round(result, runner, prompt, params, Uniforms(seed, number), order)


def _round(
    result: Decoding,
    runner: Scheduler,
    prompt: list[int],
    params: SamplingParams,
    uniforms: Uniforms,
    order: Sequence[str],
) -> None:
    uniforms[0]  # numpy's first draw from a generator takes milliseconds
    runner.forget()
    first = _steps(runner, prompt, Request(params, uniforms, 1))[1]  # reads the prompt
    for side in order:
        if side == "bare":
            seconds = _bare(runner, prompt, first, result.tokens)
            if seconds is not None:
                result.seconds[side].append(seconds)
            continue
        chosen = params if side == "on" else params.without_em()
        seconds, _, touched = _steps(runner, prompt, Request(chosen, uniforms, result.tokens + 1))
        result.seconds[side].append(seconds)
        result.touched += touched


def _steps(runner: Scheduler, prompt: list[int], request: Request) -> tuple[float, int, int]:
    """Returns the seconds from the first token to the last, the first token, and how many rows EM touched."""
    stamps, touched, first = [], 0, -1
    for event in runner.follow([_job(prompt, request)]):
        if isinstance(event, Token):
            stamps.append(time.perf_counter())
            touched += event.draw.steps > 0
            first = event.draw.token if first < 0 else first
    return stamps[-1] - stamps[0], first, touched


def _job(prompt: list[int], request: Request) -> Job:
    """Returns a job that takes over the sequence of the last one, so that all decode at the same position."""
    return Job(prompt, [request], at_once=True, session="benchmark")


def _bare(runner: Scheduler, prompt: list[int], first: int, steps: int) -> float | None:
    name = runner.backend.name
    decode = engine(name).bare_loop if name in ENGINES else None
    if decode is None:
        return None
    # as for the other sides: the sequence holds the prompt, and its last token has just been read
    events = runner.follow([_job(prompt, Request(SamplingParams(temperature=0), Uniforms(0), 2))])
    handle = next(events).handle
    seconds = sum(decode(runner.backend, runner.sequence(handle), first, steps))
    for _ in events:
        pass
    return seconds


def recorded_rows(
    runner: Scheduler, params: SamplingParams, *, rows: int, seed: int
) -> list[NDArray[np.float32]]:
    """Returns rows of raw logits as they occur in answers without EM, up to 16 from each prompt."""
    found: list[NDArray[np.float32]] = []
    number = 0
    with endless(runner.backend):
        while len(found) < rows:
            prompt = question_tokens(runner.backend, PROMPTS[number % len(PROMPTS)])
            most = min(16, rows - len(found), runner.context - len(prompt))
            request = Request(params.without_em(), Uniforms(seed, number), most + 1)
            for event in itertools.islice(runner.follow([_job(prompt, request)]), most):
                found.append(runner.backend.logits(runner.sequence(event.handle)))
            number += 1
    return found


def prompt_speed(backend: Backend, tokens: int, repeats: int = 3) -> float:
    """Returns the tokens per second at which a prompt of `tokens` tokens is read into an empty sequence.

    It is the median of `repeats` tries.
    """
    text = " ".join(PROMPTS)
    prompt = backend.encode(text, add_special=True, parse_special=False)
    prompt = (prompt * (tokens // len(prompt) + 1))[:tokens]
    seconds = []
    for _ in range(repeats):
        sequence = backend.open()
        started = time.perf_counter()
        backend.forward([Feed(sequence, prompt)])
        seconds.append(time.perf_counter() - started)
        backend.release(sequence)
    return tokens / statistics.median(seconds)


Rows = Sequence[NDArray[np.float32]]
_FULL = "full vocabulary"


PASS_SIZES = (1, 2, 4, 8, 16)


def pass_costs(backend: Backend, repeats: int = 5) -> dict[int, float]:
    """Returns the seconds of a pass of 1, 2, 4, 8, 16 rows of one sequence, relative to one row.

    They are medians over `repeats` rounds, in which the sizes take turns. Empty if the engine gives only
    one row of a sequence (`Backend.rewinds`).
    """
    if not backend.rewinds:
        return {}
    found: dict[int, list[float]] = {size: [] for size in PASS_SIZES}
    prompt = (question_tokens(backend, PROMPTS[0]) * 16)[: min(128, backend.context - PASS_SIZES[-1])]
    sequence = backend.open()
    backend.forward([Feed(sequence, prompt, wanted=False)])
    for turn in range(repeats + 1):  # the first one warms up
        for size in PASS_SIZES:
            started = time.perf_counter()
            backend.forward([Feed(sequence, prompt[:size], wanted=size)])
            found[size].append(time.perf_counter() - started)
            backend.trim(sequence, len(prompt))
        if turn == 0:
            found = {size: [] for size in PASS_SIZES}
    backend.release(sequence)
    ones = found[1]
    return {
        size: statistics.median(a / b for a, b in zip(times, ones, strict=True))
        for size, times in found.items()
    }


def speculation_gain(costs: dict[int, float], chance: float) -> float:
    """Returns the most tokens a second, relative to one row a pass, if each guess is right with `chance`.

    `costs`: of `pass_costs`. 1.0 if no guess pays.
    """
    return max(sum(chance**i for i in range(size)) / cost for size, cost in costs.items())


@dataclass(frozen=True)
class Path:
    """Rows that the sampler treated alike with EM on."""

    name: str
    rows: int
    microseconds: float
    """Mean over the rows."""


@dataclass(frozen=True)
class SamplerTimes:
    """Mean microseconds per row for EM step, truncation and draw.

    Each row counts with its median over the sweeps.
    """

    off: float
    on: float
    plain: float
    """Full-row softmax, cumulative sum and search in numpy: no EM, no truncation, no statistics."""
    plain_over_on: Ratio
    """Speed of the sampler with EM relative to plain numpy, over the sweeps; above 1 is faster."""
    paths: tuple[Path, ...]


def plain_sample(row: NDArray[np.float32], temperature: float, u: float) -> int:
    """Draws a token in a few lines of numpy: softmax over the whole row, cumulative sum, search."""
    p = np.exp((row - row.max()) / np.float32(temperature))
    cumulative = np.cumsum(p)
    return int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))


def measure_sampler(rows: Rows, params: SamplingParams, *, sweeps: int = 5, seed: int = 0) -> SamplerTimes:
    """Measures the sampler's time on `rows`, each float32 [V]."""
    sampler = Sampler(len(rows[0]))
    without, heat = params.without_em(), params.temperature or 1.0
    uniforms = Uniforms(seed)
    draws = [uniforms[i] for i in range(len(rows))]
    ways: dict[str, Callable[[NDArray[np.float32], float], object]] = {
        "off": lambda row, u: sampler.sample(row, without, u),
        "on": lambda row, u: sampler.sample(row, params, u),
        "plain": lambda row, u: plain_sample(row, heat, u),
    }
    times: dict[str, list[list[float]]] = {name: [] for name in ways}
    names = list(ways)
    for sweep in range(-1, sweeps):  # the first sweep warms up
        for name in names[sweep % 3 :] + names[: sweep % 3]:
            seconds = _sweep(rows, draws, ways[name])
            if sweep >= 0:
                times[name].append(seconds)
    each = {
        name: [statistics.median(s) * 1e6 for s in zip(*found, strict=True)] for name, found in times.items()
    }
    totals = {name: [sum(seconds) for seconds in found] for name, found in times.items()}
    return SamplerTimes(
        statistics.fmean(each["off"]),
        statistics.fmean(each["on"]),
        statistics.fmean(each["plain"]),
        speed_ratio(totals["on"], totals["plain"]),
        _paths(rows, draws, params, each["on"]),
    )


def _sweep(
    rows: Rows, draws: Sequence[float], way: Callable[[NDArray[np.float32], float], object]
) -> list[float]:
    seconds = []
    for row, u in zip(rows, draws, strict=True):
        started = time.perf_counter()
        way(row, u)
        seconds.append(time.perf_counter() - started)
    return seconds


def _paths(
    rows: Rows, draws: Sequence[float], params: SamplingParams, times: Sequence[float]
) -> tuple[Path, ...]:
    """Groups the rows by what the sampler did with them."""
    found: dict[str, list[float]] = {}
    for row, u, microseconds in zip(rows, draws, times, strict=True):
        sampler = Sampler(len(row))
        draw = sampler.sample(row, params, u)
        (cutoff,) = sampler.paths
        name = f"head above {cutoff:g}" if cutoff else _FULL
        found.setdefault(name if draw.steps or not cutoff else "skipped by EM", []).append(microseconds)
    return tuple(Path(name, len(t), statistics.fmean(t)) for name, t in sorted(found.items()))
