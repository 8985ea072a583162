"""Many requests, of which many are given up: nothing stays, and every answer is the one given alone."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import pairwise

import pytest

from tests.serve.servers import HELLO

REQUESTS = int(os.environ.get("EMLOCAL_LOAD_REQUESTS", "2000"))
CLIENTS = 64
HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    "Content-Type: application/json\r\nConnection: close\r\n"
)
ASKED = {"messages": HELLO, "seed": 5, "max_tokens": 12}
GOOD = json.dumps(ASKED).encode()
STREAMED = json.dumps({**ASKED, "stream": True}).encode()
LONG_ANSWER = json.dumps({"messages": HELLO, "max_tokens": 900, "stream": True}).encode()
LONG_PROMPT = json.dumps({"messages": [{"role": "user", "content": "x" * 3_000}], "max_tokens": 900}).encode()
OVERSIZED = json.dumps({"messages": [{"role": "user", "content": "x" * 9_000}]}).encode()


class Process:
    """A server in a process of its own."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        self._process = process
        self.port = int(process.stdout.readline())
        self.alone = text_of(self.post(GOOD))

    def held(self) -> dict[str, int]:
        """What the server holds, as soon as it has no requests."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        found: dict[str, int] = json.loads(self._process.stdout.readline())
        return found

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def ended(self) -> tuple[int, str]:
        """The exit status, and what was written to stderr."""
        return self._process.wait(30), self._process.communicate()[1]

    def post(self, *parts: bytes, leaves_after: float | None = None, of: int | None = None) -> bytes:
        """What comes back for a body on a connection of its own; its parts come 5 ms after each other.

        `leaves_after`: seconds until the client is gone. `of`: the length that the head tells. Raises
        ConnectionError if the server closes before it has answered anything.
        """
        length = sum(len(part) for part in parts) if of is None else of
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as wire:
            wire.sendall(f"{HEAD}Content-Length: {length}\r\n\r\n".encode() + parts[0])
            for part in parts[1:]:
                time.sleep(0.005)
                wire.sendall(part)
            if leaves_after is not None:
                time.sleep(leaves_after)
                return b""
            found = b""
            try:
                while part := wire.recv(65536):
                    found += part
            except ConnectionError:
                assert not found, found  # nobody is cut off in the middle
                raise
            return found

    def one(self, number: int) -> str:
        """One request of many kinds; what became of it."""
        chance = random.Random(number)
        kind, soon = chance.random(), chance.random() * 0.02
        if kind < 0.3:
            if kind < 0.15:
                self.post(LONG_PROMPT, leaves_after=soon)
            elif kind < 0.25:
                self.post(LONG_ANSWER, leaves_after=soon)
            else:
                self.post(GOOD[:20], leaves_after=soon, of=len(GOOD))
            return "left"
        if kind < 0.35:
            found = self.post(b'{"messages": ')
            assert b" 400 " in found.split(b"\r\n")[0]
            return "refused"
        if kind < 0.4:
            found = self.post(OVERSIZED)
            if b"context_length_exceeded" in found:
                return "refused"
        elif kind < 0.5:
            found = self.post(*(GOOD[i : i + 30] for i in range(0, len(GOOD), 30)))
        else:
            found = self.post(GOOD if kind < 0.75 else STREAMED)
        if b'"code":"closing"' in found.replace(b": ", b":"):
            return "closing"
        assert text_of(found) == self.alone
        return "answered"


def text_of(found: bytes) -> str:
    """The text of an answer that is complete, whole or streamed."""
    head, _, body = found.partition(b"\r\n\r\n")
    assert b" 200 " in head.split(b"\r\n")[0], found
    if b"text/event-stream" not in head:
        text: str = json.loads(body)["choices"][0]["message"]["content"]
        return text
    assert b"data: [DONE]\n\n" in body
    events = [json.loads(line[6:]) for line in body.split(b"\n") if line.startswith(b'data: {"')]
    assert events[-1]["choices"][0]["finish_reason"] == "length", events[-1]
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events)


@contextmanager
def serving(seconds: float = 0.0) -> Iterator[Process]:
    """A server of which each step takes this long."""
    command = [sys.executable, "-m", "tests.serve.load_server", str(seconds)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield Process(process)
        finally:
            process.kill()


@pytest.mark.attack
def test_nothing_stays_behind() -> None:
    ends = [*range(REQUESTS // 5, REQUESTS, 1_000), REQUESTS]
    became: Counter[str] = Counter()
    curve = []
    with serving() as server, ThreadPoolExecutor(CLIENTS) as pool:
        for start, end in pairwise([0, *ends]):
            became.update(pool.map(server.one, range(start, end)))
            curve.append((end, server.held()))
            print(f"{end:,} requests: {curve[-1][1]}")
        server.terminate()
        assert server.ended() == (0, "")
    (_, first), (_, last) = curve[0], curve[-1]
    grown = {name: last[name] - first[name] for name in first}
    print(f"{dict(became)}: {grown['objects']:+,} objects, {grown['bytes'] / 2**20:+.1f} MiB")
    assert not became["closing"]
    assert became["answered"] > REQUESTS / 2
    assert last["cancelled"] > REQUESTS / 10
    assert grown["objects"] < 2_000
    assert grown["bytes"] < 24 << 20
    for name, most in {"tasks": 0, "files": 1, "threads": 0}.items():
        assert grown[name] <= most, curve
    assert last["connections"] <= 1, curve
    assert last["sequences"] <= 12


@pytest.mark.parametrize("at", [40, 150])
def test_sigterm_in_the_middle_cuts_nobody_off_without_a_word(at: int) -> None:
    """Each request is answered as it was alone, or told that the server closes, or not let in at all."""
    became: Counter[str] = Counter()
    lock = threading.Lock()
    with serving(0.002) as server:
        middle = threading.Event()

        def one(number: int) -> None:
            outcome = "not let in"
            with suppress(ConnectionError):
                outcome = server.one(number)
            with lock:
                became[outcome] += 1
                if became.total() == at:
                    middle.set()

        with ThreadPoolExecutor(CLIENTS) as pool:
            all_of_them = [pool.submit(one, number) for number in range(400)]
            assert middle.wait(60)
            server.terminate()
            for each in all_of_them:
                each.result()
        assert server.ended() == (0, "")
    assert became["answered"]
    assert became["closing"] + became["not let in"], became
