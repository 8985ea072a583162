"""A conversation on the fake backend: what is kept and read again, and which draws are used."""

from collections.abc import Iterator

import pytest

from emlocal.backends.fake import FakeBackend, hashed, saying
from emlocal.chat.session import ChatSession
from emlocal.chat.talk import AnswerEvent, Turn
from emlocal.errors import CancelledError, ContextFullError, UsageError
from emlocal.generation import Completed, Completion, Scheduler
from emlocal.methods import Chosen
from emlocal.methods.asking import Answered
from emlocal.settings import EMInf, Plan, SamplingParams

GREEDY = Turn(Plan(SamplingParams(temperature=0), seed=0, max_tokens=50))
FREE = Turn(Plan(SamplingParams(temperature=1, min_p=0), seed=5, max_tokens=12))


def never() -> bool:
    return False


def ask(session: ChatSession, question: str, turn: Turn = GREEDY) -> Completion:
    return answer(session.ask(question, turn, never))


def answer(events: Iterator[AnswerEvent]) -> Completion:
    """Returns the completion with which the events end."""
    *_, last = events
    assert isinstance(last, Answered)
    return last.asking.result().completion


def chat(backend: FakeBackend) -> ChatSession:
    return ChatSession(backend, Scheduler(backend, 2))


def test_each_answer_joins_the_conversation() -> None:
    session = chat(FakeBackend(saying("eins", "zwei")))
    assert ask(session, "1?").text == "eins"
    assert ask(session, "2?").text == "zwei"
    assert session.conversation.exchanges == [("1?", "eins"), ("2?", "zwei")]
    assert session.totals.answers == 2


def test_a_turn_reads_only_what_is_new() -> None:
    backend = FakeBackend(saying("eins", "zwei"))
    session = chat(backend)
    ask(session, "first question")
    before = backend.fed
    ask(session, "2?")
    new = len("eins\n[user]2?\n[assistant]") - len("eins")  # the answer itself is in the cache
    assert backend.fed - before == new + len("zwei")
    assert session.timings.cached_tokens == len("[user]first question\n[assistant]eins")


def test_undo_and_another_question_reads_from_where_they_differ() -> None:
    backend = FakeBackend(saying("eins", "zwei"))
    session = chat(backend)
    ask(session, "1?")
    ask(session, "2?")
    assert session.take_back() == ("2?", "zwei")
    before = backend.fed
    ask(session, "3?")
    assert backend.fed - before == len("3?\n[assistant]zwei")


def test_another_answer_uses_other_draws_and_takes_the_place_of_the_first() -> None:
    session = chat(FakeBackend(hashed))
    first = ask(session, "hm", FREE).tokens
    second = answer(session.ask_again(FREE, never))
    third = answer(session.ask_again(FREE, never))
    assert len({tuple(first), tuple(second.tokens), tuple(third.tokens)}) == 3
    assert len(session.conversation.exchanges) == 1
    assert session.conversation.exchanges[0][1] == third.text


def test_the_same_seed_makes_the_same_chat_and_turns_draw_differently() -> None:
    chats = []
    for _ in range(2):
        session = chat(FakeBackend(hashed))
        chats.append([ask(session, "a", FREE).tokens, ask(session, "a", FREE).tokens])
    assert chats[0] == chats[1]
    assert chats[0][0] != chats[0][1]


def test_compare_shares_the_draws_and_changes_nothing() -> None:
    session = chat(FakeBackend(hashed))
    first = ask(session, "a", FREE)
    exchanges = list(session.conversation.exchanges)
    done = [e.completion for e in session.compare(FREE, never) if isinstance(e, Completed)]
    off, on = sorted(done, key=lambda c: c.sample)
    assert off.tokens == first.tokens  # EM is off in FREE, and the draws are those of the answer
    assert all(draw.steps == 0 for draw in off.draws)
    assert any(draw.steps > 0 for draw in on.draws)
    assert session.conversation.exchanges == exchanges
    assert session.last is not None
    assert session.last.completion is first


def test_compare_is_with_the_em_step_in_use() -> None:
    em = EMInf(threshold=1.0, steps=1)
    turn = Turn(Plan(SamplingParams(em=em), seed=1, max_tokens=8))
    session = chat(FakeBackend(hashed))
    ask(session, "a", turn)
    done = [e.completion for e in session.compare(turn, never) if isinstance(e, Completed)]
    assert max(draw.steps for c in done for draw in c.draws) == 1


def test_nothing_asked_yet() -> None:
    session = chat(FakeBackend())
    for call in (session.take_back, lambda: list(session.compare(GREEDY, never))):
        with pytest.raises(UsageError, match="there is no question"):
            call()


def test_a_full_context_is_refused_with_the_numbers_and_changes_nothing() -> None:
    session = chat(FakeBackend(saying("ja"), context=64))
    ask(session, "kurz")
    with pytest.raises(ContextFullError) as caught:
        ask(session, "x" * 80)
    assert "64" in caught.value.message
    assert "/clear" in caught.value.hint
    assert session.conversation.exchanges == [("kurz", "ja")]
    assert ask(session, "y").text == "ja"


def test_stopping_before_the_answer_keeps_the_conversation() -> None:
    session = chat(FakeBackend(saying("ja")))
    ask(session, "a")
    with pytest.raises(CancelledError):
        list(session.ask("b", GREEDY, lambda: True))
    with pytest.raises(CancelledError):
        list(session.ask_again(GREEDY, lambda: True))
    assert session.conversation.exchanges == [("a", "ja")]


def test_a_stopped_answer_is_kept_as_far_as_it_went() -> None:
    session = chat(FakeBackend(saying("ein langer Satz")))
    said = 0

    def after_three() -> bool:
        nonlocal said
        said += 1
        return said > 5

    last = answer(session.ask("a", GREEDY, after_three))
    assert last.finish_reason == "cancelled"
    assert 0 < len(last.text) < len("ein langer Satz")
    assert session.conversation.exchanges == [("a", last.text)]


def test_a_model_without_template_is_no_chat_model() -> None:
    from dataclasses import replace

    backend = FakeBackend()
    backend.info = replace(backend.info, chat_template=None)
    with pytest.raises(UsageError, match="no chat template"):
        ask(chat(backend), "a")


def test_after_a_comparison_the_next_turn_reads_only_what_is_new() -> None:
    backend = FakeBackend(saying("eins", "zwei"))
    session = chat(backend)
    ask(session, "1?")
    list(session.compare(GREEDY, never))
    before = backend.fed
    ask(session, "2?")
    assert backend.fed - before == len("\n[user]2?\n[assistant]") + len("zwei")


def test_methods_that_draw_several_and_ask_again() -> None:
    session = chat(FakeBackend(saying("it is 5", "really 5")))
    plan = Plan(SamplingParams(temperature=1), max_tokens=30)
    vote = Chosen("self-consistency:3")
    assert answer(session.ask("2+3?", Turn(vote.plan(plan), vote), never)).text == "it is 5"
    assert session.last is not None
    assert session.last.fields == {"answer": "5", "votes": 3}
    revised = Chosen("sequential-refinement:1")
    session.forget()
    assert answer(session.ask("2+3?", Turn(revised.plan(plan), revised), never)).text == "really 5"
    assert session.conversation.exchanges == [("2+3?", "really 5")]


def test_a_vote_asked_again_has_other_draws_but_greedys() -> None:
    session = chat(FakeBackend(hashed))
    vote = Chosen("vote:3")
    turn = Turn(vote.plan(Plan(SamplingParams(), seed=5, max_tokens=12)), vote)
    drawn = []
    for events in (session.ask("hm", turn, never), session.ask_again(turn, never)):
        answer(events)
        assert session.last is not None
        drawn.append([completion.tokens for completion in session.last.completions])
    assert drawn[0][0] == drawn[1][0]
    assert len({tuple(tokens) for tokens in (*drawn[0][1:], *drawn[1][1:])}) == 4
    assert len(session.conversation.exchanges) == 1


def test_a_vote_that_was_stopped_joins_the_conversation() -> None:
    session = chat(FakeBackend(saying("it is 5", "or 6")))
    vote = Chosen("vote:8:wave=2:sure=1")
    turn = Turn(vote.plan(Plan(SamplingParams(), max_tokens=30)), vote)
    looks = iter(range(100))
    assert answer(session.ask("2+3?", turn, lambda: next(looks) > 12)).text == "it is 5"
    assert session.last is not None
    assert session.last.fields["stopped"] == "cancelled"
    assert session.last.said[:2] == ["answer 5 (the last number of its text)", "2 of 2 agree"]
    assert session.conversation.exchanges == [("2+3?", "it is 5")]


def test_stopping_a_revision_keeps_the_answer() -> None:
    session = chat(FakeBackend(saying("it is 5", "no, it is 6")))
    method = Chosen("sequential-refinement:2")
    turn = Turn(method.plan(Plan(SamplingParams(temperature=0), max_tokens=30)), method)
    for looks in (12, 14):  # in the pass that reads the revision's prompt, and in the middle of the revision
        seen = 0

        def stopped() -> bool:
            nonlocal seen
            seen += 1
            return seen > looks  # noqa: B023

        assert answer(session.ask("2+3?", turn, stopped)).text == "it is 5"
        session.forget()
