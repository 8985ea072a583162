"""Measures batches of 16 sequences against a bare llama.cpp loop and a single stream.

`--part` chooses parts: full, ragged (prompts of different lengths), shared (one prompt, many samples), same
(equal answers at 1, 4 and 16 at once), memory. Default: all. Ratios compare times within one run.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import MODELS, ROOT, Noise, arguments, report, say, wait_until_quiet

GSM8K = Path(os.environ.get("EMLOCAL_GSM8K", ROOT.parent / "shared/data/gsm8k/test.jsonl"))
AT_ONCE, CONTEXT, PROMPT = 16, 768, 100
PARTS = ("full", "ragged", "shared", "same", "memory")


@contextmanager
def many(model: str) -> Iterator[Any]:
    """Loads the model with room for AT_ONCE sequences and the scheduler's spare ones."""
    from emlocal.backends.base import LoadOptions
    from emlocal.backends.llama_cpp import LlamaCppBackend
    from emlocal.models.resolve import resolve

    options = LoadOptions(context=CONTEXT, sequences=AT_ONCE + 2, shared=False)
    backend = LlamaCppBackend(resolve(str(MODELS[model])), options)
    try:
        yield backend
    finally:
        backend.close()


def questions(n: int) -> list[str]:
    return [json.loads(line)["question"] for line in GSM8K.read_text("utf-8").splitlines()[:n]]


def em_request(key: int, tokens: int) -> Any:
    from emlocal.generation import Request
    from emlocal.sampling import SamplingParams, Uniforms
    from emlocal.settings import EMInf

    return Request(SamplingParams(em=EMInf()), Uniforms(0, key), tokens)


def prompts_of_a_length(backend: Any) -> list[list[int]]:
    text = " ".join(questions(60))
    tokens = backend.encode(text, add_special=True, parse_special=False)
    return [tokens[i * PROMPT : (i + 1) * PROMPT] for i in range(AT_ONCE)]


def bare_steps(backend: Any, prompts: list[list[int]], steps: int) -> float:
    """Returns the seconds for `steps` llama_decode calls over all sequences.

    Tokens are fixed, so nothing is sampled.
    """
    from emlocal.backends.base import Feed
    from emlocal.backends.llama_cpp.native import Batch

    sequences = [backend.open() for _ in prompts]
    backend.forward([Feed(s, p, wanted=False) for s, p in zip(sequences, prompts, strict=True)])
    batch = Batch(backend._lib, AT_ONCE)
    seconds = 0.0
    for step in range(steps + 1):
        for sequence in sequences:
            batch.add(sequence, [1000 + step], PROMPT + step, wanted=True)
        started = time.perf_counter()
        assert backend._lib.llama_decode(backend._context, batch.struct) == 0
        backend._lib.llama_get_logits(backend._context)
        seconds += time.perf_counter() - started if step else 0
        batch.clear()
    for sequence in sequences:
        backend.release(sequence)
    return seconds


def emlocal_steps(backend: Any, prompts: list[list[int]], steps: int) -> float:
    """Returns the seconds for as many steps of the scheduler with EM, counted from the end of the first."""
    from emlocal.generation import Job, Scheduler

    jobs = deque(Job(prompt, [em_request(i, steps + 16)]) for i, prompt in enumerate(prompts))
    scheduler: Any = Scheduler(backend, AT_ONCE)
    stamps = []
    forward = scheduler._forward

    def timed(feeds: Any, cancelled: Any) -> None:
        if all(feed.wanted for feed in feeds) and len(feeds) == AT_ONCE:
            stamps.append(time.perf_counter())
        forward(feeds, cancelled)

    scheduler._forward = timed
    for _ in scheduler.run(lambda: jobs.popleft() if jobs else None):
        pass
    return stamps[steps] - stamps[0]


def single_stream(runner: Any, prompt: list[int], steps: int) -> float:
    from emlocal.generation import Job, Token

    stamps = []
    for event in runner.follow([Job(prompt, [em_request(0, steps + 1)], at_once=True)]):
        if isinstance(event, Token):
            stamps.append(time.perf_counter())
    runner.forget()
    return stamps[-1] - stamps[0]


def full(model: str, rounds: int) -> dict[str, Any]:
    """Measures AT_ONCE sequences with all places in use."""
    from emlocal.generation import Scheduler
    from emlocal.measure import endless, ratio

    steps, times = 24, {"bare": [], "em": [], "single": []}  # type: ignore[var-annotated]
    with many(model) as backend, endless(backend):
        runner, prompts = Scheduler(backend, 1), prompts_of_a_length(backend)
        ways = {
            "bare": lambda: bare_steps(backend, prompts, steps),
            "em": lambda: emlocal_steps(backend, prompts, steps),
            "single": lambda: single_stream(runner, prompts[0], 2 * steps) / 2,
        }
        for number in range(-1, rounds):
            wait_until_quiet(30)
            for name in sorted(ways, reverse=number % 2 == 0):
                seconds = ways[name]()
                if number >= 0:
                    times[name].append(seconds)
            say(f"{model}: round {number + 1} of {rounds}")
    speeds = {
        name: (1 if name == "single" else AT_ONCE) * steps / statistics.median(t) for name, t in times.items()
    }
    pairs = zip(times["bare"], times["em"], times["single"], strict=True)
    ratios = [(bare / em, AT_ONCE * single / em) for bare, em, single in pairs]
    return {
        "rounds": rounds,
        "tokens_per_second": speeds,
        "em / bare": ratio([r for r, _ in ratios]),
        "em / single": ratio([r for _, r in ratios]),
    }


def ragged(model: str, n: int, tokens: int) -> dict[str, Any]:
    """Measures n GSM8K questions, until there are too few left to fill all places."""
    from emlocal.batch.forecast import _reading_speed
    from emlocal.generation import Finished, Job, Scheduler
    from emlocal.generation.prompt import chat_tokens

    with many(model) as backend:
        scheduler: Any = Scheduler(backend, AT_ONCE)
        jobs = deque(
            Job(chat_tokens(backend, [{"role": "user", "content": q}]), [em_request(i, tokens)])
            for i, q in enumerate(questions(n))
        )
        reading = _reading_speed(backend)
        at_end: dict[str, float] = {}
        started = time.perf_counter()

        def source() -> Any:
            if jobs:
                return jobs.popleft()
            if not at_end:
                counters = scheduler.counters
                at_end.update(
                    seconds=time.perf_counter() - started,
                    generated=counters.generated_tokens,
                    read=counters.prompt_tokens,
                    steps=counters.steps,
                )
            return None

        done = [event.handle for event in scheduler.run(source) if isinstance(event, Finished)]
    lengths = [len(handle.result()[0].tokens) for handle in done]
    return at_end | {"lengths": statistics.quantiles(lengths, n=4), "reading_speed": reading, "n": n}


def shared(model: str, samples: int, length: int, tokens: int) -> dict[str, Any]:
    """Measures several samples of one prompt, which is read once, against separate runs."""
    from emlocal.generation import Finished, Job, Scheduler
    from emlocal.measure import endless

    with many(model) as backend, endless(backend):
        prompt = backend.encode(" ".join(questions(40)), add_special=True, parse_special=False)[:length]
        requests = [em_request(i, tokens) for i in range(samples)]
        started = time.perf_counter()
        with Scheduler(backend, samples) as runner:
            *_, done = runner.follow([Job(prompt, requests)])
        together = time.perf_counter() - started
        assert isinstance(done, Finished)
        alone = 0.0
        for request in requests:
            started = time.perf_counter()
            with Scheduler(backend, 1) as runner:
                assert len(list(runner.follow([Job(prompt, [request], at_once=True)]))) > tokens
            alone += time.perf_counter() - started
        return {
            "together": together,
            "separate": alone,
            "prompt_tokens_read": length - 1 - done.handle.timings.cached_tokens,
        }


def same(model: str, n: int, tokens: int) -> dict[str, Any]:
    """Returns the share of n answers that is the same at 4 and 16 at once as alone.

    It is below 1 because kernels add in another order.
    """
    from emlocal.generation import Finished, Job, Scheduler
    from emlocal.generation.prompt import chat_tokens

    said: dict[int, dict[int, list[int]]] = {}
    with many(model) as backend:
        prompts = [chat_tokens(backend, [{"role": "user", "content": q}]) for q in questions(n)]
        for parallel in (1, 4, AT_ONCE):
            jobs = [Job(prompt, [em_request(i, tokens)]) for i, prompt in enumerate(prompts)]
            waiting = iter(jobs)
            with Scheduler(backend, parallel) as runner:
                for event in runner.run(lambda waiting=waiting: next(waiting, None)):  # type: ignore[misc]
                    if isinstance(event, Finished):
                        one = said.setdefault(parallel, {})
                        one[jobs.index(event.handle.job)] = event.handle.result()[0].tokens
    shares = {}
    for parallel in (4, AT_ONCE):
        pairs = [(said[1][i], said[parallel][i]) for i in range(n)]
        alike = [
            next((k for k, (a, b) in enumerate(zip(*p, strict=False)) if a != b), len(p[0])) for p in pairs
        ]
        total = sum(len(a) for a, _ in pairs)
        shares[parallel] = {
            "answers": sum(a == b for a, b in pairs) / n,
            "tokens before they part": sum(alike) / total,
        }
    return shares


_MEMORY = """
import resource, sys
from emlocal.backends.fake import END, FakeBackend
from emlocal.batch.lines import parse_object
from emlocal.settings import Plan
from emlocal.batch.run import Batch, BatchSettings
from emlocal.generation import Scheduler
from emlocal.sampling import SamplingParams
import numpy as np
row = np.zeros(END + 1, dtype=np.float32); row[65] = 20
n = int(sys.argv[1])
backend = FakeBackend(lambda tokens: row, sequences=18, context=256, shared=False)
lines = (parse_object(i, {"custom_id": f"line-{i}", "prompt": f"question {i}"}) for i in range(1, n + 1))
plan = Plan(SamplingParams(temperature=0.0), 2, (), 0, 1)
rows = sum(1 for _ in Batch(backend, lines, BatchSettings(plan), runner=Scheduler(backend, 16)).rows())
assert rows == n
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def memory(lines: int) -> float:
    """Returns the peak MiB of a process that runs this many lines on the fake engine."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(lines)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout) / 1024


def main() -> None:
    chosen = arguments(__doc__ or "", parts=PARTS, rounds=8, prompts=200, tokens=256, lines=1_000_000)
    rows: list[tuple[object, ...]] = []
    results: dict[str, Any] = {}
    for model in chosen.model if chosen.part != ["memory"] else ():
        noise = Noise()
        found: dict[str, Any] = {}
        speed = None
        if "full" in chosen.part:
            found["full"] = one = full(model, chosen.rounds)
            speed = one["tokens_per_second"]["em"]
            for name in ("em / bare", "em / single"):
                rows.append((model, f"{AT_ONCE} sequences, {name}", chosen.rounds, str(one[name])))
            shown = ", ".join(f"{name} {value:.1f}" for name, value in one["tokens_per_second"].items())
            rows.append((model, "tok/s", chosen.rounds, shown))
        if "ragged" in chosen.part:
            found["ragged"] = one = ragged(model, chosen.prompts, chosen.tokens)
            rate = one["generated"] / (one["seconds"] - one["read"] / one["reading_speed"])
            against = f" = {rate / speed:.3f} of the full batch" if speed else ""
            rows.append(
                (model, "GSM8K, tok/s of the time that is not reading", one["n"], f"{rate:.1f}{against}")
            )
            rows.append((model, "GSM8K, tok/s in all", one["n"], f"{one['generated'] / one['seconds']:.1f}"))
        if "shared" in chosen.part:
            found["shared"] = one = shared(model, 8, 600, 64)
            ratio = one["separate"] / one["together"]
            text = f"{one['together']:.1f} s, {one['separate']:.1f} s separately: {ratio:.2f} ×"
            rows.append((model, "8 samples of a 600-token prompt", 1, text))
        if "same" in chosen.part:
            found["same"] = one = same(model, 32, 128)
            for parallel, shares in one.items():
                text = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
                rows.append((model, f"the same at {parallel} at once as alone", 32, text))
        results[model] = found | {"others_used": noise.share()}
    if "memory" in chosen.part:
        sizes = [s for s in (1_000, 100_000, 1_000_000) if s <= chosen.lines]
        results["memory"] = {size: memory(size) for size in sizes}
        rows.append(
            (
                "fake",
                "peak MB by lines",
                1,
                ", ".join(f"{n:,}: {m:.0f}" for n, m in results["memory"].items()),
            )
        )
    report(results, ("model", "what", "n", "result"), rows, chosen.json)


if __name__ == "__main__":
    main()
