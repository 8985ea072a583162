"""A conversation on the fake backend: what is kept, what is read again, which draws are used."""

import pytest

from emlocal.backends.fake import FakeBackend, hashed, saying
from emlocal.chat.session import ChatSession, Turn
from emlocal.errors import CancelledError, ContextFullError, UsageError
from emlocal.generation import Completion
from emlocal.settings import EMInf, SamplingParams

GREEDY = Turn(SamplingParams(temperature=0), seed=0, max_tokens=50)
FREE = Turn(SamplingParams(temperature=1, min_p=0), seed=5, max_tokens=12)


def never() -> bool:
    return False


def ask(session: ChatSession, question: str, turn: Turn = GREEDY) -> Completion:
    *_, last = session.ask(question, turn, never)
    assert isinstance(last, Completion)
    return last


def test_each_answer_joins_the_conversation() -> None:
    session = ChatSession(FakeBackend(saying("eins", "zwei")))
    assert ask(session, "1?").text == "eins"
    assert ask(session, "2?").text == "zwei"
    assert session.conversation.exchanges == [("1?", "eins"), ("2?", "zwei")]
    assert session.totals.answers == 2


def test_a_turn_reads_only_what_is_new() -> None:
    backend = FakeBackend(saying("eins", "zwei"))
    session = ChatSession(backend)
    ask(session, "first question")
    before = backend.fed
    ask(session, "2?")
    new = len("eins\n[user]2?\n[assistant]") - len("eins")  # the answer itself is in the cache
    assert backend.fed - before == new + len("zwei")
    assert session.last_timings.cached_tokens == len("[user]first question\n[assistant]eins")


def test_undo_and_another_question_reads_from_where_they_differ() -> None:
    backend = FakeBackend(saying("eins", "zwei"))
    session = ChatSession(backend)
    ask(session, "1?")
    ask(session, "2?")
    assert session.take_back() == ("2?", "zwei")
    before = backend.fed
    ask(session, "3?")
    assert backend.fed - before == len("3?\n[assistant]zwei")


def test_another_answer_uses_other_draws_and_takes_the_place_of_the_first() -> None:
    session = ChatSession(FakeBackend(hashed))
    first = ask(session, "hm", FREE).tokens
    *_, second = session.ask_again(FREE, never)
    *_, third = session.ask_again(FREE, never)
    assert isinstance(second, Completion)
    assert isinstance(third, Completion)
    assert len({tuple(first), tuple(second.tokens), tuple(third.tokens)}) == 3
    assert len(session.conversation.exchanges) == 1
    assert session.conversation.exchanges[0][1] == third.text


def test_the_same_seed_makes_the_same_chat_and_turns_draw_differently() -> None:
    chats = []
    for _ in range(2):
        session = ChatSession(FakeBackend(hashed))
        chats.append([ask(session, "a", FREE).tokens, ask(session, "a", FREE).tokens])
    assert chats[0] == chats[1]
    assert chats[0][0] != chats[0][1]


def test_compare_shares_the_draws_and_changes_nothing() -> None:
    session = ChatSession(FakeBackend(hashed))
    answer = ask(session, "a", FREE)
    exchanges = list(session.conversation.exchanges)
    done = [e for e in session.compare(FREE, never) if isinstance(e, Completion)]
    off, on = sorted(done, key=lambda c: c.sample)
    assert off.tokens == answer.tokens  # EM is off in FREE, and the draws are those of the answer
    assert all(draw.steps == 0 for draw in off.draws)
    assert any(draw.steps > 0 for draw in on.draws)
    assert session.conversation.exchanges == exchanges
    assert session.last is answer


def test_compare_is_with_the_em_step_in_use() -> None:
    em = EMInf(threshold=1.0, steps=1)
    turn = Turn(SamplingParams(em=em), seed=1, max_tokens=8)
    session = ChatSession(FakeBackend(hashed))
    ask(session, "a", turn)
    done = [e for e in session.compare(turn, never) if isinstance(e, Completion)]
    assert max(draw.steps for c in done for draw in c.draws) == 1


def test_nothing_asked_yet() -> None:
    session = ChatSession(FakeBackend())
    for call in (session.take_back, lambda: list(session.compare(GREEDY, never))):
        with pytest.raises(UsageError, match="nothing has been asked"):
            call()


def test_a_full_context_is_refused_with_the_numbers_and_changes_nothing() -> None:
    session = ChatSession(FakeBackend(saying("ja"), context=64))
    ask(session, "kurz")
    with pytest.raises(ContextFullError) as caught:
        ask(session, "x" * 80)
    assert "64" in caught.value.message
    assert "/clear" in caught.value.hint
    assert session.conversation.exchanges == [("kurz", "ja")]
    assert ask(session, "y").text == "ja"


def test_stopping_before_the_answer_keeps_the_conversation() -> None:
    session = ChatSession(FakeBackend(saying("ja")))
    ask(session, "a")
    with pytest.raises(CancelledError):
        list(session.ask("b", GREEDY, lambda: True))
    with pytest.raises(CancelledError):
        list(session.ask_again(GREEDY, lambda: True))
    assert session.conversation.exchanges == [("a", "ja")]


def test_a_stopped_answer_is_kept_as_far_as_it_went() -> None:
    session = ChatSession(FakeBackend(saying("ein langer Satz")))
    said = 0

    def after_three() -> bool:
        nonlocal said
        said += 1
        return said > 4

    *_, last = session.ask("a", GREEDY, after_three)
    assert isinstance(last, Completion)
    assert last.finish_reason == "cancelled"
    assert 0 < len(last.text) < len("ein langer Satz")
    assert session.conversation.exchanges == [("a", last.text)]


def test_a_model_without_template_is_no_chat_model() -> None:
    from dataclasses import replace

    backend = FakeBackend()
    backend.info = replace(backend.info, chat_template=None)
    with pytest.raises(UsageError, match="no chat template"):
        ask(ChatSession(backend), "a")
