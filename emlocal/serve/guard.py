"""Checks each request before the endpoints see it: where it comes from, its key, its type and its size.

The guard is pure ASGI. It checks in this order: Host and Origin, the key, the content type, the body. A web
page of a stranger must not reach the server, also if its own name points to this machine. The guard reads
the whole body, with a limit and a deadline; the application finds it in `scope["emlocal.body"]`.
"""

import asyncio
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

from emlocal.errors import UsageError
from emlocal.serve.errors import Refusal
from emlocal.serve.metrics import Metrics

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGI = Callable[[Any, Any, Any], Awaitable[None]]

BODY = "emlocal.body"
LEFT = "emlocal.left"
"""Key of the scope: whether the client left before the end."""
OPEN_PATHS = ("/health", "/", "/page.css", "/page.js")
"""Paths that need no key. The page's files hold no data; the page asks for the key."""
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
"""Headers for browsers: the page may run its own files and talk to its own server only."""
_PORTS = {"http": 80, "https": 443}
_OWN_SITE = ("same-origin", "none")
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
)


class PublicURL(NamedTuple):
    """The address at which a proxy shows the server."""

    origin: str
    """The Origin of its pages, as browsers write it: without the scheme's own port."""
    hosts: tuple[str, ...]
    """The Host headers that name it."""

    @classmethod
    def read(cls, text: str) -> Self:
        """Reads "https://em.example.org" or "http://host:port". Raises UsageError for anything else."""
        try:
            parts = urlsplit(text.strip())
            name, port = parts.hostname or "", parts.port
        except ValueError:
            name, port, parts = "", None, urlsplit("")
        extra = parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc
        plain = ":" in name or name.replace("-", "").replace(".", "").isalnum()
        if parts.scheme not in _PORTS or not name.isascii() or not plain or extra or port == 0:
            raise UsageError(
                f"--public-url is {text[:80]!r}; it must be http:// or https:// with a host and maybe a port",
                "give the address without a path: the proxy must pass on the whole host",
            )
        host, own = f"[{name}]" if ":" in name else name, _PORTS[parts.scheme]
        if port is None or port == own:
            return cls(f"{parts.scheme}://{host}", (host, f"{host}:{own}"))
        return cls(f"{parts.scheme}://{host}:{port}", (f"{host}:{port}",))


@dataclass(frozen=True)
class Limits:
    """Limits for a client, in bytes and seconds."""

    body: int = 8 << 20
    body_seconds: float = 30.0
    """Time for the whole body."""
    header_seconds: float = 10.0
    """Time for the whole head of a request."""
    write_seconds: float = 30.0
    """Time in which a client must read what was sent."""
    connections: int = 512


class Guard:
    """The ASGI application around the endpoints; see the module."""

    def __init__(
        self,
        app: ASGI,
        *,
        loopback: bool,
        public: "PublicURL | None" = None,
        keys: Sequence[bytes],
        limits: Limits,
        metrics: Metrics,
        paths: Sequence[str],
        warn: Callable[[str], None],
    ) -> None:
        """
        Args:
            loopback: only this machine can connect.
            public: the address at which a proxy shows the server; its Host and Origin are allowed.
            keys: one of them is required, where there are any.
            paths: that exist, for the metrics.
            warn: takes a text for the one who started the server.
        """
        self._app = app
        self._loopback = loopback
        self._public = public
        self._keys = keys
        self._limits = limits
        self._metrics = metrics
        self._paths = paths
        self._warn = warn

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        try:
            self._check(scope)
            if scope["method"] == "POST":
                scope[BODY] = await self._body(scope, receive)
            await self._app(scope, receive, sent)
        except Refusal as refusal:
            await respond(sent, refusal.status, refusal.body(), refusal.headers)
        except Exception as error:  # noqa: BLE001
            self._warn(f"a request to {scope['path'][:60]} failed: {type(error).__name__}: {error}")
            if not status:
                unexpected = Refusal(500, "an unexpected error", "server_error")
                await respond(sent, 500, unexpected.body(), {"x-should-retry": "false"})
        finally:
            endpoint = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests[endpoint, 499 if scope.get(LEFT) or not status else status] += 1

    def _check(self, scope: Scope) -> None:
        """Raises Refusal for a request that may not pass."""
        if scope["type"] != "http":
            raise Refusal(400, "only HTTP is spoken here", "bad_request")
        headers = Headers(scope["headers"])
        host = headers.one("host") or ""
        if self._loopback and not is_own_name(host) and not self._is_public_host(host):
            raise Refusal(403, "the Host is not this machine's", "foreign_host")
        self._check_origin(scope, headers, host)
        if self._keys and scope["path"] not in OPEN_PATHS and not self._has_key(headers):
            raise Refusal(
                401,
                "a valid key is needed: Authorization: Bearer KEY",
                "invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        if scope["method"] == "POST":
            _check_content(headers)

    def _is_public_host(self, host: str) -> bool:
        return self._public is not None and host.strip().lower() in self._public.hosts

    def _check_origin(self, scope: Scope, headers: "Headers", host: str) -> None:
        origin = headers.one("origin")
        own = (f"http://{host.lower()}", self._public.origin if self._public else None)
        if origin is not None and origin.lower() not in own:
            raise Refusal(403, "requests of other web pages are refused", "foreign_origin")
        site = headers.one("sec-fetch-site")
        link = scope["method"] == "GET" and headers.one("sec-fetch-mode") == "navigate"
        if site is not None and site not in _OWN_SITE and not link:
            raise Refusal(403, "requests of other web pages are refused", "foreign_origin")

    def _has_key(self, headers: "Headers") -> bool:
        kind, _, bearer = (headers.one("authorization") or "").partition(" ")
        given = bearer.strip() if kind.lower() == "bearer" else headers.one("x-api-key") or ""
        raw = given.encode("latin-1", "replace")
        # each is compared, so that the time does not tell which one was nearly right
        return sum(hmac.compare_digest(raw, key) for key in self._keys) > 0

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        most = self._limits.body
        too_large = Refusal(413, f"the body has more than {most:,} bytes", "body_too_large")
        length = Headers(scope["headers"]).one("content-length")
        if length is not None and int(length) > most:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        scope[LEFT] = True
                        raise Refusal(400, "the body is incomplete", "incomplete_body")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise Refusal(
                408,
                f"the body did not come within {self._limits.body_seconds:g} seconds",
                "body_too_slow",
                headers={"connection": "close", "x-should-retry": "false"},
            ) from None


class Headers:
    """The headers of a request."""

    def __init__(self, raw: Sequence[tuple[bytes, bytes]]) -> None:
        self._raw = raw

    def one(self, name: str) -> str | None:
        """Returns the value of a header.

        Raises Refusal if it is there twice, because two readers could see two different requests.
        """
        found = [value for key, value in self._raw if key == name.encode()]
        if len(found) > 1:
            raise Refusal(400, f"the header {name} stands there twice", "bad_request")
        return found[0].decode("latin-1") if found else None


def is_own_name(host: str) -> bool:
    """Whether a Host header is localhost or a loopback address, names that no stranger can own."""
    name = host.strip().lower()
    if name.startswith("["):
        name, _, rest = name[1:].partition("]")
        if rest and not (rest.startswith(":") and rest[1:].isdecimal()):
            return False
    else:
        name, colon, port = name.partition(":")
        if colon and not port.isdecimal():
            return False
    if name == "localhost" or (
        name.endswith(".localhost") and name.replace("-", "").replace(".", "").isalnum()
    ):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _check_content(headers: Headers) -> None:
    kind = headers.one("content-type") or ""
    name, _, parameters = kind.partition(";")
    charset = parameters.replace(" ", "").replace('"', "").lower()
    if name.strip().lower() != "application/json" or charset not in ("", "charset=utf-8"):
        raise Refusal(415, "Content-Type must be application/json", "unsupported_media_type")
    if (headers.one("content-encoding") or "identity").lower() != "identity":
        raise Refusal(415, "a Content-Encoding is not understood", "unsupported_media_type")
    if headers.one("content-length") is not None and headers.one("transfer-encoding") is not None:
        raise Refusal(400, "Content-Length and Transfer-Encoding contradict each other", "bad_request")


async def respond(send: Send, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
    """Sends a JSON response."""
    body = json.dumps(value, ensure_ascii=False).encode(errors="replace")
    own = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    raw = [(name.encode(), text.encode()) for name, text in own.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
