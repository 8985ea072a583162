"""The server's life: sockets, start, and an end at which no client is cut off without a word."""

import asyncio
import ipaddress
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import uvicorn

from emlocal.errors import EmlocalError, UsageError
from emlocal.generation import Runner
from emlocal.serve.app import Desk, application
from emlocal.serve.engine_loop import EngineLoop
from emlocal.serve.guard import Guard, Limits, PublicURL
from emlocal.serve.metrics import Metrics
from emlocal.serve.protocol import House
from emlocal.serve.wire import KEEP_ALIVE_SECONDS, LARGEST_HEAD, Wire

_SHORTEST_KEY = 16
_LAST_SECONDS = 5.0
"""Seconds at the end for the last words to reach the clients."""
_LOOK_SECONDS = 0.02


@dataclass(frozen=True)
class Terms:
    """Limits of a server."""

    parallel: int
    """Most samples at once."""
    queue: int = 64
    """Most requests that wait, beside as many as are answered at once."""
    grace: float = 30.0
    """Seconds that requests have to finish when the server ends."""
    keys: Sequence[bytes] = ()
    public: PublicURL | None = None
    """The address at which a proxy shows the server."""
    limits: Limits = field(default_factory=Limits)


def bind(host: str, port: int) -> list[socket.socket]:
    """Opens sockets on all addresses of this name. Raises EmlocalError if that fails."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as why:
        raise UsageError(
            f"--host {host} is not an address of this machine: {why}", "leave --host out, or give 127.0.0.1"
        ) from None
    bound: list[socket.socket] = []
    refused: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            made.bind((address[0], bound[0].getsockname()[1] if bound and not port else address[1]))
            made.listen(128)
        except OSError as error:
            made.close()
            refused = error
            continue
        bound.append(made)
    if not bound:
        said = refused.strerror if refused else "no address"
        raise EmlocalError(
            f"cannot listen on {host}, port {port}: {said}", "choose another --port, or end what has it"
        )
    return bound


def is_loopback(sockets: Sequence[socket.socket]) -> bool:
    """Returns whether only this machine can connect."""
    return all(ipaddress.ip_address(each.getsockname()[0]).is_loopback for each in sockets)


def read_keys(path: Path | None) -> list[bytes]:
    """Returns the keys in a file, one a line; none without a file. Raises UsageError."""
    if path is None:
        return []
    try:
        lines = path.read_bytes()[: 1 << 20].splitlines()
    except OSError as why:
        raise UsageError(f"cannot read {path}: {why.strerror}", "give a file with keys, one a line") from why
    keys = [line.strip() for line in lines if line.strip() and not line.startswith(b"#")]
    if not keys:
        raise UsageError(f"{path} has no key", "write one into it: openssl rand -hex 24")
    if any(len(key) < _SHORTEST_KEY or not key.isascii() for key in keys):
        raise UsageError(
            f"a key in {path} has fewer than {_SHORTEST_KEY} characters, or others than ASCII",
            "make one: openssl rand -hex 24",
        )
    return keys


class Server:
    """One server. `run` is the engine's thread and returns at the end; asyncio has a thread of its own."""

    def __init__(
        self,
        house: House,
        runner: Runner,
        sockets: Sequence[socket.socket],
        terms: Terms,
        *,
        ready: Callable[[], None] = lambda: None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        """
        Args:
            ready: called when requests are answered.
            warn: takes a text for the one who started the server.
        """
        self.metrics = Metrics()
        self.engine = EngineLoop(house.backend, runner, self.metrics)
        self.desk = Desk(house, self.engine, self.metrics, terms.parallel, terms.queue)
        self._terms = terms
        self._sockets = [*sockets]
        self._ready, self._warn = ready, warn
        self._asked_to_end = 0
        self._started = threading.Event()
        self._front_error: BaseException | None = None

    def run(self) -> None:
        """Answers until `end`. Raises the error with which the front failed."""
        front = threading.Thread(target=self._run_front, name="emlocal-front")
        front.start()
        try:
            self.engine.run()
        finally:
            self.end()
            self.end()
            front.join()
        if self._front_error is not None:
            raise self._front_error

    def end(self) -> None:
        """Finishes what runs and refuses the rest; a second call ends all now. Any thread may call it."""
        self._asked_to_end += 1

    @contextmanager
    def ended_by_signals(self) -> Iterator[None]:
        """Lets SIGINT and SIGTERM end the server within this block."""

        def on_signal(number: int, frame: FrameType | None) -> None:
            self.end()

        previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    # ----------------------------------------------------------------------------------------- the front

    def _run_front(self) -> None:
        try:
            asyncio.run(self._front())
        except BaseException as error:  # noqa: BLE001
            self._front_error = error  # for the thread that waits
        finally:
            self.engine.stop()

    async def _front(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_loop_error)
        self.engine.attach(loop)
        app, paths = application(self.desk)
        limits = self._terms.limits
        guard = Guard(
            app,
            loopback=is_loopback(self._sockets),
            public=self._terms.public,
            keys=self._terms.keys,
            limits=limits,
            metrics=self.metrics,
            paths=paths,
            warn=self._warn,
        )
        logging.getLogger("uvicorn").propagate = False
        config = uvicorn.Config(
            guard,
            http=type("LimitedWire", (Wire,), {"limits": limits}),
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level=logging.CRITICAL,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=limits.connections,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(_LAST_SECONDS),
            h11_max_incomplete_event_size=LARGEST_HEAD,
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=self._sockets))
        while not server.started and not serving.done():
            await asyncio.sleep(0)
        self._ready()
        try:
            await self._until_the_end(serving)
        finally:
            server.should_exit = True
            await serving

    async def _until_the_end(self, serving: "asyncio.Task[None]") -> None:
        while not self._asked_to_end and not serving.done():
            await asyncio.sleep(_LOOK_SECONDS)
        self.desk.closing = True
        self.engine.refuse_waiting()
        loop = asyncio.get_running_loop()
        until = loop.time() + self._terms.grace
        while self.desk.open and loop.time() < until and self._asked_to_end < 2:
            await asyncio.sleep(_LOOK_SECONDS)
        self.engine.end_all()
        until = loop.time() + _LAST_SECONDS
        while self.desk.open and loop.time() < until:
            await asyncio.sleep(_LOOK_SECONDS)
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(_LOOK_SECONDS)

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        self._warn(f"{context.get('message', 'an error')}: {context.get('exception', '')}")
