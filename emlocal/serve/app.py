"""The endpoints: each reads a request, waits for the engine, and writes the answer, whole or as a stream."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from emlocal.batch.lines import BadLine, parse_object
from emlocal.batch.run import question_of
from emlocal.errors import EmlocalError
from emlocal.methods.asking import Question
from emlocal.serve.engine_loop import Accepted, Done, EngineLoop, Failed, Gone, Heard, Said, Ticket
from emlocal.serve.errors import ClosingError, Refusal, refusal_of
from emlocal.serve.guard import BODY, LEFT, Receive, Scope, Send, respond
from emlocal.serve.metrics import Metrics
from emlocal.serve.page import FILES, page_file, settings_of_page
from emlocal.serve.protocol import CHAT, TEXT, Asked, House, read_asked, read_json
from emlocal.serve.responses import Responses, read_response
from emlocal.serve.shapes import Completions, Shape, TextCompletions, event

_COMMENT_SECONDS = 10.0
"""Seconds between comments in a stream that has no events, so that nobody takes it for dead."""
Writer = Callable[[Asked], Shape]


@dataclass
class Desk:
    """The state that the endpoints share."""

    house: House
    engine: EngineLoop
    metrics: Metrics
    parallel: int
    queue: int
    """Most requests that may wait beside those that are answered."""
    open: int = 0
    """Number of requests that are waiting or being answered."""
    closing: bool = False

    @contextlib.contextmanager
    def admitted(self, asked: Asked, client: str) -> Iterator[Ticket]:
        """Yields a place for a request, and frees it at the end. Raises Refusal if no place is free."""
        if self.closing:
            raise refusal_of(ClosingError())
        if self.open >= self.parallel + self.queue:
            said = f"{self.open:,} requests are waiting or being answered; try again later"
            raise Refusal(429, said, "queue_full", headers={"retry-after": self._retry_after()})

        def make(ticket: Ticket) -> Question:
            return asked.question(ticket.is_gone)

        streams = asked.stream and not asked.chooses
        ticket = Ticket(asked.settings.method.collecting, make, client, streams, asked.top is not None)
        self.open += 1
        self.engine.submit(ticket)
        try:
            yield ticket
        finally:
            self.open -= 1
            self.engine.cancel(ticket)  # nothing where it is finished

    def _retry_after(self) -> str:
        """Returns the seconds until a place will be free, estimated from earlier requests."""
        tokens = self.metrics.generated_tokens / max(1, self.metrics.first_token.count)
        seconds = tokens * self.metrics.token.sum / max(1, self.metrics.token.count)
        return str(min(60, max(1, round(seconds))))


class Answering:
    """The response to a request for an answer: an ASGI application."""

    def __init__(self, desk: Desk, asked: Asked, shape: Shape, client: str) -> None:
        self._desk = desk
        self._asked = asked
        self._shape = shape
        self._client = client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._desk.admitted(self._asked, self._client) as ticket:
            watch = asyncio.create_task(_watch(receive, ticket))
            try:
                heard = await ticket.events.get()
                while isinstance(heard, Accepted):
                    if self._asked.stream:
                        break
                    heard = await ticket.events.get()
                if isinstance(heard, Failed):
                    raise refusal_of(heard.error)
                if isinstance(heard, Gone):
                    scope[LEFT] = True
                elif self._asked.stream:
                    scope[LEFT] = not await self._stream(heard, ticket, send)
                elif isinstance(heard, Done):
                    await respond(send, 200, self._shape.whole(heard))
            finally:
                watch.cancel()

    async def _stream(self, heard: Heard, ticket: Ticket, send: Send) -> bool:
        """Writes events until the end. Returns whether the client stayed."""
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await _write(send, b"".join(self._shape.opening()))
        while True:
            told = [heard, *_rest(ticket)]
            said = [each for each in told if isinstance(each, Said)]
            last = told[-1]
            if any(isinstance(each, Gone) for each in told):  # tokens may have come after it
                return False
            if said:
                await _write(send, b"".join(self._shape.said(said)))
            if isinstance(last, Done):
                await _write(send, b"".join(self._shape.ending(last)), more=False)
                return True
            if isinstance(last, Failed):
                body = event(refusal_of(last.error).body()) + b"data: [DONE]\n\n"
                await _write(send, body, more=False)
                return True
            heard = await self._next(ticket, send)

    async def _next(self, ticket: Ticket, send: Send) -> Heard:
        while True:
            try:
                return await asyncio.wait_for(ticket.events.get(), _COMMENT_SECONDS)
            except TimeoutError:
                await _write(send, b": waiting\n\n")


def _rest(ticket: Ticket) -> Iterator[Heard]:
    while not ticket.events.empty():
        yield ticket.events.get_nowait()


async def _write(send: Send, body: bytes, *, more: bool = True) -> None:
    if body or not more:
        await send({"type": "http.response.body", "body": body, "more_body": more})


async def _watch(receive: Receive, ticket: Ticket) -> None:
    """Tells the request when its client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    ticket.events.put_nowait(Gone())


class Endpoints:
    """The endpoints of one server."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self.routes = {
            "/v1/models": ("GET", self.models),
            "/v1/models/{id:path}": ("GET", self.model),
            CHAT: ("POST", self.chat),
            TEXT: ("POST", self.text),
            "/v1/responses": ("POST", self.responses),
            "/tokenize": ("POST", self.tokenize),
            "/health": ("GET", self.health),
            "/metrics": ("GET", self.metrics),
            "/settings": ("GET", self.settings),
            **dict.fromkeys(FILES, ("GET", self.page)),
        }

    async def models(self, request: Request) -> Response:
        """Lists the model, and the ids that choose a method."""
        return _json({"object": "list", "data": [self._model(name) for name in self._desk.house.models]})

    async def model(self, request: Request) -> Response:
        """Returns one of the models."""
        return _json(self._model(self._desk.house.model(request.path_params["id"])))

    def _model(self, name: str) -> Mapping[str, Any]:
        house = self._desk.house
        served = house.models[name]
        adapter = {"adapter": served.adapter} if served.adapter else {}
        return {
            "id": name,
            "object": "model",
            "created": house.created,
            "owned_by": "emlocal",
            "emlocal": {"method": served.method, **adapter, "context": house.backend.context},
        }

    async def chat(self, request: Request) -> Response:
        """Answers messages."""
        return self._answer(request, lambda body: read_asked(self._desk.house, CHAT, body), Completions)

    async def text(self, request: Request) -> Response:
        """Continues a text."""
        return self._answer(request, lambda body: read_asked(self._desk.house, TEXT, body), TextCompletions)

    async def responses(self, request: Request) -> Response:
        """Answers in the form of OpenAI's newer API."""
        return self._answer(request, lambda body: read_response(self._desk.house, body), Responses)

    def _answer(
        self, request: Request, read: Callable[[Mapping[str, Any]], Asked], shape: Writer
    ) -> Response:
        body = read_json(request.scope[BODY])
        asked = read(body)
        user = body.get("user")
        host = request.client.host if request.client else ""
        client = f"{host} {user[:64]}" if isinstance(user, str) else host
        return Answering(self._desk, asked, shape(asked), client)  # type: ignore[return-value]  # an ASGI app

    async def tokenize(self, request: Request) -> Response:
        """Returns the tokens of a text as it is, or of messages as the chat template writes them."""
        body = read_json(request.scope[BODY])
        house, left = self._desk.house, dict(body)
        pieces = left.pop("with_pieces", False)
        if "content" in left and "prompt" not in left:
            left["prompt"] = left.pop("content")  # llama.cpp's name
        url = TEXT if "prompt" in left else CHAT
        unknown = [name for name in left if name not in ("model", "prompt", "messages")]
        if unknown or not isinstance(pieces, bool):
            name = unknown[0] if unknown else "with_pieces"
            raise Refusal(400, "there are prompt or messages, model, and with_pieces, true or false",
                          "invalid_value", name)  # fmt: skip
        house.model(left.pop("model", None))
        found = parse_object(1, {"url": url, "body": left})
        if isinstance(found, BadLine):
            raise Refusal(400, found.message, "invalid_value")

        def work() -> Mapping[str, Any]:
            question = question_of(found, house.settings, house.backend, 0, warn=lambda text: None)
            tokens = [*question.prompt]
            value: dict[str, Any] = {"count": len(tokens), "tokens": tokens}
            if pieces:
                spelt = [house.backend.token_bytes(token) for token in tokens]
                value["pieces"] = [piece.decode(errors="replace") for piece in spelt]
            return value

        try:
            return _json(await asyncio.wrap_future(self._desk.engine.call(work)))
        except EmlocalError as error:
            raise refusal_of(error) from None

    async def health(self, request: Request) -> Response:
        """Says whether the server takes requests."""
        closing = self._desk.closing
        return _json({"status": "closing" if closing else "ok"}, 503 if closing else 200)

    async def metrics(self, request: Request) -> Response:
        """Returns the counters for Prometheus."""
        running = self._desk.engine.running
        text = self._desk.metrics.text(running, max(0, self._desk.open - running))
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def settings(self, request: Request) -> Response:
        """Lists the settings of a request, for the page."""
        return _json(settings_of_page(self._desk.house))

    async def page(self, request: Request) -> Response:
        """Sends one of the page's files."""
        path = request.url.path
        headers = {"content-type": FILES[path][1]}
        return Response(page_file(path), headers=headers)


class _Json(Response):
    """A response with a JSON value and any status."""

    def __init__(self, value: Any, status: int, headers: Mapping[str, str] | None = None) -> None:
        self._value, self._status, self._own = value, status, headers
        super().__init__(status_code=status)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await respond(send, self._status, self._value, self._own)


def _json(value: Any, status: int = 200) -> Response:
    return _Json(value, status)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _Json(error.body(), error.status, error.headers)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    codes = {404: "there is no such endpoint", 405: f"{request.method} is not answered here"}
    said = codes.get(error.status_code, str(error.detail))
    code = "not_found" if error.status_code == 404 else "method_not_allowed"
    return _Json(Refusal(error.status_code, said, code).body(), error.status_code, error.headers)


def application(desk: Desk) -> tuple[Callable[[Any, Any, Any], Awaitable[None]], list[str]]:
    """Returns the endpoints as an ASGI application, and their paths."""
    endpoints = Endpoints(desk)
    routes = [Route(path, do, methods=[method]) for path, (method, do) in endpoints.routes.items()]
    handlers: dict[Any, Any] = {Refusal: _refused, HTTPException: _no_route}
    return Starlette(routes=routes, exception_handlers=handlers), [*endpoints.routes]
