"""Many requests, of which many are given up: nothing stays, and every answer is the one given alone."""

import gc
import json
import os
import random
import resource
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from tests.serve.servers import HELLO, Running, endless, running

pytestmark = pytest.mark.attack
REQUESTS = int(os.environ.get("EMLOCAL_LOAD_REQUESTS", "2000"))
CLIENTS = 64
CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def open_files() -> int:
    """How many descriptors this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def post(server: Running, body: bytes, *, leaves_after: float | None = None, closes: bool = True) -> bytes:
    """One request on a connection of its own; `leaves_after`: seconds until the client is gone."""
    head = CHAT + f"Content-Length: {len(body)}\r\n".encode() + (b"Connection: close\r\n" if closes else b"")
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as wire:
        wire.sendall(head + b"\r\n" + body)
        if leaves_after is not None:
            time.sleep(leaves_after)
            return b""
        found = b""
        while part := wire.recv(65536):
            found += part
        return found


def test_nothing_stays_behind() -> None:
    request = {"messages": HELLO, "seed": 5, "max_tokens": 12}
    good = json.dumps(request).encode()
    streamed = json.dumps({**request, "stream": True}).encode()
    long = json.dumps({"messages": [{"role": "user", "content": "x" * 3_000}], "max_tokens": 900}).encode()
    large = json.dumps({"messages": [{"role": "user", "content": "x" * 9_000}]}).encode()
    with running(endless, parallel=8, queue=200, context=4096) as server:
        alone = server.chat(**request)["choices"][0]["message"]["content"]
        answered: list[bool] = []

        def one(number: int) -> None:
            chance = random.Random(number)
            kind = chance.random()
            if kind < 0.3:
                post(server, long, leaves_after=chance.random() * 0.02)
            elif kind < 0.35:
                assert b" 400 " in post(server, b'{"messages": ').split(b"\r\n")[0]
            elif kind < 0.4:
                assert b"context_length_exceeded" in post(server, large)
            elif kind < 0.7:
                found = post(server, streamed)
                events = [line[6:] for line in found.split(b"\n") if line.startswith(b'data: {"')]
                deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
                answered.append("".join(delta.get("content", "") for delta in deltas) == alone)
            else:
                body = json.loads(post(server, good).partition(b"\r\n\r\n")[2])
                answered.append(body["choices"][0]["message"]["content"] == alone)

        def block(start: int, end: int) -> tuple[int, int, int, int]:
            """Asks these, and returns what the process has then: objects, bytes, threads, open files."""
            list(pool.map(one, range(start, end)))
            server.wait(server.idle, 30)
            gc.collect()
            return len(gc.get_objects()), resident(), threading.active_count(), open_files()

        with ThreadPoolExecutor(CLIENTS) as pool:
            ends = [*range(REQUESTS // 5, REQUESTS, 1_000), REQUESTS]
            objects, size, threads, files = block(0, ends[0])
            for start, end in pairwise(ends):
                later = block(start, end)
            server.wait(lambda: open_files() <= files + 2, 30)
        grown = later[1] - size
        assert all(answered)
        assert len(answered) > REQUESTS / 2
        assert later[0] < objects + 2_000
        assert grown < 24 << 20, f"{grown / 2**20:.1f} MiB more"
        assert later[2] <= threads + 1
        print(f"{REQUESTS:,} requests, {len(answered):,} answered,", end=" ")
        print(f"{later[0] - objects:+,} objects, {grown / 2**20:+.1f} MiB")
