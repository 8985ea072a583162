"""The thread that owns the engine: it takes requests from an inbox, steps, and hands events on.

`submit`, `cancel`, `call`, `refuse_waiting`, `end_all` and `stop` may be called from any thread: they put
something into the inbox. Everything else runs in the engine's thread, which looks into the inbox between two
steps. A step reads at most 256 tokens of prompts. So a cancelled request ends within one step, also while
its prompt is read.

Clients take turns: when the runner has a free place, the next client's sample gets it. So nobody waits for
all of another client's hundred requests.
"""

import asyncio
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar

from emlocal.backends.base import Backend
from emlocal.errors import CancelledError, EmlocalError, explained
from emlocal.generation import Completed, Completion, Finished, Handle, Job, Runner, Token
from emlocal.generation.alternatives import Alternative
from emlocal.generation.runner import Event
from emlocal.methods import Method, Outcome
from emlocal.methods.asking import Asking, Question
from emlocal.sampling import Draw
from emlocal.serve.errors import ClosingError
from emlocal.serve.metrics import Metrics

T = TypeVar("T")


class Drawn(NamedTuple):
    """A token of an answer, as clients see it."""

    piece: bytes
    draw: Draw
    alternatives: Sequence[tuple[bytes, Alternative]] = ()


class Accepted(NamedTuple):
    """The event that the prompt is made and fits."""

    prompt_tokens: int


class Said(NamedTuple):
    """Text that became certain, and the token that made it so; None for an end token and for a tail."""

    sample: int
    text: str
    drawn: Drawn | None
    reasoning: str = ""
    """Text of the thought before the answer."""


class Done(NamedTuple):
    """The answer, with the tokens of each completion if the request wants them."""

    outcome: Outcome
    drawn: Sequence[Sequence[Drawn]]


class Failed(NamedTuple):
    """The event that the request failed."""

    error: EmlocalError


class Gone(NamedTuple):
    """The event that the client left, which the front sends, not the engine."""


Heard = Accepted | Said | Done | Failed | Gone


@dataclass(eq=False)
class Ticket:
    """A request in progress. The front reads `events`; names with an underscore belong to the engine."""

    method: Method
    make: Callable[["Ticket"], Question]
    """Makes the question, in the engine's thread. Raises EmlocalError for contradictory settings."""
    client: str
    """The client's name; requests of one client wait for each other."""
    streams: bool = False
    """Whether each token is an event."""
    tokens: bool = False
    """Whether `Said` and `Done` have the tokens."""
    gone: bool = False
    """Whether nobody waits for the answer any more."""
    events: asyncio.Queue[Heard] = field(default_factory=asyncio.Queue)
    _asking: Asking | None = None
    _handles: set[Handle] = field(default_factory=set)
    _arrived: float = 0.0
    _first: float = 0.0
    _last: float = 0.0
    _drawn: int = 0

    def is_gone(self) -> bool:
        """Returns `gone`, for long work that asks whether to stop."""
        return self.gone


class EngineLoop:
    """See the module."""

    def __init__(self, backend: Backend, runner: Runner, metrics: Metrics) -> None:
        self.backend = backend
        self.metrics = metrics
        self._runner = runner
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._clients: dict[str, deque[tuple[Ticket, Job]]] = {}  # whose turn it is first
        self._later: deque[tuple[Ticket, Job]] = deque()  # of later rounds, which go first
        self._tickets: dict[Ticket, None] = {}
        self._of: dict[Handle, Ticket] = {}
        self._out: list[tuple[Ticket, Heard]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = False

    # ------------------------------------------------------------------------------------ from any thread

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Sends events to this loop from now on."""
        self._loop = loop

    def submit(self, ticket: Ticket) -> None:
        """Answers a request; its events go to `ticket.events`."""
        self._inbox.put(partial(self._begin, ticket))

    def cancel(self, ticket: Ticket) -> None:
        """Cancels a request; it has no more events."""
        ticket.gone = True
        self._inbox.put(partial(self._give_up, ticket))

    def call(self, work: Callable[[], T]) -> "Future[T]":
        """Calls `work` in the engine's thread, between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:  # noqa: BLE001
                    future.set_exception(error)  # for the one who waits

        self._inbox.put(run)
        return future

    def refuse_waiting(self) -> None:
        """Fails the requests that the engine has not begun."""
        self._inbox.put(partial(self._fail, ClosingError(), begun=False))

    def end_all(self) -> None:
        """Fails all requests."""
        self._inbox.put(partial(self._fail, ClosingError(), begun=True))

    def stop(self) -> None:
        """Lets `run` return; unfinished requests fail."""

        def stop() -> None:
            self._stopped = True

        self._inbox.put(stop)

    # --------------------------------------------------------------------------------- in the own thread

    @property
    def running(self) -> int:
        """Number of requests that have samples in the runner."""
        return sum(bool(ticket._handles) for ticket in [*self._tickets])

    @property
    def held(self) -> int:
        """Number of requests that are not finished."""
        return len(self._tickets)

    def run(self) -> None:
        """Answers requests until `stop`. Afterwards the engine has none."""
        try:
            while not self._stopped:
                self._look_into_inbox()
                self._feed()
                if not self._runner.idle:
                    self._step()
                self._tell()
        finally:
            self._fail(ClosingError(), begun=True)
            self._tell()
            self._runner.close()

    def _look_into_inbox(self) -> None:
        """Does what is in the inbox; waits for it if there is nothing else to do."""
        idle = self._runner.idle and not self._clients and not self._later
        try:
            work = self._inbox.get(timeout=0.5) if idle else self._inbox.get_nowait()
            while not self._stopped:
                work()
                work = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _begin(self, ticket: Ticket) -> None:
        if ticket.gone:
            return
        self._tickets[ticket] = None
        ticket._arrived = time.perf_counter()
        try:
            asking = Asking(ticket.method, ticket.make(ticket))
            jobs = asking.start(self._runner.check)
        except CancelledError:  # the client left while the prompt was tokenized
            return
        except EmlocalError as error:
            self._end(ticket, Failed(error))
            return
        except Exception as error:  # noqa: BLE001
            self._end(ticket, Failed(explained(error)))
            return
        ticket._asking = asking
        if jobs:
            self._out.append((ticket, Accepted(len(jobs[0].prompt))))
            self._clients.setdefault(ticket.client, deque()).extend((ticket, job) for job in jobs)
        self._look_at(ticket)

    def _give_up(self, ticket: Ticket) -> None:
        if ticket in self._tickets:
            self.metrics.cancelled += 1
            self._forget(ticket)

    def _forget(self, ticket: Ticket) -> None:
        """Takes a request out of the runner and the queues."""
        self._tickets.pop(ticket, None)
        for handle in [*ticket._handles]:
            self._runner.cancel(handle)
            self._of.pop(handle, None)
        ticket._handles.clear()
        self._later = deque(each for each in self._later if each[0] is not ticket)
        mine = self._clients.get(ticket.client)
        if mine is not None:
            left = deque(each for each in mine if each[0] is not ticket)
            if left:
                self._clients[ticket.client] = left
            else:
                del self._clients[ticket.client]

    def _feed(self) -> None:
        """Fills the runner's free places."""
        while self._runner.free > 0 and (found := self._next()) is not None:
            ticket, job = found
            handle = self._runner.submit(job)
            self._of[handle] = ticket
            ticket._handles.add(handle)

    def _next(self) -> tuple[Ticket, Job] | None:
        if self._later:
            return self._later.popleft()
        client = next(iter(self._clients), None)
        if client is None:
            return None
        waiting = self._clients.pop(client)
        found = waiting.popleft()
        if waiting:
            self._clients[client] = waiting  # behind all others
        return found

    def _step(self) -> None:
        try:
            events = self._runner.step()
        except Exception as error:  # noqa: BLE001
            # Whatever the engine failed with, the next step would meet it again: all requests fail, and
            # what comes after them finds an empty engine.
            why = error if isinstance(error, EmlocalError) else explained(error)
            for ticket in [*self._tickets]:
                if ticket._handles:
                    self._end(ticket, Failed(why))
            self._runner.forget()
            return
        self.metrics.steps += 1
        now = time.perf_counter()
        for event in events:
            self._hand_on(event, now)

    def _hand_on(self, event: Event, now: float) -> None:
        ticket = self._of.get(event.handle)
        if ticket is None:  # it failed in this very step
            return
        if isinstance(event, Token):
            self._count(ticket, event.draw, now)
            if ticket.streams:
                drawn = self._drawn(event.draw, event.alternatives) if ticket.tokens else None
                if event.text or event.reasoning or drawn is not None:
                    self._out.append((ticket, Said(event.sample, event.text, drawn, event.reasoning)))
        elif isinstance(event, Completed):
            if ticket.streams and event.completion.tail:
                self._out.append((ticket, Said(event.completion.sample, event.completion.tail, None)))
        else:
            self._finished(ticket, event)

    def _finished(self, ticket: Ticket, event: Finished) -> None:
        handle = event.handle
        del self._of[handle]
        ticket._handles.discard(handle)
        assert ticket._asking is not None
        try:
            jobs = ticket._asking.go_on(handle, self._runner.check)
        except Exception as error:  # noqa: BLE001
            self._end(ticket, Failed(explained(error)))
            return
        self._later.extend((ticket, job) for job in jobs)
        self._look_at(ticket)

    def _look_at(self, ticket: Ticket) -> None:
        """Ends a request whose method is done."""
        asking = ticket._asking
        assert asking is not None
        if asking.error is not None:
            self._end(ticket, Failed(asking.error))
        elif asking.outcome is not None:
            outcome, metrics = asking.outcome, self.metrics
            timings = outcome.timings
            metrics.prompt_tokens += timings.prompt_tokens
            metrics.cached_tokens += timings.cached_tokens
            if ticket._drawn > 1:
                metrics.token.add((ticket._last - ticket._first) / (ticket._drawn - 1))
            drawn = [[*self._all_drawn(each)] for each in outcome.completions] if ticket.tokens else []
            self._end(ticket, Done(outcome, drawn))

    def _end(self, ticket: Ticket, last: Done | Failed) -> None:
        self._forget(ticket)
        self._out.append((ticket, last))

    def _fail(self, error: EmlocalError, *, begun: bool) -> None:
        for ticket in [*self._tickets]:
            if begun or not (ticket._handles or ticket._drawn):
                self._end(ticket, Failed(error))

    def _count(self, ticket: Ticket, draw: Draw, now: float) -> None:
        metrics = self.metrics
        metrics.generated_tokens += 1
        metrics.entropy_before += draw.entropy_before
        metrics.entropy_after += draw.entropy_after
        if not ticket._drawn:
            ticket._first = now
            metrics.first_token.add(now - ticket._arrived)
        ticket._drawn += 1
        ticket._last = now

    def _all_drawn(self, completion: Completion) -> Iterator[Drawn]:
        noted = completion.alternatives or [()] * len(completion.draws)
        for draw, each in zip(completion.draws, noted, strict=True):
            drawn = self._drawn(draw, each)
            if drawn is not None:
                yield drawn

    def _drawn(self, draw: Draw, noted: Sequence[Alternative]) -> Drawn | None:
        """Returns the token as clients see it; None for an end token."""
        if draw.token in self.backend.info.end_tokens:
            return None
        spelt = [(self.backend.token_bytes(each.token), each) for each in noted]
        return Drawn(self.backend.token_bytes(draw.token), draw, spelt)

    def _tell(self) -> None:
        """Hands all events of this step to the event loop, in one call."""
        if not self._out:
            return
        told, self._out = self._out, []
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, told)


def _deliver(told: Sequence[tuple[Ticket, Heard]]) -> None:
    for ticket, heard in told:
        if not ticket.gone:
            ticket.events.put_nowait(heard)
