"""A server on the engine without a model, in this process, and requests to it."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2 as httpx
import numpy as np
from numpy.typing import NDArray

from emlocal.backends.base import Feed
from emlocal.backends.fake import CHAT_TEMPLATE, END, VOCABULARY, FakeBackend, hashed
from emlocal.batch.run import BatchSettings
from emlocal.generation import Scheduler
from emlocal.generation.scheduler import SPARE_SEQUENCES
from emlocal.methods import HOW, chosen_by
from emlocal.serve.protocol import House
from emlocal.serve.server import Server, Terms, bind
from emlocal.settings import Given, resolve_settings
from emlocal.settings.resolve import GENERATION
from emlocal.settings.table import NAMES, NOTHING

KEY = b"0123456789abcdef0123"
HELLO = [{"role": "user", "content": "Hello"}]


class SlowBackend(FakeBackend):
    """Takes its time for each step, and counts sequences that are in use."""

    seconds = 0.0

    def forward(self, feeds: Sequence[Feed], cancelled: Callable[[], bool] = lambda: False) -> None:
        time.sleep(self.seconds)
        super().forward(feeds, cancelled)


def endless(tokens: Sequence[int]) -> NDArray[np.float32]:
    """Letters that depend on every token so far, and no end."""
    row = np.full(VOCABULARY, -30.0, dtype=np.float32)
    row[97:123] = hashed(tokens)[97:123]
    row[END] = -np.inf
    return row


@dataclass
class Running:
    """A server that runs in threads of this process."""

    server: Server
    backend: SlowBackend
    port: int
    engine: threading.Thread
    warnings: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **more: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **more)

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body, **more)

    def chat(self, **fields: Any) -> dict[str, Any]:
        response = self.post("/v1/chat/completions", {"messages": HELLO, **fields})
        assert response.status_code == 200, response.text
        value: dict[str, Any] = response.json()
        return value

    def text(self, **fields: Any) -> str:
        content: str = self.chat(**fields)["choices"][0]["message"]["content"]
        return content

    def stream(self, path: str = "/v1/chat/completions", **fields: Any) -> list[Any]:
        """The events' values; "[DONE]" as it is."""
        body = {"messages": HELLO, **fields} if "chat" in path else fields
        response = self.post(path, {**body, "stream": True})
        assert response.status_code == 200, response.text
        lines = [line for line in response.text.split("\n") if line.startswith("data: ")]
        return [v if (v := line[6:]) == "[DONE]" else json.loads(v) for line in lines]

    def raw(self, data: bytes, *, seconds: float = 10, then: bytes = b"", after: float = 0.0) -> bytes:
        """What comes back for these bytes until the server closes, or nothing more comes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as wire:
            wire.sendall(data)
            if then:
                time.sleep(after)
                wire.sendall(then)
            found = b""
            try:
                while part := wire.recv(65536):
                    found += part
                    if b"\r\n\r\n" in found and b"content-length" in found.lower():
                        head, _, rest = found.partition(b"\r\n\r\n")
                        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                        if len(rest) >= length:
                            break
            except TimeoutError:
                found += b"<timeout>"
            return found

    def wait(self, what: Callable[[], bool], seconds: float = 10) -> None:
        until = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < until, "it did not happen"
            time.sleep(0.005)

    def idle(self) -> bool:
        """Whether nothing of any request is left."""
        return self.server.desk.open == 0 and self.server.engine.held == 0 and self.server.engine.running == 0


def house(backend: FakeBackend, given: Mapping[str, Any] = NOTHING, how: Given = NOTHING) -> House:
    resolved = resolve_settings(("flag", GENERATION.read(given, NAMES)))
    method = chosen_by(HOW.read(how, NAMES))
    plan = method.plan(resolved.plan, resolved.chosen)
    return House(backend, resolved, BatchSettings(plan, method, resolved.chosen), how, 1, "emlocal-test")


@contextmanager
def running(
    script: Callable[[Sequence[int]], NDArray[np.float32]] = hashed,
    *,
    parallel: int = 4,
    given: Mapping[str, Any] = NOTHING,
    how: Given = NOTHING,
    context: int = 4096,
    seconds: float = 0.0,
    kept: int = 2,
    template: str = CHAT_TEMPLATE,
    send_buffer: int = 0,
    **terms: Any,
) -> Iterator[Running]:
    backend = SlowBackend(script, context=context, sequences=parallel + SPARE_SEQUENCES + kept, shared=False)
    backend.seconds = seconds
    backend.info = replace(backend.info, chat_template=template)
    sockets = bind("127.0.0.1", 0)
    if send_buffer:  # connections inherit it
        sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    ready = threading.Event()
    warnings: list[str] = []
    runner = Scheduler(backend, parallel)
    own = Terms(parallel, **{"grace": 5.0, **terms})
    server = Server(house(backend, given, how), runner, sockets, own, ready=ready.set, warn=warnings.append)
    engine = threading.Thread(target=server.run)
    engine.start()
    assert ready.wait(10)
    found = Running(server, backend, sockets[0].getsockname()[1], engine, warnings)
    try:
        yield found
    finally:
        server.end()
        server.end()
        engine.join(20)
        assert not engine.is_alive()
        assert runner.idle
        assert not backend._held, "sequences are left"
        assert not warnings
