"""Clients that leave, queues that are full, engines that fail, and the server's end."""

import asyncio
import gc
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest

from emlocal.backends.base import Feed
from emlocal.errors import BackendError, EmlocalError, UsageError
from emlocal.serve.server import bind, is_loopback, read_keys
from tests.serve.servers import HELLO, Running, SlowBackend, endless, running

LONG = {"messages": HELLO, "max_tokens": 3_000}
CLOSE = {"Connection": "close"}


def leave(server: Running, body: dict[str, object], when: Callable[[], bool]) -> None:
    """Ask, and go when something is so."""

    def ask() -> None:
        with server.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as found:
            for _ in found.iter_raw():
                if when():
                    return

    if body.get("stream"):
        ask()
        return
    import socket

    raw = json.dumps(body).encode()
    head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as wire:
        wire.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}".encode() + raw)
        server.wait(when)


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 3}, {"method": "vote", "samples": 3}])
def test_a_client_that_leaves_ends_its_request_at_once(fields: dict[str, object]) -> None:
    with running(endless, seconds=0.01) as server:
        engine = server.server.engine
        leave(server, {**LONG, **fields}, lambda: server.server.metrics.generated_tokens > 5)
        steps = engine.metrics.steps
        server.wait(server.idle, 1)
        assert engine.metrics.steps <= steps + 15  # a tenth of a second, the connection's end included
        assert engine.metrics.cancelled == 1
        after = engine.metrics.steps
        time.sleep(0.1)
        assert engine.metrics.steps == after


def test_a_client_that_leaves_while_its_prompt_is_read() -> None:
    with running(endless, seconds=0.1, context=20_000) as server:
        body = {"messages": [{"role": "user", "content": "x" * 15_000}], "max_tokens": 5}
        leave(server, body, lambda: server.server.metrics.steps >= 2)
        server.wait(server.idle, 1)
        assert server.server.metrics.steps < 10  # of sixty
        assert server.server.metrics.generated_tokens == 0


def test_one_that_leaves_disturbs_nobody() -> None:
    request = {"messages": HELLO, "seed": 3, "max_tokens": 60}
    with running(endless, seconds=0.002, parallel=3) as server:
        alone = server.chat(**request)["choices"]
        with ThreadPoolExecutor(8) as pool:
            stayed = [pool.submit(server.chat, **request) for _ in range(3)]
            for number in range(8):
                stream = bool(number % 2)
                seen = server.server.metrics.generated_tokens + 3 * number
                leave(
                    server,
                    {**LONG, "stream": stream},
                    lambda n=seen: server.server.metrics.generated_tokens > n,
                )
            assert all(each.result()["choices"] == alone for each in stayed)
        server.wait(server.idle)


def test_a_full_queue_is_told() -> None:
    with running(endless, parallel=1, queue=2, seconds=0.01) as server:
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(server.chat, max_tokens=40) for _ in range(3)]
            server.wait(lambda: server.server.desk.open == 3)
            refused = server.post("/v1/chat/completions", LONG)
            assert refused.status_code == 429
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert refused.json()["error"]["code"] == "queue_full"
            assert all(each.result()["choices"] for each in waiting)
        assert server.chat(max_tokens=2)


def test_each_client_gets_its_turn() -> None:
    with running(endless, parallel=1, seconds=0.005) as server:
        order: list[str] = []

        def ask(user: str) -> None:
            server.chat(max_tokens=20, user=user)
            order.append(user)

        with ThreadPoolExecutor(10) as pool:
            many = [pool.submit(ask, "busy") for _ in range(8)]
            modest = pool.submit(ask, "modest")
            server.wait(lambda: server.server.desk.open + len(order) == 9)
            before = len(order)
            modest.result()
            assert before <= 4
            assert order.count("busy") <= before + 2
            for each in many:
                each.result()


class Failing(SlowBackend):
    fails = False

    def forward(self, feeds: Sequence[Feed], cancelled: Callable[[], bool] = lambda: False) -> None:
        if self.fails:
            self.fails = False
            raise BackendError("the device is gone")
        super().forward(feeds, cancelled)


def test_an_engine_that_fails_fails_its_requests_and_answers_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.serve.servers.SlowBackend", Failing)
    with running(endless) as server:
        assert isinstance(server.backend, Failing)
        server.backend.fails = True
        found = server.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 3})
        assert found.status_code == 500
        assert "the device is gone" in found.json()["error"]["message"]
        assert found.headers["x-should-retry"] == "false"
        assert server.chat(max_tokens=3)


def test_the_end_finishes_what_runs_and_refuses_the_rest() -> None:
    with running(endless, parallel=1, seconds=0.01) as server, ThreadPoolExecutor(4) as pool:
        runs = pool.submit(server.chat, max_tokens=60, seed=1)
        server.wait(lambda: server.server.metrics.generated_tokens > 3)
        waits = pool.submit(server.post, "/v1/chat/completions", LONG)
        server.wait(lambda: server.server.desk.open == 2)
        server.server.end()
        assert waits.result().status_code == 503
        late = server.post("/v1/chat/completions", LONG)
        assert late.status_code == 503
        assert late.json()["error"]["code"] == "closing"
        with server.client() as client:
            assert client.get("/health").status_code == 503
        assert runs.result()["usage"]["completion_tokens"] == 60
        server.engine.join(10)
        assert not server.engine.is_alive()
        with pytest.raises(httpx.ConnectError):
            server.post("/v1/chat/completions", LONG)


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_grace_does_not_suffice_for_is_told(stream: bool) -> None:
    with running(endless, seconds=0.01, grace=0.2) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.post, "/v1/chat/completions", {**LONG, "stream": stream})
        server.wait(lambda: server.server.metrics.generated_tokens > 3)
        server.server.end()
        found = asked.result()
        assert found.status_code == (200 if stream else 503)
        assert "the server is closing" in found.text
        if stream:
            assert found.text.endswith("data: [DONE]\n\n")


def test_a_stream_that_waits_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emlocal.serve.app._COMMENT_SECONDS", 0.05)
    with running(endless, seconds=0.02) as server:
        body = {"messages": HELLO, "max_tokens": 20, "method": "vote", "samples": 2, "stream": True}
        text = server.post("/v1/chat/completions", body).text
        assert text.count(": waiting\n\n") > 2
        assert text.index(": waiting") < text.index('"content":"' + text.split('"content":"')[2][:5])


def test_many_clients_that_come_and_go_leave_nothing() -> None:
    request = {"seed": 5, "max_tokens": 30}
    with running(endless, parallel=4, queue=200) as server:
        alone = server.chat(**request)["choices"]
        sequences = len(server.backend._held)
        threads = threading.active_count()

        def one(number: int) -> None:
            if number % 3 == 0:
                seen = server.server.metrics.generated_tokens + number % 7
                body = {**LONG, "stream": bool(number % 2)}
                leave(server, body, lambda: server.server.metrics.generated_tokens >= seen)
            elif number % 10 == 1:
                assert server.post("/v1/chat/completions", {"messages": 3}).status_code == 400
            elif number % 10 == 2:
                text = "".join(
                    chunk["choices"][0]["delta"].get("content", "") for chunk in server.stream(**request)[:-1]
                )
                assert text == alone[0]["message"]["content"]
            else:
                assert server.chat(**request)["choices"] == alone

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(one, range(200)))
        server.wait(server.idle)
        assert len(server.backend._held) <= max(sequences, 8)
        assert threading.active_count() <= threads + 2


def test_what_is_bound(tmp_path: Path) -> None:
    [one] = bind("127.0.0.1", 0)
    with one:
        assert is_loopback([one])
        with pytest.raises(EmlocalError, match="cannot listen"):
            bind("127.0.0.1", one.getsockname()[1])
    sockets = bind("0.0.0.0", 0)  # noqa: S104
    assert not is_loopback(sockets)
    for each in sockets:
        each.close()
    with pytest.raises(UsageError, match="not an address"):
        bind("no.such.host.invalid", 0)


def test_keys_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# mine\n0123456789abcdef\n\n  fedcba9876543210  \n")
    assert read_keys(path) == [b"0123456789abcdef", b"fedcba9876543210"]
    for wrong in ("", "# nothing\n", "short\n"):
        path.write_text(wrong)
        with pytest.raises(UsageError):
            read_keys(path)
    with pytest.raises(UsageError, match="cannot read"):
        read_keys(tmp_path / "none")
    assert read_keys(None) == []


def test_a_closed_connection_is_forgotten_at_once() -> None:
    """The deadline for reading the end of an answer once kept each of them for half a minute."""
    with running(endless) as server:
        for _ in range(30):
            assert server.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 2}, headers=CLOSE)
        gc.collect()
        remembered = [each for each in gc.get_objects() if isinstance(each, asyncio.Transport)]
        assert len(remembered) <= 1  # the last one may still be closing
