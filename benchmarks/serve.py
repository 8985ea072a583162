"""Measures `emlocal serve` beside `emlocal batch` and llama.cpp's own server, with streaming clients.

All run the same GGUF, prompts and lengths, on the same threads, one after the other; each round turns their
order. Clients start together; each asks once. Tokens a second are all answers' tokens over the time of the
round. The tables give medians, and of the ratios within a round the median and the range.

llama.cpp's server comes in xllamacpp's wheel, in an environment of its own: --peer /path/to/venv/bin/python.
It gets emlocal's short OpenMP spins (GOMP_SPINCOUNT=1000): with the default it loses to any other program.

    python benchmarks/serve.py --model qwen2.5-coder-0.5b --clients 16 4 1 --peer ~/peers/bin/python
"""

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from common import MODELS, report, say, wait_until_quiet

PEER = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.port, params.n_parallel, params.n_ctx = int(sys.argv[2]), int(sys.argv[3]), 512 * int(sys.argv[3])
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[4])
params.verbosity = 0
server = xllamacpp.Server(params)
while True:
    time.sleep(1)
"""
SUBJECTS = ("a lighthouse", "a lost letter", "two brothers", "a winter market", "an old map", "a slow train")


@dataclass
class Round:
    """One way of answering in one round."""

    rate: float
    """Tokens a second."""
    first: Sequence[float]
    """Seconds to the first text, of each client; empty where there are none."""


def prompt(number: int) -> str:
    return f"Write a long story, number {number}, about {SUBJECTS[number % len(SUBJECTS)]}. Go into detail."


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def serving(command: Sequence[str], port: int) -> Iterator[int]:
    """Runs a server until the block ends; waits until it answers."""
    environment = os.environ | {"GOMP_SPINCOUNT": "1000"}
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet) as server:
        try:
            until = time.monotonic() + 120
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    if time.monotonic() > until or server.poll() is not None:
                        sys.exit(f"{command[0]} does not serve")
                    time.sleep(0.1)
            time.sleep(2)  # llama.cpp's server listens before the model is loaded
            yield port
        finally:
            server.terminate()


async def ask(port: int, body: dict[str, object]) -> tuple[int, float]:
    """Streams one answer: its tokens, and the seconds until its first text."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    started, first, tokens = time.perf_counter(), 0.0, 0
    writer.write(f"POST /v1/chat/completions HTTP/1.1\r\n{head}Connection: close\r\n\r\n".encode() + data)
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
        if not first and any(choice["delta"].get("content") for choice in event["choices"]):
            first = time.perf_counter() - started
    writer.close()
    if not tokens:
        sys.exit("an answer came without its usage")
    return tokens, first


def stream(port: int, bodies: Sequence[dict[str, object]]) -> Round:
    """Has all bodies asked at once."""

    async def all_of_them() -> list[tuple[int, float]]:
        return await asyncio.gather(*(ask(port, body) for body in bodies))

    started = time.perf_counter()
    found = asyncio.run(all_of_them())
    return Round(sum(tokens for tokens, _ in found) / (time.perf_counter() - started), [s for _, s in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-coder-0.5b")
    parser.add_argument("--clients", type=int, nargs="+", default=[16, 4, 1])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peer", help="a Python that has xllamacpp")
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    chosen = parser.parse_args()

    import emlocal

    model, most, threads = str(MODELS[chosen.model]), max(chosen.clients), str(chosen.threads)
    results: dict[int, dict[str, list[Round]]] = {}
    with ExitStack() as stack:
        ports = {}
        own = ["-m", emlocal.__name__, "serve", "-m", model, "--parallel", str(most), "--threads", threads]
        port = free_port()
        command = [sys.executable, *own, "--port", str(port), "--context", "512", "--quiet"]
        ports["emlocal serve"] = stack.enter_context(serving(command, port))
        if chosen.peer:
            port = free_port()
            command = [chosen.peer, "-c", PEER, model, str(port), str(most), threads]
            ports["llama.cpp's server"] = stack.enter_context(serving(command, port))
        batch = stack.enter_context(emlocal.load(model, parallel=most, context=512, threads=chosen.threads))

        def once(way: str, clients: int, seed: int, most: int = chosen.tokens) -> Round:
            texts = [prompt(100 * seed + i) for i in range(clients)]
            settings: dict[str, object] = {"temperature": 0.8, "max_tokens": most, "seed": seed}
            if way == "emlocal batch":
                started = time.perf_counter()
                answered = batch.batch(texts, temperature=0.8, max_tokens=most, seed=seed)
                tokens = sum(row["completion_tokens"] for row in answered)
                return Round(tokens / (time.perf_counter() - started), [])
            if way == "emlocal serve, EM on":
                settings["em_inf"] = True
            bodies = [
                {"messages": [{"role": "user", "content": text}], "stream": True, **settings}
                | {"stream_options": {"include_usage": True}}
                for text in texts
            ]
            return stream(ports[way.removesuffix(", EM on")], bodies)

        ways = ["emlocal serve", "emlocal serve, EM on", "emlocal batch", *list(ports)[1:]]
        for clients in chosen.clients:
            found: dict[str, list[Round]] = {way: [] for way in ways}
            for way in ways:
                once(way, clients, 99, 16)  # warms up
            for number in range(chosen.rounds):
                wait_until_quiet(30)
                order = random.Random(number).sample(ways, len(ways))
                for way in order:
                    found[way].append(once(way, clients, number))
                say(f"{clients} at once: round {number + 1} of {chosen.rounds}")
            results[clients] = found

    rows = []
    for clients, found in results.items():
        base = found["emlocal serve"]
        for way, rounds in found.items():
            ratios = sorted(a.rate / b.rate for a, b in zip(base, rounds, strict=True))
            waits = sorted(second for each in rounds for second in each.first)
            last = waits[min(len(waits) - 1, int(0.95 * len(waits)))] if waits else 0.0
            rows.append(
                (
                    clients,
                    way,
                    f"{statistics.median(each.rate for each in rounds):.1f}",
                    f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                    f"{statistics.median(waits):.2f}" if waits else "–",
                    f"{last:.2f}" if waits else "–",
                )
            )
    columns = ("at once", "way", "tok/s", "serve / this", "first text, s: median", "95th percentile")
    report({str(clients): found for clients, found in results.items()}, columns, rows, chosen.json)


if __name__ == "__main__":
    main()
