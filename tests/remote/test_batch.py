"""`emlocal batch --connect` against running servers: emlocal's, and one that knows OpenAI's fields only."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emlocal.batch.lines import Item, read_lines
from emlocal.batch.run import Batch, BatchSettings
from emlocal.errors import UsageError
from emlocal.generation import Scheduler
from emlocal.remote.batch import Remote, RemoteBatch, request_of
from emlocal.remote.client import Client, ServerError, error_text, seconds_in
from emlocal.settings import resolve_settings
from tests.serve.servers import KEY, SlowBackend, running

LINES = b"".join(
    json.dumps({"prompt": f"Number {i}", "custom_id": f"q{i}", "keepme": i}).encode() + b"\n"
    for i in range(12)
)


class Plain(BaseHTTPRequestHandler):
    """Says what it was asked; refuses the first requests with the statuses in `refusals`."""

    refusals: list[int]
    bodies: list[dict[str, Any]]

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "plain", "owned_by": "someone"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.refusals:
            self._send(self.refusals.pop(), {"error": {"message": "later"}})
            return
        self.bodies.append(body)
        message = {"role": "assistant", "content": f"said {body['messages'][-1]['content']}"}
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        self._send(200, {"id": "x", "model": "plain", "choices": choices, "usage": usage})

    def _send(self, status: int, value: Any) -> None:
        raw = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(raw)))
        if status == 429:
            self.send_header("retry-after", "1")
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: Any) -> None:
        """Prints nothing."""


def plain(*refusals: int) -> AbstractContextManager[tuple[str, list[dict[str, Any]]]]:
    return serving(Plain, *refusals)


@contextmanager
def serving(kind: type[Plain], *refusals: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    bodies: list[dict[str, Any]] = []
    handler = type("Handler", (kind,), {"refusals": [*refusals], "bodies": bodies})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bodies
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def command(url: str, folder: Path, *more: str, lines: bytes = LINES) -> list[str]:
    (folder / "in.jsonl").write_bytes(lines)
    verb = ["batch", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl"), "--connect", url]
    return [sys.executable, "-m", "emlocal", *verb, *more]


def batch(
    url: str, folder: Path, *more: str, key: str = "", lines: bytes = LINES
) -> tuple[int, str, list[dict[str, Any]]]:
    """Returns exit code, stderr and rows."""
    environment = {**os.environ, "OPENAI_API_KEY": key}
    done = subprocess.run(
        command(url, folder, *more, lines=lines), capture_output=True, text=True, timeout=60, env=environment
    )
    return done.returncode, done.stderr, rows_in(folder)


def rows_in(folder: Path) -> list[dict[str, Any]]:
    out = folder / "out.jsonl"
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def local_texts(**fields: Any) -> dict[str, str]:
    settings = BatchSettings(resolve_settings(("flag", fields)).plan)
    backend = SlowBackend(context=4096, sequences=8, shared=False)
    run = Batch(backend, read_lines(io.BytesIO(LINES)), settings, runner=Scheduler(backend, 4))
    return {row["custom_id"]: row["text"] for row in run.rows()}


def test_equal_to_the_batch_here(tmp_path: Path) -> None:
    with running() as served:
        code, said, rows = batch(
            served.url, tmp_path, "--max-tokens", "9", "--em-inf", "--seed", "5", "--keep"
        )
    assert code == 0, said
    assert {row["custom_id"]: row["text"] for row in rows} == local_texts(max_tokens=9, em_inf=True, seed=5)
    assert all(row["kept"] == {"keepme": int(row["custom_id"][1:])} for row in rows)
    assert all(row["seed"] == 5 and row["entropy"] and 0 < row["completion_tokens"] <= 9 for row in rows)


def test_killed_and_resumed(tmp_path: Path) -> None:
    with running(seconds=0.01) as served:
        more = ("--max-tokens", "30", "--parallel", "2")
        process = subprocess.Popen(command(served.url, tmp_path, *more), stderr=subprocess.DEVNULL)
        served.wait(lambda: len(rows_in(tmp_path)) >= 3, 30)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = rows_in(tmp_path)
        assert len(before) < 12
        served.wait(served.idle)  # the requests of the dead client end
        code, said, rows = batch(served.url, tmp_path, *more)
        assert code == 0, said
    assert rows[: len(before)] == before
    assert {row["custom_id"]: row["text"] for row in rows} == local_texts(max_tokens=30)
    assert len(rows) == 12


def test_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    with running(seconds=0.003, parallel=1, queue=0) as served:
        code, said, rows = batch(served.url, tmp_path, "--max-tokens", "4", "--parallel", "3")
    assert code == 0, said
    assert len(rows) == 12


def test_ctrl_c_ends_the_requests(tmp_path: Path) -> None:
    with running(seconds=0.05) as served:
        process = subprocess.Popen(command(served.url, tmp_path), stderr=subprocess.PIPE, text=True)
        served.wait(lambda: served.server.engine.running > 0, 30)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=15)
        assert process.returncode == 130, said
        served.wait(served.idle)


def test_plain_server(tmp_path: Path) -> None:
    with plain(503, 429) as (url, bodies):
        began = time.monotonic()
        code, said, rows = batch(url, tmp_path, "--temp", "0.5", "--ordered", "--parallel", "1")
        assert code == 0, said
        assert time.monotonic() - began > 1  # Retry-After
    assert [row["text"] for row in rows] == [f"said Number {i}" for i in range(12)]
    assert set(rows[0]) == {
        "custom_id", "text", "finish_reason", "prompt_tokens", "completion_tokens", "model", "key",
    }  # fmt: skip
    assert set(bodies[0]) == {"model", "messages", "temperature", "seed"}


@pytest.mark.parametrize("flag", ["--em-inf", "--method=vote:4", "--top-k=5", "--threads=1"])
def test_refused_settings(tmp_path: Path, flag: str) -> None:
    with plain() as (url, bodies):
        code, said, _ = batch(url, tmp_path, flag)
    assert code == 2
    assert flag.split("=")[0].removeprefix("--").replace("-", "_") in said.replace("-", "_")
    assert not bodies


def test_a_server_that_goes_away_loses_no_line(tmp_path: Path) -> None:
    with plain() as (url, _):
        pass
    code, said, rows = batch(url, tmp_path)
    assert code == 1
    assert "does not answer" in said
    assert not rows


def test_a_server_that_dies_in_the_middle() -> None:
    rows: list[dict[str, Any]] = []
    with plain() as (url, _):
        remote = Remote(Client(url), "plain", "openai", {}, tries=2)
        run = RemoteBatch(remote, read_lines(io.BytesIO(LINES)), fingerprint="", parallel=1).rows()
        rows += [next(run) for _ in range(4)]
    with pytest.raises(ServerError, match="does not answer"):
        rows += run
    assert 4 <= len(rows) <= 6
    assert not any(row.get("error") for row in rows)


def test_the_key(tmp_path: Path) -> None:
    with running(keys=(KEY,)) as served:
        code, said, rows = batch(served.url, tmp_path, "--max-tokens", "2")
        assert (code, rows) == (1, [])
        assert "401" in said
        code, said, rows = batch(served.url, tmp_path, "--max-tokens", "2", key=KEY.decode())
        assert (code, len(rows)) == (0, 12), said


_VALUES = st.recursive(
    st.none() | st.text(), lambda inner: st.dictionaries(st.sampled_from(["error", "message"]), inner)
)


@given(st.binary(max_size=200), _VALUES)
def test_errors_are_one_line(raw: bytes, value: Any) -> None:
    said = error_text(value, raw)
    assert said
    assert len(said.splitlines()) == 1


@given(st.text(max_size=9))
def test_retry_after(text: str) -> None:
    found = seconds_in(text)
    assert found is None or 0 <= found < 1e6


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:port", "http://me@x"])
def test_bad_urls(url: str) -> None:
    with pytest.raises(UsageError):
        Client(url)


def test_no_server() -> None:
    with pytest.raises(ServerError) as caught:
        Client("http://127.0.0.1:9").models()
    assert caught.value.passing


def test_an_answer_that_is_cut_off_is_asked_again() -> None:
    """A server that dies while it writes must not leave an error row."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            wire, _ = listening.accept()
            with wire:
                wire.recv(65536)
                wire.sendall(b'HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{"data": [')

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ServerError) as caught:
            Client(f"http://127.0.0.1:{listening.getsockname()[1]}").models()
        thread.join()
    assert caught.value.passing


def test_a_lines_own_system_message_goes_along() -> None:
    lines = [
        {"prompt": "Hi", "system": "Be brief."},
        {"prompt": "Hi"},
        {"prompt": "Hi", "raw": True},
        {"messages": [{"role": "system", "content": "Mine."}, {"role": "user", "content": "Hi"}]},
    ]
    raw = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    remote = Remote(Client("http://127.0.0.1:1"), "m", "openai", {}, system="Be kind.")
    bodies = []
    for line in read_lines(io.BytesIO(raw)):
        assert isinstance(line, Item)
        bodies.append(request_of(line, "a", remote)[1])
    said = [
        [m["content"] for m in body["messages"]] if "messages" in body else body["prompt"] for body in bodies
    ]
    assert said == [["Be brief.", "Hi"], ["Be kind.", "Hi"], "Hi", ["Mine.", "Hi"]]
