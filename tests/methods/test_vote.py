"""The vote and em-best on the engine without a model: the draws, the waves and the results."""

import json
from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from emlocal.backends.fake import END, VOCABULARY, FakeBackend
from emlocal.em.scores import Scores, scores
from emlocal.errors import CancelledError, UsageError
from emlocal.evaluation.contenders import describe, read_contenders
from emlocal.generation import Completion, Handle, Scheduler
from emlocal.generation.prompt import Asked
from emlocal.methods import Chosen, Outcome
from emlocal.methods.asking import Answered, Asking, Question, ask_one
from emlocal.methods.em_best import surest
from emlocal.methods.vote import BETA, Vote
from emlocal.methods.voting import Rules, Score, repeated, replay
from emlocal.sampling import Draw
from emlocal.settings import EMInf, Plan, SamplingParams

REPLIES = ("so 3", "it is 4", "3.0", "\\boxed{5}", "no idea")
PROMPT = b"why, oh why, oh why is it so?"


def script(tokens: Sequence[int]) -> NDArray[np.float32]:
    """Says one of `REPLIES`, told apart by the first byte, after a constant word."""
    said = bytes(t for t in tokens if t < END)[len(PROMPT) :]
    row = np.full(VOCABULARY, -50, dtype=np.float32)
    for i, reply in enumerate(REPLIES):
        if reply.encode().startswith(said):
            row[ord(reply[len(said)]) if len(said) < len(reply) else END] = 1 - i / 4
    return row


def encode(asked: Asked) -> list[int]:
    assert isinstance(asked, str)
    return list(asked.encode())


def question(method: Chosen, seed: int = 0, **params: Any) -> Question:
    base = Plan(SamplingParams(**params), max_tokens=24, seed=seed)
    return Question(PROMPT.decode(), method.plan(base, frozenset(params)), encode)


def outcome(
    method: str,
    seed: int = 0,
    *,
    parallel: int = 8,
    cancelled: Callable[[], bool] = lambda: False,
    **params: Any,
) -> Outcome:
    chosen = Chosen(method)
    with Scheduler(FakeBackend(script, sequences=parallel + 2, shared=False), parallel) as runner:
        *_, last = ask_one(runner, chosen.collecting, question(chosen, seed, **params), cancelled)
    assert isinstance(last, Answered)
    return last.asking.result()


def draws(found: Outcome) -> list[list[Draw]]:
    return [completion.draws for completion in found.completions]


# ------------------------------------------------------------------------------------------ what is drawn


def test_the_first_sample_is_greedys_and_the_others_are_those_of_sample() -> None:
    found = draws(outcome("vote:6:wave=6", seed=3))
    assert found[:1] == draws(outcome("greedy", seed=3))
    assert found[1:] == draws(_sampled(6, seed=3))[1:]
    assert len({tuple(d.token for d in one) for one in found}) > 2


def _sampled(n: int, seed: int) -> Outcome:
    chosen = Chosen("sample", samples=n)
    with Scheduler(FakeBackend(script, sequences=10, shared=False), 8) as runner:
        asked = question(chosen, seed, temperature=0.7, min_p=0.05)
        *_, last = ask_one(runner, chosen.collecting, asked)
    assert isinstance(last, Answered)
    return last.asking.result()


def test_greedys_is_greedy_whatever_the_samples_are() -> None:
    greedy = draws(outcome("greedy"))[0]
    hot = outcome("vote:3", temperature=50.0, dynatemp_range=30.0, min_p=0.0)
    assert draws(hot)[0] == greedy
    with_em = outcome("em-inf+vote:3", temperature=1.0)
    assert draws(with_em)[0] == greedy
    assert any(draw.steps for one in draws(with_em)[1:] for draw in one)


def test_its_settings_where_nobody_chose_others() -> None:
    plain = Chosen("vote").plan(Plan(SamplingParams(temperature=0.9, top_k=5, min_p=0.2)))
    assert (plain.params, plain.samples) == (SamplingParams(temperature=0.7, top_k=5, min_p=0.05), 8)
    given = Chosen("vote:4").plan(Plan(SamplingParams(temperature=0.9)), frozenset({"temperature"}))
    assert (given.params, given.samples) == (SamplingParams(temperature=0.9, min_p=0.05), 4)
    assert Chosen("vote:temperature=1").plan(Plan()).params.temperature == 1
    assert Chosen("sample+vote").plan(Plan(SamplingParams(temperature=0.9))).params.temperature == 0.9
    assert Chosen("sample:1+vote").plan(Plan()).params == SamplingParams(temperature=1, min_p=0)
    assert Chosen("em-inf+vote").plan(Plan()).params == SamplingParams(em=EMInf())
    assert Chosen("em-best:3").plan(Plan()).params == plain_params()
    assert Chosen("self-consistency").plan(Plan()).params == SamplingParams()


def plain_params() -> SamplingParams:
    return SamplingParams(temperature=0.7, min_p=0.05)


def test_an_evaluation_takes_the_settings_that_were_made_for_it() -> None:
    """It plans first, and asks with `collected`, which must not set the temperature again."""
    (contender,) = read_contenders("sample:1+vote:4")
    plan = contender.plan(Plan(), frozenset())
    assert contender.method.collected().params(plan.params) == plan.params
    assert contender.method.collected().samples == 4
    assert contender.method.collected().name == "vote"
    (plain,) = read_contenders("sample:1")
    assert plain.method.collected().name is None


# ------------------------------------------------------------------------------------------------- waves


@given(
    st.integers(0, 50),
    st.integers(2, 9),
    st.integers(1, 9),
    st.sampled_from([0.5, 0.8, 0.95, 1.0]),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from(["none", "mean-entropy", "tail-entropy"]),
    st.integers(1, 4),
)
def test_a_stopped_vote_is_a_beginning_of_the_long_one(
    seed: int, n: int, wave: int, sure: float, beta: float, score: Score, parallel: int
) -> None:
    """Equal draw for draw; and stored answers give the same vote again."""
    found = outcome(
        f"vote:{n}:wave={wave}:vote-sure={sure}:beta={beta}:score={score}", seed, parallel=parallel
    )
    long = outcome("vote:9:wave=9", seed)
    assert draws(found) == draws(long)[: len(found.completions)]
    method = Vote()
    ballots = [ballot for c in long.completions[:n] if (ballot := method.ballot(c))]
    again = replay(ballots, Rules(score, beta, None, wave, sure))
    assert again.decision.drawn == len(found.completions) == found.fields["drawn"]
    assert (again.stopped, again.decision.votes) == (found.fields["stopped"], found.fields["votes"])
    assert again.decision.confidence == found.confidence
    assert again.decision.winner == (None if found.undecided else ballots[found.index])
    assert len(found.jobs) == -(-len(found.completions) // wave)


def test_stored_answers_vote_as_they_did() -> None:
    """The answers are stored as by benchmarks/pool.py, with six decimals of the scores."""
    found = outcome("vote:9:wave=3:sure=0.8:score=mean-entropy:beta=2", seed=4)
    stored = [
        json.loads(
            json.dumps(
                {
                    "text": c.text,
                    "finish_reason": c.finish_reason,
                    "repeated": round(repeated(c.tokens), 4),
                    "scores": scores(
                        [d.entropy_before for d in c.draws], [d.p_before for d in c.draws]
                    ).as_json(),
                }
            )
        )
        for c in outcome("vote:9:wave=9:sure=1", seed=4).completions
    ]
    ballots = [
        Vote().ballot_of(i, row["text"], row["finish_reason"], row["repeated"], Scores(**row["scores"]))
        for i, row in enumerate(stored)
    ]
    again = replay([b for b in ballots if b], Rules("mean-entropy", 2.0, wave=3, sure=0.8))
    assert (again.decision.drawn, again.stopped) == (found.fields["drawn"], found.fields["stopped"])
    assert again.decision.winner is not None
    assert again.decision.winner.sample == found.index
    assert again.decision.confidence == pytest.approx(found.confidence)


def test_what_it_says() -> None:
    found = outcome("vote:8:score=none", seed=1)
    texts = [completion.text for completion in found.completions]
    threes = [i for i, text in enumerate(texts) if text in ("so 3", "3.0")]
    assert found.fields == {
        "answer": "3",
        "votes": len(threes),
        "drawn": len(texts),
        "agreement": round(len(threes) / len(texts), 6),
        "answers": len({text for text in texts if text != "no idea"} - {"3.0"}),
        "semantic_entropy": found.fields["semantic_entropy"],
        "stopped": found.fields["stopped"],
    }
    assert found.index == threes[0]
    assert found.confidence == len(threes) / len(texts)
    assert f"{len(threes)} of {len(texts)} agree" in found.said
    assert "answer 3 (the last number of its text)" in found.said
    assert "answer 3" in outcome("vote:8:score=none:extraction=last-number", seed=1).said


def test_a_prompt_is_read_once_a_wave_and_found_again() -> None:
    found = outcome("vote:4:wave=2:sure=1", seed=5)
    assert len(found.jobs) == 2
    assert [job.timings.prompt_tokens for job in found.jobs] == [len(PROMPT)] * 2
    assert found.jobs[1].timings.cached_tokens == len(PROMPT) - 1


def test_nobody_has_an_answer() -> None:
    def idle(tokens: Sequence[int]) -> NDArray[np.float32]:
        row = np.full(VOCABULARY, -50, dtype=np.float32)
        row[END if tokens[-1] == ord("!") else ord("!")] = 0
        return row

    chosen = Chosen("vote:5")
    with Scheduler(FakeBackend(idle, sequences=8, shared=False), 4) as runner:
        *_, last = ask_one(runner, chosen.collecting, question(chosen))
    assert isinstance(last, Answered)
    found = last.asking.result()
    assert (found.undecided, found.index, found.completion.text, found.confidence) == (True, 0, "!", 0.0)
    assert found.fields["answer"] is None
    assert found.fields["stopped"] == "budget"
    assert found.said == ["none of 5 has an answer to vote on"]


# ------------------------------------------------------------------------------------ who has a vote


def sample(
    i: int, text: str, reason: Any = "stop", tokens: Sequence[int] = (), entropy: float = 1.0
) -> Completion:
    tokens = list(tokens or text.encode())
    drawn = [Draw(t, entropy, entropy, 0, 0.5, 0.5, t) for t in tokens]
    return Completion(i, text, tokens, drawn, list(range(1, len(tokens) + 1)), reason)


def voted(method: str, *waves: Sequence[Completion]) -> Outcome:
    """Returns a method's outcome for these samples."""
    chosen = Chosen(method)
    asking = Asking(chosen.collecting, question(chosen))
    jobs = asking.start(lambda job: None)
    for wave in waves:
        (job,) = jobs
        handle = Handle(job)
        handle.completions = list(wave)
        jobs = asking.go_on(handle, lambda job: None)
    return asking.result()


def test_texts_that_were_cut_off_have_no_vote_unless_they_have_a_box() -> None:
    found = voted(
        "vote:4",
        [
            sample(0, "it may be 7", "length"),
            sample(1, "it may be 7", "context"),
            sample(2, "\\boxed{8} and then", "length"),
            sample(3, "7 or \\boxed{9", "length"),
        ],
    )
    assert found.fields["answer"] == "8"
    assert (found.fields["votes"], found.fields["drawn"], found.index) == (1, 4, 2)
    assert found.confidence == 0.25
    assert found.fields["stopped"] == "budget"


def test_texts_that_loop_have_none_either() -> None:
    loop = [1, 2, 3, 4] * 20
    found = voted(
        "vote:5:wave=5",
        [
            sample(0, "4 4 4 4", tokens=loop),
            sample(1, "4 4 4", tokens=loop),
            sample(2, "\\boxed{6} 6 6 6", tokens=loop, entropy=0.1),
            sample(3, "so 6", entropy=2.0),
            sample(4, "so 5"),
        ],
    )
    assert (found.fields["answer"], found.fields["votes"], found.fields["answers"]) == ("6", 2, 2)
    assert found.index == 3  # the text that does not loop, though it is less certain


def test_what_is_voted_on_can_be_said() -> None:
    texts = [sample(0, "Answer: B\n"), sample(1, "it is 7. Answer: b"), sample(2, "Answer: C, not 7")]
    chosen = Chosen("vote:3", extraction="regex", pattern=r"Answer: (\w)")
    asking = Asking(chosen.collecting, question(chosen))
    (job,) = asking.start(lambda job: None)
    handle = Handle(job)
    handle.completions = texts
    asking.go_on(handle, lambda job: None)
    assert (asking.result().fields["answer"], asking.result().fields["votes"]) == ("B", 2)


def test_a_long_answer_is_short_for_people() -> None:
    text = " ".join(str(i) for i in range(40))
    found = voted("vote:2:extract=none", [sample(0, text), sample(1, text.replace(" ", "\n"))])
    assert found.fields["votes"] == 2
    assert found.said[0] == f"answer {text[:39]}…"


# ----------------------------------------------------------------------------------------- stopped by hand


@given(st.integers(0, 30), st.integers(3, 90))
def test_stopped_midway_it_has_the_answer_of_what_is_there(seed: int, after: int) -> None:
    steps = 0

    def cancelled() -> bool:
        nonlocal steps
        steps += 1
        return steps > after

    found = outcome("vote:8:wave=2:sure=1", seed, parallel=2, cancelled=cancelled)
    whole = outcome("vote:8:wave=8", seed)
    assert found.fields["stopped"] in ("cancelled", "decided", "budget")
    done = [c for c in found.completions if c.finish_reason != "cancelled"]
    assert [c.draws for c in done] == [whole.completions[c.sample].draws for c in done]
    ballots = [ballot for c in found.completions if (ballot := Vote().ballot(c))]
    assert len(ballots) >= len(done)
    assert found.fields["drawn"] == len(ballots)
    if ballots:
        assert found.confidence == replay(ballots, Rules("tail-entropy", BETA, wave=99)).decision.confidence
    assert [c.sample for c in found.completions] == list(range(len(found.completions)))


def test_stopped_before_the_first_token_there_is_none() -> None:
    with pytest.raises(CancelledError):
        outcome("vote:4", cancelled=lambda: True)


def test_stopped_between_two_waves_the_first_one_counts() -> None:
    chosen = Chosen("vote:4:wave=2:sure=1")
    asking = Asking(chosen.collecting, question(chosen))
    (job,) = asking.start(lambda job: None)
    handle = Handle(job)
    handle.completions = [sample(0, "is 3"), sample(1, "is 4", entropy=0.1)]
    assert len(asking.go_on(handle, lambda job: None)) == 1
    assert asking.stop(CancelledError(), lambda job: None) == ()
    found = asking.result()
    assert (found.fields["stopped"], found.fields["drawn"], len(found.jobs)) == ("cancelled", 2, 1)
    assert found.said == ["answer 4 (the last number of its text)", "1 of 2 agree", "2 different answers"]


def test_a_box_in_a_text_that_was_stopped_counts() -> None:
    found = voted(
        "vote:3", [sample(0, "is 3 or", "cancelled"), sample(1, "\\boxed{4} is", "cancelled"), sample(2, "")]
    )
    assert (found.fields["answer"], found.fields["votes"], found.fields["drawn"]) == ("4", 1, 2)


# ------------------------------------------------------------------------------------------------ em-best


def test_em_best_takes_the_surest_that_is_whole() -> None:
    found = voted(
        "em-best:5",
        [
            sample(0, "one", entropy=0.9),
            sample(1, "two", entropy=0.4),
            sample(2, "cut", "length", entropy=0.1),
            sample(3, "loop", tokens=[1, 2, 3, 4] * 9, entropy=0.0),
            sample(4, " ", entropy=0.2),
        ],
    )
    assert (found.index, found.undecided, found.confidence) == (1, False, None)
    assert found.fields == {"chosen_by": "mean-entropy", "drawn": 5, "whole": 2}
    assert found.said == ["the most certain of 5 by mean-entropy, 2 of them whole"]


def test_em_best_of_texts_none_of_which_is_whole() -> None:
    empty = Completion(0, finish_reason="cancelled")
    found = voted("em-best:3", [empty, sample(1, "a", "length", entropy=2.0), sample(2, "b", "length")])
    assert (found.index, found.fields["whole"]) == (2, 0)


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0.01, 1)), min_size=1, max_size=6))
def test_the_surest_by_each_score(answers: list[tuple[float, float]]) -> None:
    found = [scores([h], [p]) for h, p in answers]
    entropies, probabilities = zip(*answers, strict=True)
    whole = [True] * len(found)
    assert entropies[surest(found, whole)] == min(entropies)
    assert probabilities[surest(found, whole, "log-probability")] == max(probabilities)
    assert surest(found, whole) == entropies.index(min(entropies))


def test_em_best_draws_what_sample_draws() -> None:
    found = outcome("em-best:5", seed=2)
    assert draws(found) == draws(_sampled(5, seed=2))
    means = [np.mean([d.entropy_before for d in one]) for one in draws(found)]
    assert found.index == int(np.argmin(means))


# ----------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"name": "vote", "samples": 1}, "--samples is 1; vote needs at least 2"),
        ({"name": "vote:x"}, "after vote: one number is expected"),
        ({"name": "vote", "sure": 0.4}, "--vote-sure is 0.4; it must be between 0.5 and 1"),
        ({"name": "vote", "wave": 0}, "--wave is 0"),
        ({"name": "vote", "beta": -1}, "--vote-beta is -1"),
        ({"name": "vote:alpha=0.5"}, "--vote-alpha is 0.5"),
        ({"name": "vote", "alpha": 2, "beta": 1}, "--vote-alpha and --vote-beta contradict each other"),
        ({"name": "vote", "score": "entropy"}, "--score is"),
        ({"name": "vote:8:extract=regex"}, "--extract regex needs a pattern"),
        ({"name": "vote+self-consistency"}, "exclude each other"),
        ({"name": "em-best", "samples": 1}, "em-best needs at least 2"),
        ({"name": "em-best", "score": "none"}, "em-best needs a score to choose by; --score is none"),
        ({"name": "em-best", "wave": 2}, "--wave belongs to --method vote"),
        ({"name": "greedy", "score": "none"}, "--score belongs to --method vote or em-best"),
        ({"name": "greedy", "extraction": "boxed"}, "--extract belongs to --method self-consistency or vote"),
    ],
)
def test_settings_that_cannot_be_meant(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        Chosen(**values)
    assert says in caught.value.message


@pytest.mark.parametrize("method", ["vote", "em-best"])
def test_greedy_samples_are_all_alike(method: str) -> None:
    with pytest.raises(UsageError, match="greedy samples are all alike"):
        Chosen(method).plan(Plan(SamplingParams(temperature=0)), frozenset({"temperature"}))
    (contender,) = read_contenders(f"greedy+{method}")
    with pytest.raises(UsageError, match="greedy samples are all alike"):
        contender.plan(Plan(), frozenset())


def test_its_settings_are_its_identity() -> None:
    names = ["vote", "vote:beta=0", "vote:alpha=2", "vote:score=unsure", "vote:wave=2", "vote:sure=1"]
    names += ["vote:extract=none", "em-best", "em-best:score=unsure"]
    assert len({str(Chosen(name).identity()) for name in names}) == len(names)


def test_in_words() -> None:
    words = {}
    for name in ("vote", "vote:4:beta=0:wave=2", "vote:alpha=2", "em-best:3:score=unsure"):
        (contender,) = read_contenders(name)
        words[name] = describe(contender, contender.plan(Plan(), frozenset()), Plan())
    assert words["vote"] == (
        "T 0.7, min-p 0.05, vote of greedy and up to 7 samples in waves of 4, weighed by tail-entropy"
        " (β 0.5), sure at 0.95"
    )
    assert "up to 3 samples in waves of 2, all alike, sure at 0.95" in words["vote:4:beta=0:wave=2"]
    assert "weighed by p^1" in words["vote:alpha=2"]
    assert words["em-best:3:score=unsure"].endswith("the most certain of 3 by unsure")


@pytest.mark.parametrize("score", get_args(Score))
def test_every_score_can_be_chosen(score: Score) -> None:
    assert not outcome(f"vote:4:score={score}").undecided
    if score != "none":
        assert outcome(f"em-best:3:score={score}").fields["chosen_by"] == score
