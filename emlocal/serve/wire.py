"""A connection with two deadlines that uvicorn lacks: for a request's head, and for reading the answer."""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from emlocal.serve.errors import Refusal
from emlocal.serve.guard import Limits

KEEP_ALIVE_SECONDS = 30
"""Seconds between two requests of a connection."""
LARGEST_HEAD = 32 << 10
"""The most bytes of a request's line and headers."""


class Wire(H11Protocol):
    """The connection; see the module."""

    limits = Limits()
    _head: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _last: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_head(self.limits.header_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete and not cycle.more_body:
            # A second request before the first is answered. No client of ours does that, and while it waited
            # nobody would see the client leave. It is dropped, and the connection closed after the answer.
            cycle.keep_alive = False
            return
        super().data_received(data)
        if self.cycle is not cycle and self._head is not None:
            self._head.cancel()
            self._head = None

    def on_response_complete(self) -> None:
        if self.transport.is_closing():  # what is not sent yet must not wait for ever
            self._last = self.loop.call_later(self.limits.write_seconds, self.transport.abort)
        else:
            self._wait_for_head(KEEP_ALIVE_SECONDS + self.limits.header_seconds)
        before = self.cycle
        super().on_response_complete()
        if self.cycle is not before and self._head is not None:
            self._head.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self.limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP; says nothing in the middle of an answer."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the application is told that the client left
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.abort()
                return
        body = json.dumps(Refusal(400, "this is not HTTP/1.1 as it should be", "bad_request").body()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (
            h11.Response(status_code=400, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _wait_for_head(self, seconds: float) -> None:
        if self._head is not None:
            self._head.cancel()
        self._head = self.loop.call_later(seconds, self.transport.abort)

    def _disarm(self) -> None:
        for timer in (self._head, self._unread, self._last):
            if timer is not None:
                timer.cancel()  # otherwise it keeps the closed connection in memory until it is due
        self._head = self._unread = self._last = None
