"""Votes on free texts: by normalised text, and by the model's verdict on pairs of answers."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from emlocal.backends.fake import END, VOCABULARY, FakeBackend
from emlocal.errors import CancelledError, UsageError
from emlocal.generation import Scheduler
from emlocal.generation.prompt import Asked
from emlocal.methods import Chosen, Outcome
from emlocal.methods.asking import Answered, Question, ask_one
from emlocal.methods.clustering import asked_about, is_yes, normalised
from emlocal.settings import Plan, SamplingParams

PROMPT = "Who was it?"
SAID = ("It was Ada.", "it was Ada", "Lovelace, Ada", "Grace Hopper", "Nobody knows.")
ADA = {"It was Ada.", "it was Ada", "Lovelace, Ada"}


def judge(same: Callable[[str, str], bool]) -> Callable[[Sequence[int]], NDArray[np.float32]]:
    """Returns a model that says one of `SAID` to the question, and yes or no to a pair of answers."""

    def script(tokens: Sequence[int]) -> NDArray[np.float32]:
        text = bytes(t for t in tokens if t < END).decode(errors="replace")
        row = np.full(VOCABULARY, -50, dtype=np.float32)
        prompt, found, said = text.partition("\n\nReply:")
        if found:
            _, a, b = (
                part.partition("\n\n")[0]
                for part in prompt.replace("Answer B: ", "Answer A: ").split("Answer A: ")
            )
            replies: Sequence[str] = (" Yes" if same(a, b) else "No, they do not",)
        else:
            replies, said = SAID, text.removeprefix(PROMPT)
        for i, reply in enumerate(replies):
            if reply.startswith(said):
                row[ord(reply[len(said)]) if len(said) < len(reply) else END] = 1 - i / 8
        return row

    return script


def outcome(
    method: str,
    same: Callable[[str, str], bool] = lambda a, b: False,
    *,
    parallel: int = 8,
    seed: int = 0,
    cancelled: Callable[[], bool] = lambda: False,
) -> Outcome:
    chosen = Chosen(method)

    def encode(asked: Asked) -> list[int]:
        assert isinstance(asked, str)
        return list(asked.encode())

    plan = chosen.plan(
        Plan(SamplingParams(temperature=3), max_tokens=40, seed=seed), frozenset({"temperature"})
    )
    with Scheduler(FakeBackend(judge(same), sequences=parallel + 2, shared=False), parallel) as runner:
        *_, last = ask_one(runner, chosen.collecting, Question(PROMPT, plan, encode), cancelled)
    assert isinstance(last, Answered)
    return last.asking.result()


def ada(a: str, b: str) -> bool:
    return a in ADA and b in ADA


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("The Eiffel Tower.", "eiffel  tower", True),
        ("a cat", "cat", True),
        ("Ｐａｒｉｓ", "paris!", True),
        ("Paris", "London", False),
        ("anthem", "them", False),  # only whole words are articles
        ("...", "", True),
    ],
)
def test_normalised(a: str, b: str, same: bool) -> None:
    assert (normalised(a) == normalised(b)) is same


@given(st.text(max_size=60))
def test_normalised_again_is_the_same(text: str) -> None:
    once = normalised(text)
    assert normalised(once) == once


@pytest.mark.parametrize(
    ("reply", "yes"), [("Yes.", True), (" **yes**", True), ("no", False), ("", False), ("eyes", False)]
)
def test_is_yes(reply: str, yes: bool) -> None:
    assert is_yes(reply) is yes


def test_the_model_is_shown_the_beginning_of_a_long_text() -> None:
    assert len(asked_about("q" * 9999, "a" * 9999, "b" * 9999)) < 2200


def samples(found: Outcome) -> list[str]:
    return [completion.text for completion in found.completions]


@pytest.mark.parametrize("seed", range(4))
def test_a_vote_by_text_counts_normalised_texts(seed: int) -> None:
    found = outcome("vote:8:cluster=text:beta=0:sure=1:wave=8", seed=seed)
    keys = [normalised(text) for text in samples(found)]
    assert found.fields["answers"] == len(set(keys))
    assert found.fields["votes"] == max(map(keys.count, keys))
    assert len(found.jobs) == 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("wave", [3, 8])
def test_a_vote_by_the_model_counts_what_it_says_is_the_same(seed: int, wave: int) -> None:
    found = outcome(f"vote:8:cluster=model:beta=0:sure=1:wave={wave}", ada, seed=seed)
    texts = samples(found)
    groups = ["ada" if text in ADA else text for text in texts]
    assert found.fields["answers"] == len(set(groups))
    assert found.fields["votes"] == max(map(groups.count, groups))
    assert all(handle.completions for handle in found.jobs)


def test_a_yes_in_one_order_alone_is_a_no() -> None:
    one_way = outcome("vote:8:cluster=model:sure=1:wave=8", lambda a, b: a < b)
    assert one_way.fields["answers"] == len({normalised(text) for text in samples(one_way)})
    both = outcome("vote:8:cluster=model:sure=1:wave=8", lambda a, b: True)
    assert both.fields["answers"] == 1


def test_the_order_of_the_jobs_changes_nothing() -> None:
    found = [outcome("vote:8:cluster=model:sure=1", ada, parallel=p) for p in (1, 3, 8)]
    assert found[0].fields == found[1].fields == found[2].fields


def test_ctrl_c_while_the_model_compares_keeps_the_samples() -> None:
    calls = 0

    def cancelled() -> bool:
        nonlocal calls
        calls += 1
        return calls > 30

    found = outcome("vote:8:cluster=model:sure=1:wave=8", ada, cancelled=cancelled)
    assert found.fields["stopped"] == "cancelled"
    assert found.completions


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises((UsageError, CancelledError)):
        Chosen("vote:cluster=magic")
