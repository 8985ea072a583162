"""Requests to an OpenAI-compatible server, by the standard library: one connection for each request."""

import http.client
import json
import os
import queue
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from emlocal.cancel import never
from emlocal.errors import CancelledError, EmlocalError, UsageError

CHAT, TEXT = "/chat/completions", "/completions"
_MOST_BYTES = 64 << 20  # of a response
_MOST_OF_A_LINE = 16 << 20  # bytes of one event
_LOOK_SECONDS = 0.05  # between two checks of `cancelled`
_SHOWN = 300  # characters of an error that is not OpenAI's


class ServerError(EmlocalError):
    """The server's answer with another status than 200, or no answer (status 0)."""

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after
        """Seconds to wait, as the server says."""

    @property
    def passing(self) -> bool:
        """Whether the same request can succeed later."""
        return self.status in (0, 429, 502, 503, 504)


class Client:
    """A server at a URL. Its methods may be called from several threads."""

    def __init__(self, url: str, key: str | None = None, seconds: float = 600.0) -> None:
        """Takes the URL with or without `/v1`; `seconds` is the longest silence. Raises UsageError."""
        try:
            parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError as why:
            raise UsageError(f"--connect is {url!r}: {why}", "--connect http://127.0.0.1:8077") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise UsageError(
                f"--connect is {url!r}; it must be http://HOST:PORT", "--connect http://127.0.0.1:8077"
            )
        self._host, self._port, self._tls = parts.hostname, port, parts.scheme == "https"
        self._base = parts.path.rstrip("/") or "/v1"
        self._key, self._seconds = key, seconds
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = False
        self.url = url

    def models(self) -> list[dict[str, Any]]:
        """Returns what the server serves. Raises ServerError."""
        data = self._request("GET", "/models", None).get("data")
        return [each for each in data if isinstance(each, dict)] if isinstance(data, list) else []

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the object that answers a request.

        Raises ServerError, and CancelledError after `close`.
        """
        return self._request("POST", path, body)

    def close(self) -> None:
        """Ends all requests; the server sees that their client left."""
        with self._lock:
            self._closed = True
            for each in self._open:
                _shut(each)

    def stream(
        self, path: str, body: Mapping[str, Any], cancelled: Callable[[], bool] = never
    ) -> Iterator[dict[str, Any]]:
        """Yields the objects of a streamed answer as they come; a server that does not stream sends one.

        It ends early when `cancelled()` becomes true, or when the iterator is left; the server then sees that
        its client left. Raises ServerError.
        """
        own = Client(self.url, self._key, self._seconds)  # its own connections, so that they can be closed
        found: queue.SimpleQueue[dict[str, Any] | EmlocalError | None] = queue.SimpleQueue()

        def read() -> None:
            try:
                for value in own._events(path, body):
                    found.put(value)
                found.put(None)
            except EmlocalError as error:
                found.put(error)
            except CancelledError:
                found.put(None)

        threading.Thread(target=read, daemon=True).start()
        try:
            while not cancelled():
                try:
                    value = found.get(timeout=_LOOK_SECONDS)
                except queue.Empty:
                    continue
                if value is None:
                    return
                if isinstance(value, EmlocalError):
                    raise value
                yield value
        finally:
            own.close()

    def _events(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields the objects of the events (HTML standard, "Server-sent events") of an answer."""
        with self._response("POST", path, body) as response:
            if response.status != 200 or "event-stream" not in response.headers.get("content-type", ""):
                yield _value(response.status, response.read(_MOST_BYTES), response.headers.get("retry-after"))
                return
            while line := response.readline(_MOST_OF_A_LINE):
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                value = _value(200, data, None)
                if "error" in value:
                    raise ServerError(200, f"the server says: {error_text(value, data)}")
                yield value

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        with self._response(method, path, body) as found:
            answer = found.read(_MOST_BYTES)
            if found.length and len(answer) < _MOST_BYTES:  # the server ended within its answer
                raise http.client.IncompleteRead(answer, found.length)
            return _value(found.status, answer, found.getheader("retry-after"))

    @contextmanager
    def _response(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> Iterator[http.client.HTTPResponse]:
        """Sends a request. Errors of the network within the block become ServerError or CancelledError."""
        kind = http.client.HTTPSConnection if self._tls else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._seconds)
        try:
            connection.connect()
            wire = connection.sock
            with self._lock:
                self._open.add(wire)
                closed = self._closed
            try:
                if closed:
                    raise CancelledError
                raw = None if body is None else json.dumps(body).encode()
                connection.request(method, self._base + path, raw, self._headers())
                yield connection.getresponse()
            finally:
                with self._lock:
                    self._open.discard(wire)
        except (OSError, http.client.HTTPException) as why:
            if self._closed:
                raise CancelledError from None
            raise ServerError(
                0, f"the server at {self.url} does not answer: {why or type(why).__name__}"
            ) from (None)
        finally:
            connection.close()

    def _headers(self) -> dict[str, str]:
        key = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        return {"Content-Type": "application/json", "Accept": "application/json", **key}


def _shut(wire: socket.socket) -> None:
    try:
        wire.shutdown(socket.SHUT_RDWR)
    except OSError:  # it has just ended
        return


def _value(status: int, raw: bytes, retry_after: str | None) -> dict[str, Any]:
    """Returns the object in a response. Raises ServerError."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = None
    if status == 200 and isinstance(value, dict):
        return value
    if status == 200:
        raise ServerError(
            200, f"the server's answer is not a JSON object: {raw[:_SHOWN].decode(errors='replace')}"
        )
    raise ServerError(status, f"the server says {status}: {error_text(value, raw)}", seconds_in(retry_after))


def error_text(value: Any, raw: bytes) -> str:
    """Returns the message of an error in OpenAI's shape, else the beginning of the body."""
    error = value.get("error") if isinstance(value, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    text = message if isinstance(message, str) and message else raw[:_SHOWN].decode(errors="replace")
    return " ".join(text.split()) or "nothing else"


def seconds_in(retry_after: str | None) -> float | None:
    """Returns the seconds of a Retry-After header; None for a date, which few servers send."""
    given = (retry_after or "").strip()
    return float(given) if given.isascii() and given.isdigit() and len(given) < 7 else None


def api_key(path: Path | None) -> str | None:
    """Returns the key: the first line of the file, else OPENAI_API_KEY. Raises UsageError."""
    if path is None:
        return os.environ.get("OPENAI_API_KEY") or None
    try:
        lines = path.read_text("ascii").split()
    except (OSError, UnicodeDecodeError) as why:
        raise UsageError(f"cannot read {path}: {why}", "name a file with the key in it") from None
    if not lines:
        raise UsageError(f"{path} is empty", "write the key into it")
    return lines[0]
