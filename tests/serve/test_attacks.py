"""What strangers may try, and what comes back. Each goes over a real connection."""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from emlocal.errors import UsageError
from emlocal.serve.guard import Limits, PublicURL
from tests.serve.servers import HELLO, KEY, Running, endless, running

BODY = json.dumps({"messages": HELLO, "max_tokens": 2}).encode()
CHAT = "POST /v1/chat/completions"
JSON = {"Content-Type": "application/json"}
LIMITS = Limits(body=20_000, body_seconds=0.5, header_seconds=0.5, write_seconds=0.5, connections=40)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(limits=LIMITS) as found:
        yield found


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with running(keys=[b"another key of the file", KEY], limits=LIMITS) as found:
        yield found


def request(
    server: Running,
    line: str = CHAT,
    headers: dict[str, str] | None = None,
    body: bytes = BODY,
    host: str | None = "",
    **more: Any,
) -> bytes:
    lines = [f"{line} HTTP/1.1"]
    if host is not None:
        lines.append(f"Host: {host or f'127.0.0.1:{server.port}'}")
    own = {**(JSON if line.startswith("POST") else {}), **(headers or {})}
    lines += [f"{name}: {value}" for name, value in own.items()]
    if body and line.startswith("POST") and "Transfer-Encoding" not in own and "Content-Length" not in own:
        lines.append(f"Content-Length: {len(body)}")
    return server.raw("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body, **more)


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def error(answer: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert found.keys() == {"message", "type", "param", "code"}
    return found


def test_what_is_allowed(server: Running) -> None:
    assert status(request(server)) == 200
    for host in ("localhost", "LOCALHOST:1", "app.localhost:8077", "127.0.0.1", "127.8.8.8:80", "[::1]:8077"):
        assert status(request(server, host=host)) == 200, host
    own = f"http://127.0.0.1:{server.port}"
    assert status(request(server, headers={"Origin": own, "Sec-Fetch-Site": "same-origin"})) == 200
    assert status(request(server, headers={"Content-Type": 'application/json; charset="UTF-8"'})) == 200
    assert status(request(server, headers={"Transfer-Encoding": "chunked"}, body=chunked(BODY))) == 200


PUBLIC = "https://em.example.org"


def test_a_proxy_s_address_is_allowed_and_no_other() -> None:
    with running(public=PublicURL.read(PUBLIC)) as server:
        for host in ("em.example.org", "EM.example.org:443", "localhost"):
            assert status(request(server, host=host)) == 200, host
            assert status(request(server, host=host, headers={"Origin": PUBLIC})) == 200, host
        for host in (
            "em.example.org:80",
            "em.example.org.evil.example",
            "x.em.example.org",
            "em.example.org@x",
        ):
            assert error(request(server, host=host))["code"] == "foreign_host", host
        for origin in (
            "https://em.example.org:8443",
            "https://evil.example",
            "null",
            "http://em.example.org.x",
        ):
            assert error(request(server, headers={"Origin": origin}))["code"] == "foreign_origin", origin


def test_a_public_address_is_a_scheme_and_a_host() -> None:
    assert PublicURL.read("HTTP://Em.Example.org:80/") == (
        "http://em.example.org",
        ("em.example.org", "em.example.org:80"),
    )
    assert PublicURL.read("https://[::1]:8443") == ("https://[::1]:8443", ("[::1]:8443",))
    bad = "em.example.org ftp://x https:// https://a/b https://u@x https://x?q https://x:99999 https://x:0 https://*"
    for text in (*bad.split(), "https://x y", "https://ä.de", "https://[::1", "https://x#y"):
        with pytest.raises(UsageError, match="--public-url"):
            PublicURL.read(text)


def chunked(body: bytes) -> bytes:
    return f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"


HOSTS = (
    "evil.example",
    "evil.example:8077",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "localhost@evil.example",
    "evil.example#localhost",
    "0.0.0.0:8077",
    "192.168.1.2:8077",
    "10.0.0.1",
    "[::ffff:10.0.0.1]",
    "[::1].evil.example",
    "[::1]evil",
    "127.0.0.1:80:80",
    "127.1",
    "2130706433",
    "0x7f000001",
    "evil_localhost",
    ".",
)


@pytest.mark.parametrize("host", HOSTS)
def test_a_foreign_host_is_refused(server: Running, host: str) -> None:
    answer = request(server, host=host)
    assert status(answer) == 403
    assert error(answer)["code"] == "foreign_host"
    assert status(request(server, "GET /v1/models", host=host)) == 403


ORIGINS: tuple[dict[str, str], ...] = (
    {"Origin": "https://evil.example"},
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "file://"},
    {"Origin": "http://localhost:1"},
    {"Origin": "https://127.0.0.1"},
    {"Origin": "chrome-extension://abcdef"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
)


@pytest.mark.parametrize("headers", ORIGINS)
def test_a_foreign_origin_is_refused(server: Running, headers: dict[str, str]) -> None:
    answer = request(server, headers=headers)
    assert status(answer) == 403
    assert error(answer)["code"] == "foreign_origin"
    assert b"access-control" not in answer.lower()


def test_a_preflight_of_another_page_is_refused(server: Running) -> None:
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert status(request(server, "OPTIONS /v1/chat/completions", headers, b"")) == 403
    assert status(request(server, "OPTIONS /v1/chat/completions", {}, b"")) == 405


KINDS: tuple[dict[str, str], ...] = (
    {"Content-Type": "text/plain"},
    {"Content-Type": "application/x-www-form-urlencoded"},
    {"Content-Type": "multipart/form-data; boundary=x"},
    {"Content-Type": ""},
    {"Content-Type": "text/plain; application/json"},
    {"Content-Type": "application/json, text/plain"},
    {"Content-Type": "application/json; charset=utf-7"},
    {"Content-Type": "application/jsonp"},
    {"Content-Encoding": "gzip"},
    {"Content-Encoding": "br, gzip"},
)


@pytest.mark.parametrize("headers", KINDS)
def test_only_json_is_read(server: Running, headers: dict[str, str]) -> None:
    assert status(request(server, headers=headers)) == 415


HEADS = {
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", 400),
    "two origins": (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\nOrigin: null\r\n\r\n",
        400,
    ),
    "not HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40) + b"\r\n\r\n", 400),
    "no version": (b"GET /health\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 403),
    "a header without a name": (b"GET /health HTTP/1.1\r\nHost: localhost\r\n: x\r\n\r\n", 400),
    "a NUL in a header": (b"GET /health HTTP/1.1\r\nHost: local\x00host\r\n\r\n", 400),
    "a negative length": (
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: -1\r\n\r\n",
        400,
    ),
    "two lengths": (
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 2\r\nContent-Length: 20\r\n\r\n{}",
        400,
    ),
    "a length and chunks": (
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        400,
    ),
    "an unknown transfer encoding": (
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        501,
    ),
    "a chunk size that is none": (
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
        400,
    ),
    "an upgrade": (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
        200,
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_that_are_wrong(server: Running, name: str) -> None:
    data, expected = HEADS[name]
    answer = server.raw(data)
    found = status(answer)
    assert found == expected or (expected == 501 and found == 400)
    assert answer.partition(b"\r\n\r\n")[2].startswith(b"{")


def test_a_flood_of_headers_is_cut_off(server: Running) -> None:
    flood = b"".join(b"X-%d: %s\r\n" % (i, b"y" * 100) for i in range(2_000))
    try:
        answer = server.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + flood + b"\r\n")
        assert answer == b"" or status(answer) == 400
    except ConnectionError:  # closed while it was still sending
        pass
    assert status(request(server, "GET /health")) == 200


PATHS = (
    "/v1/chat/completions/../../etc/passwd",
    "/../../etc/passwd",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/static/..%2f..%2fetc/passwd",
    "//etc/passwd",
    "/v1/models/pull",
    "/api/pull",
    "/docs",
    "/openapi.json",
    "/v1/files",
    "/v1/models/../../../etc/passwd",
    "/v1/models/fake%00",
)


@pytest.mark.parametrize("path", PATHS)
def test_there_is_nothing_to_fetch(server: Running, path: str) -> None:
    answer = request(server, f"GET {path}")
    assert status(answer) == 404
    assert "root:" not in str(error(answer))
    assert status(request(server, f"PUT {path}", body=b"")) in (404, 405)
    assert status(request(server, f"DELETE {path}", body=b"")) in (404, 405)


BODIES: dict[str, tuple[bytes, int]] = {
    "nothing": (b"", 400),
    "no JSON": (b"{", 400),
    "a list": (b"[]", 400),
    "null": (b"null", 400),
    "not UTF-8": (b'{"messages": "\xff"}', 400),
    "UTF-16": ('{"prompt": "x"}'.encode("utf-16"), 400),
    "deep lists": (b'{"messages": ' + b"[" * 9_000 + b"]" * 9_000 + b"}", 400),
    "deep objects": (b'{"a":' * 3_000 + b"1" + b"}" * 3_000, 400),
    "a number of a thousand digits": (b'{"seed": ' + b"9" * 5_000 + b"}", 400),
    "half a character": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    "no messages": (b"{}", 400),
    "messages and prompt": (b'{"messages": [{"role": "user", "content": "x"}], "prompt": "y"}', 400),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_wrong(server: Running, name: str) -> None:
    body, expected = BODIES[name]
    headers = {} if body else {"Content-Length": "0"}
    answer = request(server, headers=headers, body=body)
    assert status(answer) == expected
    assert error(answer)["type"] == "invalid_request_error"


FIELDS = (
    '"temperature": NaN',
    '"temperature": Infinity',
    '"temperature": 1e999',
    '"temperature": -1',
    '"temperature": "hot"',
    '"temperature": true',
    '"top_p": 0',
    '"top_k": -5',
    '"top_k": 1e300',
    '"seed": -1',
    '"seed": 18446744073709551616',
    '"seed": 1.5',
    '"max_tokens": 0',
    '"max_tokens": -1',
    '"n": 0',
    '"n": 65',
    '"n": 1000000',
    '"repeat_last_n": -2',
    '"logit_bias": {"257": 1}',
    '"logit_bias": {"-1": 1}',
    '"logit_bias": {"999999999999999999999": 1}',
    '"logit_bias": {"1": 1e300}',
    '"logit_bias": [1]',
    '"top_logprobs": 21, "logprobs": true',
    '"top_logprobs": -1, "logprobs": true',
    '"top_logprobs": 2',
    '"logprobs": 3',
    '"stop": [""]',
    '"stop": 7',
    '"stream": "yes"',
    '"stream_options": {"include_usage": true}',
    '"em_threshold": NaN',
    '"em_inf": true, "em_threshold": -1',
    '"em_treshold": 0.1',
    '"temprature": 0.1',
    '"something": 1',
    '"method": "nothing"',
    '"method": "vote:extract-pattern=(a+)+b"',
    '"method": "behaviour-vote"',
    '"method": "behaviour-vote:allow-code=true"',
    '"method": "behaviour-vote", "allow_code": true',
    '"method": "vote", "extract_pattern": "(a+)+b"',
    '"method": "vote", "extract": "regex"',
    '"method": ["vote"]',
    '"json_schema": "/etc/passwd"',
    '"grammar": "/etc/passwd"',
    '"json_schema": {"type": "object"}, "regex": "a"',
    '"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 7}}}',
    '"regex": "("',
    '"method": "vote", "n": 3',
    '"model": "fake:vote", "method": "greedy"',
    '"audio": {"voice": "x"}',
    '"modalities": ["audio"]',
)


@pytest.mark.parametrize("field", FIELDS)
def test_values_are_checked_before_they_get_anywhere(server: Running, field: str) -> None:
    body = f'{{"messages": [{{"role": "user", "content": "x"}}], "max_tokens": 2, {field}}}'
    if field.startswith('"max_tokens"'):
        body = body.replace('"max_tokens": 2, ', "")
    answer = request(server, body=body.encode())
    assert status(answer) == 400, answer
    assert error(answer)["message"]


MODELS = ("../../etc/passwd", "/etc/passwd", "http://evil.example/m.gguf", "fake\x00", "fake:", "FAKE", "", 7)


@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_looked_up_and_never_loaded(server: Running, model: object) -> None:
    body = json.dumps({"messages": HELLO, "model": model}).encode()
    answer = request(server, body=body)
    assert status(answer) == 404
    assert error(answer)["code"] == "model_not_found"


def test_large_bodies(server: Running) -> None:
    large = json.dumps({"messages": [{"role": "user", "content": "x" * 30_000}]}).encode()
    answer = request(server, body=large)
    assert status(answer) == 413
    assert error(answer)["code"] == "body_too_large"
    answer = request(server, headers={"Transfer-Encoding": "chunked"}, body=chunked(large))
    assert status(answer) == 413
    assert status(request(server, headers={"Content-Length": "9" * 18}, body=b"{}")) == 413


def test_a_prompt_that_does_not_fit_is_told_with_both_counts(server: Running) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 5_000}]}).encode()
    answer = request(server, body=body)
    assert status(answer) == 400
    found = error(answer)
    assert found["code"] == "context_length_exceeded"
    assert "5,018" in found["message"]
    assert "4,096" in found["message"]
    streamed = request(server, body=body[:-1] + b', "stream": true}')
    assert status(streamed) == 400


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Bearer {KEY.decode()}x"},
        {"Authorization": f"Bearer {KEY.decode()[:-1]}"},
        {"Authorization": KEY.decode()},
        {"Authorization": f"Basic {KEY.decode()}"},
        {"Authorization": "Bearer "},
        {"X-Api-Key": "ÿþ"},
    ],
)
def test_without_the_key_nothing_is_answered(locked: Running, headers: dict[str, str]) -> None:
    for line in (CHAT, "GET /v1/models", "GET /metrics", "GET /nowhere", "POST /tokenize"):
        answer = request(locked, line, headers)
        assert status(answer) == 401, line
    assert error(answer)["code"] == "invalid_api_key"
    assert status(request(locked, "GET /health", headers)) == 200


def test_with_a_key(locked: Running) -> None:
    key = KEY.decode()
    assert status(request(locked, headers={"Authorization": f"Bearer {key}"})) == 200
    assert status(request(locked, headers={"X-Api-Key": key})) == 200
    assert status(request(locked, headers={"Authorization": "Bearer another key of the file"})) == 200
    foreign = {"Authorization": f"Bearer {key}", "Origin": "https://evil.example"}
    assert status(request(locked, headers=foreign)) == 403


@pytest.mark.parametrize("part", [b"", b"POST /v1/chat/comp", b"GET /health HTTP/1.1\r\nHost: loc"])
def test_a_head_that_does_not_come_is_not_waited_for(server: Running, part: bytes) -> None:
    began = time.monotonic()
    assert server.raw(part) == b""
    assert time.monotonic() - began < 3


def trickle(wire: socket.socket, data: bytes) -> None:
    """Send a byte twenty times a second."""
    for byte in data:
        wire.sendall(bytes([byte]))
        time.sleep(0.05)


def test_a_head_that_trickles_is_not_waited_for(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as wire:
        began = time.monotonic()
        with pytest.raises(OSError):
            trickle(wire, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"x" * 100)
        assert time.monotonic() - began < 3


def test_a_second_head_that_trickles_is_not_waited_for() -> None:
    import emlocal.serve.wire as wire_module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire_module, "KEEP_ALIVE_SECONDS", 0.2)
        with running(limits=LIMITS) as server, server_wire(server) as wire:
            wire.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200" in wire.recv(1000)
            began = time.monotonic()
            with pytest.raises(OSError):
                trickle(wire, b"G" * 100)
            assert time.monotonic() - began < 3


def server_wire(server: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=5)


def test_a_body_that_does_not_come_is_not_waited_for(server: Running) -> None:
    answer = request(server, headers={"Content-Length": "500"}, body=b'{"mess')
    assert status(answer) == 408
    assert error(answer)["code"] == "body_too_slow"


def test_a_body_that_trickles_is_not_waited_for(server: Running) -> None:
    head = (
        f"{CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n"
    )
    with server_wire(server) as wire:
        wire.sendall(head.encode())
        found = b""
        wire.settimeout(0.05)
        for _ in range(60):
            try:
                wire.sendall(b" ")
                found += wire.recv(1000)
            except TimeoutError:
                continue
            except OSError:
                break
            if found:
                break
        assert status(found) == 408


def test_a_client_that_leaves_in_its_body_leaves_nothing(server: Running) -> None:
    with server_wire(server) as wire:
        wire.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\n"
                     b"Content-Type: application/json\r\nContent-Length: 90\r\n\r\n{")  # fmt: skip
    server.wait(server.idle)
    assert status(request(server)) == 200


def test_many_half_open_connections_do_not_stay(server: Running) -> None:
    wires = [server_wire(server) for _ in range(60)]
    time.sleep(1.0)  # the deadline of their heads
    assert status(request(server)) == 200
    for wire in wires:
        wire.close()


def test_a_client_that_does_not_read_is_dropped() -> None:
    with running(endless, limits=LIMITS, context=60_000, send_buffer=4096) as server:
        body = json.dumps(
            {"messages": HELLO, "max_tokens": 50_000, "stream": True, "logprobs": True, "top_logprobs": 20}
        ).encode()
        head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        wire = socket.socket()
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.connect(("127.0.0.1", server.port))
        wire.sendall(f"{CHAT} HTTP/1.1\r\n{head}".encode() + body)
        server.wait(lambda: server.server.engine.running == 1)
        server.wait(server.idle, 60)
        assert server.server.metrics.cancelled == 1
        wire.close()


def test_a_second_request_before_the_answer_hides_no_disconnect() -> None:
    with running(endless, seconds=0.01) as server:
        body = json.dumps({"messages": HELLO, "max_tokens": 3_000}).encode()
        head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        one = f"{CHAT} HTTP/1.1\r\n{head}".encode() + body
        with server_wire(server) as wire:
            wire.sendall(one + one)
            server.wait(lambda: server.server.engine.running == 1)
            wire.sendall(one)
            time.sleep(0.1)
        server.wait(server.idle, 2)


def test_answers_carry_no_cors_and_are_not_sniffed(server: Running) -> None:
    answer = request(server).lower()
    assert b"access-control" not in answer
    assert b"x-content-type-options: nosniff" in answer
    assert b"server: uvicorn" not in answer
