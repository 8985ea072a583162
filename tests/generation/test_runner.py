"""Jobs that come and go while others run: they do not affect each other, and nothing is read twice."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from emlocal.backends.base import Feed
from emlocal.backends.fake import END, VOCABULARY, FakeBackend, hashed, saying
from emlocal.chat.session import ChatSession
from emlocal.chat.talk import Turn
from emlocal.errors import BackendError, CancelledError, ContextFullError, LogitsError
from emlocal.generation import Completed, Completion, Event, Finished, Handle, Job, Request, Scheduler, Token
from emlocal.generation.scheduler import SPARE_SEQUENCES
from emlocal.generation.sequences import common, tokens_of
from emlocal.sampling import Draw, SamplingParams, Uniforms
from emlocal.settings import Plan

WILD = SamplingParams(temperature=1.0, min_p=0.0, logit_bias=((END, -3.0),))


def engine(parallel: int, spare: int = SPARE_SEQUENCES, **options: object) -> FakeBackend:
    return FakeBackend(**{"sequences": parallel + spare, "shared": False, "context": 2048, **options})  # type: ignore[arg-type]


def job(text: str, key: int = 0, most: int = 12, samples: int = 1, **options: object) -> Job:
    requests = [Request(WILD, Uniforms(1, key, i), most) for i in range(samples)]
    return Job(list(text.encode()), requests, **options)  # type: ignore[arg-type]


def work_off(runner: Scheduler) -> list[Event]:
    found: list[Event] = []
    while not runner.idle:
        found += runner.step()
    return found


def draws(handle: Handle) -> list[list[Draw]]:
    return [completion.draws for completion in handle.result()]


@cache
def alone(text: str, key: int, most: int, samples: int) -> list[list[Draw]]:
    runner = Scheduler(engine(samples), samples)
    handle = runner.submit(job(text, key, most, samples))
    work_off(runner)
    return draws(handle)


class Watched(FakeBackend):
    """Records the number of rows and the sequences of each pass."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.passes: list[list[int]] = []

    def forward(self, feeds: Sequence[Feed], cancelled: Callable[[], bool] = lambda: False) -> None:
        self.passes.append(sorted(feed.sequence for feed in feeds))
        super().forward(feeds, cancelled)


# ------------------------------------------------------------------------------------ coming and going


def test_one_of_eight_is_cancelled_and_the_others_do_not_notice() -> None:
    """The batch shapes are equal: in the other run, the fifth ends by itself where it is cancelled here."""
    found = []
    for cancelled in (True, False):
        backend = Watched(sequences=8 + SPARE_SEQUENCES, shared=False)
        runner = Scheduler(backend, 8)
        handles = [
            runner.submit(job(f"question {i}", i, 10 if i == 5 and not cancelled else 30 + i))
            for i in range(8)
        ]
        events: list[Event] = []
        while handles[5].timings.generated_tokens < 10:
            events += runner.step()
        if cancelled:
            last = runner.cancel(handles[5])
            assert [type(event) for event in last] == [Completed, Finished]
            assert handles[5].completions[0].finish_reason == "cancelled"
        events += work_off(runner)
        found.append(([draws(handle) for handle in handles], backend.passes))
        assert [e.handle for e in events if isinstance(e, Finished)].count(handles[0]) == 1
    assert found[0] == found[1]  # includes the cancelled one's ten tokens, and the sequences of each pass


def test_a_job_begins_beside_those_that_run() -> None:
    runner = Scheduler(engine(3), 3)
    first = runner.submit(job("the first", 1, 30))
    for _ in range(5):
        runner.step()
    assert first.timings.generated_tokens == 4  # after the pass that read its prompt
    second = runner.submit(job("the second", 2, 5, samples=2))
    events = [event for _ in range(3) for event in runner.step()]
    assert {event.handle for event in events if isinstance(event, Token)} == {first, second}
    work_off(runner)
    assert draws(first) == alone("the first", 1, 30, 1)
    assert draws(second) == alone("the second", 2, 5, 2)


def test_events_tell_all_in_their_order() -> None:
    runner = Scheduler(engine(4), 4)
    handle = runner.submit(job("hello", 3, 6, samples=3))
    events = work_off(runner)
    assert isinstance(events[-1], Finished)
    for completion in handle.result():
        mine = [
            e
            for e in events
            if (isinstance(e, Token) and e.sample == completion.sample)
            or (isinstance(e, Completed) and e.completion is completion)
        ]
        *tokens, done = mine
        assert isinstance(done, Completed)
        assert [e.draw for e in tokens if isinstance(e, Token)] == completion.draws
        assert "".join(e.text for e in tokens if isinstance(e, Token)) + completion.tail == completion.text
    assert runner.step() == []


def test_a_queue_is_longer_than_the_places() -> None:
    runner = Scheduler(engine(2), 2)
    handles = [runner.submit(job(f"{i}", i, 4)) for i in range(9)]
    assert runner.free == 0
    waiting = handles[7]
    assert [type(e) for e in runner.cancel(waiting)] == [Completed, Finished]
    ended = [e.handle for e in work_off(runner) if isinstance(e, Finished)]
    assert ended == [handle for handle in handles if handle is not waiting]
    assert waiting.completions[0].draws == []
    assert runner.cancel(waiting) == []
    assert runner.free == 2


def test_what_fails_fails_alone() -> None:
    def script(tokens: Sequence[int]) -> NDArray[np.float32]:
        bad = bytes(t for t in tokens if t < END).startswith(b"bad") and len(tokens) > 6
        return np.full(VOCABULARY, np.nan, np.float32) if bad else hashed(tokens)

    runner = Scheduler(engine(4, script=script), 4)
    good, bad = runner.submit(job("good", 1, 20)), runner.submit(job("bad", 2, 20, samples=2))
    events = work_off(runner)
    assert isinstance(bad.error, LogitsError)
    assert [e for e in events if e.handle is bad and isinstance(e, Completed)] == []
    assert draws(good) == alone("good", 1, 20, 1)


class Followed:
    """Conversations that take turns, two at a time."""

    def __init__(self, *running: Iterator[Event]) -> None:
        self.running = [*running]

    def run(self) -> None:
        while self.running:
            self.running = [each for each in self.running if next(each, None) is not None]


def test_two_are_followed_at_once() -> None:
    runner = Scheduler(engine(2), 2)
    jobs = [job("one", 1, 15), job("two", 2, 9)]
    found: dict[Job, list[Draw]] = {each: [] for each in jobs}

    def follow(each: Job) -> Iterator[Event]:
        for event in runner.follow([each]):
            assert event.handle.job is each
            if isinstance(event, Token):
                found[each].append(event.draw)
            yield event

    Followed(*map(follow, jobs)).run()
    assert [*found.values()] == [alone("one", 1, 15, 1)[0], alone("two", 2, 9, 1)[0]]


def test_who_walks_away_from_one_leaves_the_other() -> None:
    runner = Scheduler(engine(2), 2)
    one, two = (runner.follow([job(text, key, 15)]) for key, text in ((1, "one"), (2, "two")))
    next(one)
    next(two)
    one.close()
    *_, last = two
    assert draws(last.handle) == alone("two", 2, 15, 1)


def test_stopping_one_while_it_is_read_leaves_the_other() -> None:
    runner = Scheduler(engine(2), 2)
    other = runner.follow([job("one", 1, 15)])
    next(other)
    with pytest.raises(CancelledError):
        next(runner.follow([job("two " * 50, 2)], lambda: True))
    *_, last = other
    assert draws(last.handle) == alone("one", 1, 15, 1)


# ----------------------------------------------------------------------------------------- a random walk

BEGINNINGS = ("", "system: be brief. ", "system: be brief. " * 3, "worked examples " * 20)
ACTION = st.one_of(
    st.tuples(
        st.just("submit"),
        st.sampled_from(BEGINNINGS),
        st.text("ab", min_size=1, max_size=3),
        st.integers(1, 3),
        st.integers(1, 9),
        st.booleans(),
        st.sampled_from([None, "A", "B"]),
    ),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("continue"), st.integers(0, 30), st.sampled_from([None, "A"])),
    st.tuples(st.just("forget")),
)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(
    actions=st.lists(ACTION, min_size=3, max_size=25),
    parallel=st.integers(1, 4),
    spare=st.integers(1, 6),
    trims=st.booleans(),
    shared=st.booleans(),
)
def test_each_says_what_it_says_alone(
    actions: list[tuple], parallel: int, spare: int, trims: bool, shared: bool
) -> None:
    backend = engine(parallel, spare, trims=trims, shared=shared, context=60_000)
    runner = Scheduler(backend, parallel)
    handles: list[tuple[Handle, tuple]] = []
    for number, (action, *values) in enumerate(actions):
        if action == "submit":
            beginning, text, samples, most, at_once, session = values
            one = (beginning + text, number, most, samples)
            handles.append((runner.submit(job(*one, at_once=at_once, session=session)), one))
        elif action == "step":
            for _ in range(values[0]):
                runner.step()
        elif action == "cancel" and handles:
            runner.cancel(handles[values[0] % len(handles)][0])
        elif action == "continue" and handles:
            handle, before = handles[values[0] % len(handles)]
            if handle.finished and handle.completions and "\ufffd" not in handle.completions[0].text:
                one = (before[0] + handle.completions[0].text + "x", number, 5, 1)
                handles.append((runner.submit(job(*one, session=values[1])), one))
        elif action == "forget":
            runner.forget()
    work_off(runner)
    for handle, one in handles:
        expected = alone(*one)
        for completion, whole in zip(handle.result(), expected, strict=True):
            cut = completion.finish_reason == "cancelled"
            assert completion.draws == (whole[: len(completion.draws)] if cut else whole)
    runner.close()
    assert [backend.open() for _ in range(parallel + spare)] == [*range(parallel + spare)]


# ------------------------------------------------------------------------------------------- what is kept


ANSWERS = ("first", "second", "third", "fourth", "fifth")


def chat_turn(turn: int) -> str:
    return f"question {turn} of this conversation?"


def converse(session: ChatSession, question: str) -> Iterator[object]:
    yield from session.ask(question, Turn(Plan(SamplingParams(temperature=0), max_tokens=40)), lambda: False)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_two_conversations_of_five_turns_read_only_what_is_new(shared: bool, at_once: bool) -> None:
    backend = engine(2, shared=shared, script=saying(*ANSWERS))
    runner = Scheduler(backend, 2)
    sessions = [ChatSession(backend, runner) for _ in range(2)]
    for session, system in zip(sessions, ("be brief", "be kind"), strict=True):
        session.conversation.system = system
    held = [0, 0]
    for turn in range(5):
        before, new = backend.fed, 0
        asked = [chat_turn(turn) + str(i) for i in range(2)]
        if at_once:
            Followed(*(converse(s, q) for s, q in zip(sessions, asked, strict=True))).run()  # type: ignore[arg-type]
        else:
            for session, question in zip(sessions, asked, strict=True):
                list(converse(session, question))
        for i, session in enumerate(sessions):
            timings = session.timings
            assert turn == 0 or timings.cached_tokens == held[i]
            assert (
                session.conversation.exchanges[-1][1] == ["first", "second", "third", "fourth", "fifth"][turn]
            )
            new += timings.prompt_tokens - timings.cached_tokens + timings.generated_tokens - 1
            held[i] = timings.prompt_tokens + timings.generated_tokens - 1
        assert backend.fed - before == new


def test_without_a_session_conversations_find_what_they_said() -> None:
    """As in a server, each turn is a separate job."""
    backend = engine(1, 4)
    runner = Scheduler(backend, 1)
    system = list(b"the system message " * 3)
    said = [system] * 3
    for turn in range(4):
        for i in range(3):
            before, prompt = backend.fed, [*said[i], *f"user {i}, turn {turn}. ".encode()]
            [handle] = {e.handle for e in runner.follow([Job(prompt, job("", i, 6).requests)])}
            answer = handle.completions[0]
            if turn:
                # the last token of the answer is not fed
                assert handle.timings.cached_tokens == len(said[i]) - 1
                assert backend.fed - before == len(prompt) - len(said[i]) + len(answer.draws)
            elif i:
                assert handle.timings.cached_tokens == len(system) + len("user ")
            said[i] = [*prompt, *answer.tokens]


def test_the_least_recently_used_goes_first() -> None:
    backend = engine(1, 2)  # three sequences, of which two can be kept
    runner = Scheduler(backend, 1)

    def ask(text: str) -> int:
        [handle] = {e.handle for e in runner.follow([job(text * 30, 0, 1)])}
        return handle.timings.cached_tokens

    assert [ask(text) for text in "abc"] == [0, 0, 0]
    assert [ask(text) for text in "bca"] == [29, 29, 29]  # all three are kept
    assert ask("d") == 0  # b is dropped
    assert [ask(text) for text in "cad"] == [29, 29, 29]
    assert ask("b") == 0


def test_kept_sequences_make_room_for_what_runs() -> None:
    """If all share one room, kept sequences go first, then the job that came last waits."""
    backend = FakeBackend(hashed, context=300, sequences=8)
    runner = Scheduler(backend, 2)
    for i in range(3):
        list(runner.follow([job(f"{i}" * 60, i, 20)]))
    handles = [runner.submit(job(f"{i}" * 120, i, 30)) for i in range(5, 8)]
    work_off(runner)
    for i, handle in enumerate(handles, 5):
        assert draws(handle) == alone(f"{i}" * 120, i, 30, 1)


def test_one_that_fills_the_room_ends_and_the_other_goes_on() -> None:
    backend = FakeBackend(hashed, context=200, sequences=6)
    runner = Scheduler(backend, 2)
    long, short = runner.submit(job("x" * 80, 1, 500)), runner.submit(job("y" * 40, 2, 60))
    while not short.timings.generated_tokens:
        runner.step()
    work_off(runner)
    assert long.completions[0].finish_reason == "context"
    assert draws(short) == alone("y" * 40, 2, 60, 1)


def test_an_engine_that_loses_a_sequence_fails_its_job_alone() -> None:
    class Forgetful(FakeBackend):
        """Cannot go back: an interrupted pass empties the sequences that it fed."""

        def forward(self, feeds: Sequence[Feed], cancelled: Callable[[], bool] = lambda: False) -> None:
            try:
                super().forward(feeds, cancelled)
            except (CancelledError, ContextFullError):
                for feed in feeds:
                    self.trim(feed.sequence, 0)
                raise

    runner = Scheduler(Forgetful(sequences=6, shared=False), 3)
    running = runner.submit(job("one", 1, 30))
    for _ in range(4):
        runner.step()
    late = runner.submit(job("two " * 20, 2, 5))
    with pytest.raises(CancelledError):
        runner.step(lambda: True)
    work_off(runner)
    assert isinstance(running.error, BackendError)
    assert draws(late) == alone("two " * 20, 2, 5, 1)


def test_what_another_job_is_reading_is_waited_for() -> None:
    backend = engine(4, 4)
    runner = Scheduler(backend, 4)
    examples = "worked examples " * 60
    handles = [runner.submit(job(f"{examples}{i}", i, 3)) for i in range(4)]
    work_off(runner)
    assert [handle.timings.cached_tokens for handle in handles] == [0] + 3 * [len(examples)]
    assert backend.fed == len(examples) + sum(len(c.draws) for h in handles for c in h.completions)


def test_gaps_between_conversations_close_and_nothing_is_lost() -> None:
    """A kept sequence between two running ones moves to another number."""
    backend = Watched(sequences=12, shared=False)
    runner = Scheduler(backend, 3)
    texts = {i: f"conversation {i}, " for i in range(3)}
    handles = {i: runner.submit(job(texts[i], i, [40, 3, 40][i])) for i in texts}
    work_off(runner)
    together = [numbers for numbers in backend.passes if len(numbers) == 2]
    assert together[-1][1] - together[-1][0] == 1
    for i, handle in handles.items():
        prompt = [*handle.job.prompt, *handle.completions[0].tokens, 1]
        again = runner.submit(Job(prompt, job("", i, 1).requests))
        work_off(runner)
        assert again.timings.cached_tokens == len(prompt) - 2  # everything that was fed


@pytest.mark.parametrize("spare", [1, 2, 3, 6, 10])
def test_waves_of_conversations_are_decoded_side_by_side(spare: int) -> None:
    """Kept sequences once stood between the clients of a later wave: up to three passes a step."""
    most = 8
    decoded: list[list[int]] = []

    class Decoding(FakeBackend):
        def forward(self, feeds: Sequence[Feed], cancelled: Callable[[], bool] = lambda: False) -> None:
            if all(feed.wanted for feed in feeds):  # and no prompt is read beside them
                decoded.append(sorted(feed.sequence for feed in feeds))
            super().forward(feeds, cancelled)

    backend = Decoding(sequences=most + spare, shared=False)
    runner = Scheduler(backend, most)
    for wave in range(6):
        handles = []
        for i in range(most):
            handles.append(
                runner.submit(job(f"what all of them begin with, {most * wave + i}: ", i, 12 + 2 * i))
            )
            if i in (0, 3):
                runner.step()  # the first ones come a little before the others
        work_off(runner)
        for i, handle in enumerate(handles):
            assert draws(handle) == alone(
                f"what all of them begin with, {most * wave + i}: ", i, 12 + 2 * i, 1
            )
    assert sum(len(numbers) == most for numbers in decoded) > 40
    assert all(numbers[-1] - numbers[0] + 1 == len(numbers) for numbers in decoded)
    assert runner.kept >= spare - 2
    runner.close()
    assert backend.open() == 0


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 100, 1000])
def test_common_beginnings(n: int) -> None:
    one = tokens_of([*range(n), 7, 8])
    assert common(one, tokens_of([*range(n), 9])) == n
    assert common(one, one) == n + 2
    assert common(one, tokens_of(range(n))) == n
    assert common(one, one, n // 2) == n // 2
    assert common(tokens_of(()), one) == 0
    different = tokens_of([*range(n), 6, 8])
    assert common(one, different) == n


def test_long_prompts_are_compared_quickly() -> None:
    """Compares 64 prompts of 40,000 tokens."""
    backend = FakeBackend(lambda tokens: np.zeros(VOCABULARY, np.float32), context=10**6, sequences=70)
    runner = Scheduler(backend, 1)
    seen: list[int] = []
    for i in range(64):
        prompt = [*b"abcdefgh"] * 5_000 + [i]
        greedy = Request(SamplingParams(temperature=0), Uniforms(0), 1)
        for event in runner.follow([Job(prompt, [greedy], at_once=True)]):
            if isinstance(event, Finished):
                seen.append(event.handle.timings.cached_tokens)
    assert seen == [0] + 63 * [40_000]


def test_completions_are_in_the_order_of_their_samples() -> None:
    runner = Scheduler(engine(3), 3)
    requests = [Request(WILD, Uniforms(1, 1, i), most) for i, most in enumerate((9, 2, 5))]
    handle = runner.submit(Job(list(b"hi"), requests))
    ended = [e.completion.sample for e in work_off(runner) if isinstance(e, Completed)]
    assert ended == [1, 2, 0]
    assert [completion.sample for completion in handle.result()] == [0, 1, 2]
    assert all(isinstance(completion, Completion) for completion in handle.completions)
