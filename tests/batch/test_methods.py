"""Methods, as their rows show them."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from emlocal.backends.fake import END, VOCABULARY, hashed, saying
from emlocal.errors import UsageError
from emlocal.generation import Completion, Handle
from emlocal.methods import HOW, METHODS, Chosen, Outcome, name_of
from emlocal.methods.asking import Question
from emlocal.methods.sequential_refinement import REVISE
from emlocal.settings import AdaptiveTemperature, EMInf, Plan, SamplingParams
from tests.batch.batches import batch, row, rows, settings, timeless

ASK = {"custom_id": "a", "prompt": "hi"}
OPEN = SamplingParams(temperature=1.0, min_p=0.0)


def one_of(*replies: str) -> Callable[[Sequence[int]], NDArray[np.float32]]:
    """Returns a script that says one of these with equal probability; they differ in their first byte."""

    def script(tokens: Sequence[int]) -> NDArray[np.float32]:
        text = bytes(t for t in tokens if t < END).decode()
        said = text[text.rindex("[assistant]") + len("[assistant]") :]
        found = np.full(VOCABULARY, -50, dtype=np.float32)
        for reply in replies:
            if reply.startswith(said):
                found[ord(reply[len(said)]) if len(said) < len(reply) else END] = 0
        return found

    return script


def test_the_command_line_offers_all_methods() -> None:
    offered = HOW.settings
    assert all(name in offered["method"].help for name in METHODS)
    assert offered["extraction"].choices == ("boxed", "last-number", "regex", "none")
    assert {known.flag for known in offered.values()} == {
        "--method", "--samples", "--rounds", "--extract", "--extract-pattern",
        "--think-steps", "--think-score", "--think-choice", "--power-alpha", "--power-block",
        "--score", "--vote-beta", "--vote-alpha", "--wave", "--vote-sure", "--cluster",
        "--allow-code", "--use-examples",
    }  # fmt: skip


def test_greedy_takes_the_most_probable_token_each_time() -> None:
    found = row([ASK], settings(Chosen("greedy"), OPEN, seed=1, max_tokens=10))
    tokens, expected = list(b"[user]hi\n[assistant]"), b""
    for _ in range(10):
        tokens.append(int(np.argmax(hashed(tokens))))
        expected += bytes(tokens[-1:])
    assert found["text"] == expected.decode(errors="replace")
    assert found["method"] == "greedy"
    assert found["entropy"]["touched"] == 0


def test_em_inf_lowers_the_entropy_and_says_so() -> None:
    plain = row([ASK], settings(Chosen("sample"), OPEN))
    found = row([ASK], settings(Chosen("em-inf"), OPEN))
    assert found["method"] == "em-inf"
    assert found["entropy"]["touched"] > 0.5
    assert found["entropy"]["mean_after"] < found["entropy"]["mean_before"] - 0.5
    assert plain["entropy"]["mean_after"] == plain["entropy"]["mean_before"]
    first = hashed(list(b"[user]hi\n[assistant]")).astype(np.float64)
    one = row([ASK | {"max_tokens": 1}], settings(Chosen("em-inf"), OPEN))
    assert one["entropy"]["mean_after"] == pytest.approx(EMInf().apply(first).entropy_after, abs=1e-3)


def test_adaptive_temperature_halves_the_entropy() -> None:
    found = row([ASK], settings(Chosen("adaptive-temperature"), OPEN))["entropy"]
    assert found["mean_after"] == pytest.approx(found["mean_before"] / 2, rel=0.02)


def test_min_p_and_dynamic_temperature_are_their_settings() -> None:
    for name, values in [
        ("min-p", {"min_p": 0.1, "temperature": 1.0}),
        ("dynamic-temperature", {"dynatemp_range": 0.5}),
        ("greedy", {"temperature": 0.0}),
    ]:
        by_method = row([ASK], settings(Chosen(name), SamplingParams()))  # type: ignore[arg-type]
        by_hand = row([ASK], settings(params=SamplingParams(**values)))  # type: ignore[arg-type]
        assert by_method["text"] == by_hand["text"]
        assert by_method["method"] == name
    assert row([ASK], settings(Chosen("min-p"), SamplingParams()))["text"] != row([ASK])["text"]


def test_what_was_set_on_purpose_stays() -> None:
    method = Chosen("min-p")
    assert method.params(SamplingParams(min_p=0.3), frozenset({"min_p"})).min_p == 0.3
    assert method.params(SamplingParams(min_p=0.3)).min_p == 0.1
    line = ASK | {"min_p": 0.9}
    assert row([line], settings(method))["text"] == row([line | {"temp": 1}], settings())["text"]


def test_without_a_method_the_settings_name_it() -> None:
    assert name_of(SamplingParams()) == "sample"
    found = [
        row([ASK | own], settings())["method"]
        for own in ({"temp": 0}, {"em_inf": True}, {"adaptive_temp": True}, {})
    ]
    assert found == ["greedy", "em-inf", "adaptive-temperature", "sample"]


# -------------------------------------------------------------------------------------------- a majority


def test_self_consistency_votes_among_different_draws() -> None:
    script = one_of("1 2 3", "so 3.0", "it is 4", "no idea")
    for seed in range(5):
        found = row([ASK], settings(Chosen("self-consistency", samples=9), OPEN, seed=seed), script=script)
        texts = [sample["text"] for sample in found["samples"]]
        assert len(texts) == 9
        assert len(set(texts)) >= 3
        votes = Counter({"1 2 3": "3", "so 3.0": "3", "it is 4": "4"}.get(text) for text in texts)
        del votes[None]
        (winner, most), *others = votes.most_common()
        if others and others[0][1] == most:
            continue  # a tie, which test_ties covers
        assert found["votes"] == most
        assert found["answer"] in {"3": ("3", "3.0"), "4": ("4",)}[winner]
        first = next(t for t in texts if t.endswith(winner) or t.removesuffix(".0").endswith(winner))
        assert found["text"] == first
        assert found["completion_tokens"] == sum(s["completion_tokens"] for s in found["samples"])


def test_samples_share_the_reading_and_are_eight_by_default() -> None:
    running = batch([{"prompt": "x" * 300}], settings(Chosen("self-consistency"), OPEN), parallel=8)
    (found,) = running.rows()
    assert len(found["samples"]) == 8
    assert running.runner.counters.prompt_tokens == found["prompt_tokens"] - 1


def test_samples_are_those_of_the_method_sample() -> None:
    vote = row([ASK], settings(Chosen("self-consistency", samples=3), OPEN))
    plain = row([ASK], settings(Chosen("sample", samples=3), OPEN))
    assert [s["text"] for s in vote["samples"]] == [s["text"] for s in plain["samples"]]
    assert len({s["text"] for s in plain["samples"]}) == 3
    assert plain["text"] == plain["samples"][0]["text"]
    assert "votes" not in plain
    assert row([ASK | {"n": 1}], settings(Chosen("sample", samples=3), OPEN))["text"] == plain["text"]


@pytest.mark.parametrize(
    ("extraction", "pattern", "reply", "answer"),
    [
        (None, None, "\\boxed{7} or 8", "7"),
        (None, None, "it is 7, no, 8", "8"),
        ("boxed", None, "\\boxed{7} or 8", "7"),
        ("boxed", None, "it is 7", None),
        ("last-number", None, "\\boxed{7} or 8", "8"),
        ("regex", "answer: (\\w+)", "the answer: seven, ok", "seven"),
        ("none", None, " it is 7\n", "it is 7"),
    ],
)
def test_what_is_voted_on(extraction: Any, pattern: str | None, reply: str, answer: str | None) -> None:
    how = settings(Chosen("self-consistency", 3, extraction=extraction, pattern=pattern), max_tokens=40)
    running = batch([ASK], how, script=saying(reply))
    (found,) = running.rows()
    assert found["answer"] == answer
    assert found["votes"] == (0 if answer is None else 3)
    assert found["text"] == reply
    assert running.tally.votes_lost == (answer is None)
    assert running.tally.answered == 1


def test_ties_go_to_the_sample_that_came_first() -> None:
    def outcome(method: Chosen, *texts: str) -> Outcome:
        question = Question("?", Plan(samples=len(texts)), lambda asked: [1])
        answering = method.collecting.answer(question)
        (job,) = next(answering)
        handle = Handle(job)
        handle.completions = [Completion(i, text) for i, text in enumerate(texts)]
        with pytest.raises(StopIteration) as stopped:
            answering.send([handle])
        found = stopped.value.value
        assert isinstance(found, Outcome)
        return found

    vote = outcome(Chosen("self-consistency"), "a 5", "none", "b 6", "c 6.0", "d 5")
    assert (vote.index, vote.fields, vote.undecided) == (0, {"answer": "5", "votes": 2}, False)
    plain = outcome(Chosen("sample"), "5", "5")
    assert (plain.index, plain.fields) == (0, {})


# --------------------------------------------------------------------------------------------- refinement


def test_refinement_asks_again_with_the_answer_in_view() -> None:
    heard = set[str]()

    def script(tokens: Sequence[int]) -> NDArray[np.float32]:
        text = bytes(t for t in tokens if t < END).decode()
        if text.endswith("[assistant]"):
            heard.add(text)
        return saying("first", "second", "third", "fourth")(tokens)

    found = row([ASK], settings(Chosen("sequential-refinement")), script=script)
    assert found["rounds"] == ["first", "second", "third"]
    assert found["text"] == "third"
    first = "[user]hi\n[assistant]"
    second = f"{first}first\n[user]{REVISE}\n[assistant]"
    third = f"{second}second\n[user]{REVISE}\n[assistant]"
    assert heard == {first, second, third}
    assert found["prompt_tokens"] == len(first) + len(second) + len(third)
    assert found["completion_tokens"] == len("firstsecondthird")
    more = row([ASK], settings(Chosen("sequential-refinement", rounds=3)), script=script)
    assert more["rounds"][-1] == "fourth"


def test_rounds_have_draws_of_their_own() -> None:
    def script(tokens: Sequence[int]) -> NDArray[np.float32]:
        return np.where(np.arange(VOCABULARY) % 256 < 97, -50, 0).astype(np.float32)  # equal each time

    found = row([ASK], settings(Chosen("sequential-refinement"), OPEN, max_tokens=8), script=script)
    assert len(set(found["rounds"])) == 3


def test_raw_prompts_are_refined_too() -> None:
    heard = set[str]()

    def script(tokens: Sequence[int]) -> NDArray[np.float32]:
        text = bytes(t for t in tokens if t < END).decode()
        heard.add(text)
        found = np.zeros(VOCABULARY, dtype=np.float32)
        found[END if text.endswith("!") else ord("!")] = 20
        return found

    found = row(
        [{"prompt": "hi", "raw": True}], settings(Chosen("sequential-refinement", rounds=1)), script=script
    )
    assert found["rounds"] == ["!", "!"]
    assert f"hi!\n\n{REVISE}\n\n" in heard


def test_a_revision_that_does_not_fit_keeps_the_answer() -> None:
    running = batch(
        [ASK, {"prompt": "another"}],
        settings(Chosen("sequential-refinement")),
        script=saying("first"),
        context=100,
    )
    found = list(running.rows())
    assert [r["text"] for r in found] == ["first", "first"]
    assert all("rounds" not in r and "error" not in r for r in found)
    assert running.tally.answered == 2
    roomy = row([ASK], settings(Chosen("sequential-refinement")), script=saying("first", "2nd"), context=260)
    assert roomy["rounds"] == ["first", "2nd"]  # the first revision fits, the next does not
    assert roomy["text"] == "2nd"


def test_ordered_refinement() -> None:
    lines = [
        {"custom_id": f"q{i}", "prompt": "x" * (i * 31 % 70), "max_tokens": 1 + i * 7 % 20}
        for i in range(1, 20)
    ]
    how = settings(Chosen("sequential-refinement"), ordered=True)
    found = rows(lines, how, parallel=4)
    assert [r["custom_id"] for r in found] == [line["custom_id"] for line in lines]
    assert timeless(found) == timeless(rows(lines, settings(Chosen("sequential-refinement")), parallel=1))


# ----------------------------------------------------------------------------------------- contradictions


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"name": "best-of"}, "there is no method 'best-of'; a method is one of sample, greedy"),
        ({"samples": 0}, "--samples is 0"),
        ({"samples": 1025}, "--samples is 1025"),
        ({"rounds": 2}, "--rounds belongs to --method sequential-refinement"),
        ({"name": "sequential-refinement", "rounds": 0}, "--rounds is 0"),
        ({"extraction": "boxed"}, "--extract belongs to --method self-consistency"),
        ({"pattern": "x"}, "--extract-pattern belongs to --method self-consistency"),
        ({"name": "self-consistency", "samples": 1}, "self-consistency needs at least 2 to vote"),
        ({"name": "self-consistency", "extraction": "regex"}, "--extract regex needs a pattern"),
        ({"name": "self-consistency", "extraction": "regex", "pattern": "("}, "is not a regular expression"),
        (
            {"name": "self-consistency", "extraction": "boxed", "pattern": "x"},
            "has no effect with --extract boxed",
        ),
    ],
)
def test_methods_that_cannot_be_meant(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        Chosen(**values)
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("name", "params", "chosen"),
    [
        ("greedy", SamplingParams(temperature=0.5), {"temperature"}),
        ("greedy", SamplingParams(em=EMInf()), set()),
        ("sample", SamplingParams(em=EMInf()), set()),
        ("min-p", SamplingParams(em=AdaptiveTemperature()), set()),
        ("dynamic-temperature", SamplingParams(em=EMInf()), set()),
        ("em-inf", SamplingParams(em=AdaptiveTemperature()), set()),
        ("adaptive-temperature", SamplingParams(em=EMInf()), set()),
        ("em-inf", SamplingParams(), {"em_inf"}),
    ],
)
def test_settings_that_deny_the_method(name: Any, params: SamplingParams, chosen: set[str]) -> None:
    with pytest.raises(UsageError, match=f"--method {name} and .* contradict each other"):
        Chosen(name).params(params, frozenset(chosen))


def test_a_line_that_denies_the_method_is_an_error_row() -> None:
    lines = [ASK | {"em_inf": False}, {"custom_id": "b", "prompt": "x", "em_threshold": 0.5}]
    found = {r["custom_id"]: r.get("error") for r in rows(lines, settings(Chosen("em-inf")))}
    assert "contradict" in found["a"]
    assert found["b"] is None
    greedy = rows([ASK | {"temp": 1}], settings(Chosen("greedy")))
    assert "contradict" in greedy[0]["error"]
