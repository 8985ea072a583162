"""Constrained answers on the engine without a model: all that is legal can be said, nothing else, and the
masks come before the EM step."""

import json
import re
from collections.abc import Sequence

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emlocal.backends.fake import END, VOCABULARY, FakeBackend, hashed, saying
from emlocal.em.entropy import entropy
from emlocal.em.steps import EMInf
from emlocal.errors import EmlocalError, UsageError
from emlocal.generation import Completion, Job, Request, Scheduler
from emlocal.generation.constraints import Constrainer, Matcher
from emlocal.generation.scheduler import SPARE_SEQUENCES
from emlocal.sampling import SamplingParams, Uniforms
from emlocal.settings.constraint import Constraint
from tests.examples import examples

WILD = SamplingParams(temperature=1.5, min_p=0.0)
SHARP = SamplingParams(temperature=1.0, min_p=0.0, em=EMInf(threshold=0.3, steps=8, learning_rate=1.0))
BACKEND = FakeBackend(sequences=8 + SPARE_SEQUENCES, shared=False, context=4096)


def regex(text: str) -> Constraint:
    return Constraint("regex", text)


def schema(value: object) -> Constraint:
    return Constraint("json_schema", json.dumps(value))


def answers(
    constraint: Constraint | None,
    samples: int = 8,
    *,
    most: int = 200,
    params: SamplingParams = WILD,
    stop: tuple[str, ...] = (),
    begun: tuple[int, ...] = (),
    prompt: str = "say",
    seed: int = 1,
    backend: FakeBackend = BACKEND,
) -> list[Completion]:
    requests = [
        Request(params, Uniforms(seed, 0, i), most, stop, constraint=constraint, begun=begun)
        for i in range(samples)
    ]
    with Scheduler(backend, min(samples, 8)) as runner:
        handle = runner.submit(Job([*prompt.encode(), *begun], requests))
        while not runner.idle:
            runner.step()
        return handle.result()


LANGUAGES = {
    "(ab|ac|b)c?": {"ab", "ac", "b", "abc", "acc", "bc"},
    "[xy]{2}|": {"xx", "xy", "yx", "yy", ""},
    "é|ü+z{0}|zz": None,
    "(0|1){3}": {f"{i:03b}" for i in range(8)},
}


@pytest.mark.parametrize("pattern", [p for p, texts in LANGUAGES.items() if texts])
def test_every_legal_text_can_be_said_and_no_other(pattern: str) -> None:
    even = SamplingParams(temperature=20.0, min_p=0.0)
    said = {c.text for seed in range(40) for c in answers(regex(pattern), seed=seed, params=even)}
    assert said == LANGUAGES[pattern]


PATTERNS = [*LANGUAGES, r"[a-z]{1,9}", r"\d+(\.\d{2})?", r"(yes|no), because [a-z ]{5,40}\.", r"«[^»]{0,9}»"]


@examples(40)
@given(st.sampled_from(PATTERNS), st.integers(0, 10**6), st.sampled_from([WILD, SHARP]))
def test_what_ends_by_itself_matches(pattern: str, seed: int, params: SamplingParams) -> None:
    for done in answers(regex(pattern), 3, seed=seed, params=params, most=60):
        if done.finish_reason == "stop":
            assert re.fullmatch(pattern, done.text)
        assert done.complete == bool(re.fullmatch(pattern, done.text))


SCHEMAS: Sequence[dict[str, object]] = [
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    {"type": "array", "items": {"enum": ["x", 1, None]}, "minItems": 1, "maxItems": 3},
    {"type": "string", "maxLength": 5},
    {"anyOf": [{"type": "boolean"}, {"type": "null"}, {"type": "number"}]},
]


@pytest.mark.parametrize("wanted", SCHEMAS)
@pytest.mark.parametrize("params", [WILD, SHARP])
def test_json_that_ends_by_itself_is_what_the_schema_says(
    wanted: dict[str, object], params: SamplingParams
) -> None:
    done = [c for seed in range(5) for c in answers(schema(wanted), seed=seed, params=params, most=120)]
    whole = [c for c in done if c.finish_reason == "stop"]
    assert len(whole) > len(done) / 4
    for each in whole:
        assert each.complete is True
        jsonschema.validate(json.loads(each.text), wanted)


@examples(25)
@given(st.sampled_from(PATTERNS), st.integers(0, 10**6), st.sampled_from([WILD, SHARP]))
def test_forced_tokens_change_nothing(pattern: str, seed: int, params: SamplingParams) -> None:
    """Taken without a draw, or drawn from a row where they alone are legal."""
    plain = answers(regex(pattern), 3, seed=seed, params=params, most=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Matcher, "forced", lambda self: None)
        drawn = answers(regex(pattern), 3, seed=seed, params=params, most=60)
    assert [(c.text, c.tokens, c.finish_reason) for c in plain] == [
        (c.text, c.tokens, c.finish_reason) for c in drawn
    ]
    for one, other in zip(plain, drawn, strict=True):
        for a, b in zip(one.draws, other.draws, strict=True):
            assert tuple(a) == pytest.approx(tuple(b), abs=1e-9)


def test_forced_tokens_need_no_logits() -> None:
    wanted = []

    class Watched(FakeBackend):
        def forward(self, feeds, cancelled=lambda: False):  # type: ignore[no-untyped-def]
            wanted.extend(feed.wanted for feed in feeds)
            super().forward(feeds, cancelled)

    backend = Watched(sequences=1 + SPARE_SEQUENCES)
    (done,) = answers(regex("abc[xy]def"), 1, backend=backend)
    assert re.fullmatch("abc[xy]def", done.text)
    reading, *steps = wanted  # a step each, the first with the prompt's last token
    assert reading is False
    assert steps == [False] * 3 + [True] + [False] * 3
    assert [draw.entropy_before > 0 for draw in done.draws] == [False] * 3 + [True] + [False] * 3


def test_masks_come_before_the_em_step() -> None:
    """The entropy is over legal tokens, and EM moves no probability to others."""
    (done,) = answers(regex("[a-f]{6}"), 1, params=SHARP)
    legal = list(b"abcdef")
    for i, draw in enumerate(done.draws):
        row = hashed([*b"say", *done.tokens[:i]])[legal].astype(np.float64)
        assert draw.entropy_before == pytest.approx(float(entropy(row)), abs=1e-7)
        after = SHARP.em.reference(row)  # type: ignore[union-attr]
        assert draw.entropy_after == pytest.approx(after.entropy_after, abs=1e-6)
        assert draw.steps == after.steps
        p = np.exp(row - row.max())
        assert draw.p_before == pytest.approx(p[legal.index(draw.token)] / p.sum(), abs=1e-7)
    assert any(draw.steps for draw in done.draws)


def test_draws_do_not_depend_on_the_samples_beside() -> None:
    together = answers(regex(PATTERNS[6]), 6)
    for i, each in enumerate(together):
        request = Request(WILD, Uniforms(1, 0, i), 200, constraint=regex(PATTERNS[6]))
        with Scheduler(BACKEND, 1) as runner:
            handle = runner.submit(Job(list(b"say"), [request]))
            while not runner.idle:
                runner.step()
            (alone,) = handle.result()
        assert (alone.text, alone.draws) == (each.text, each.draws)


def test_answers_with_and_without_constraints_side_by_side() -> None:
    free = Request(WILD, Uniforms(1, 0, 0), 20)
    bound = [Request(WILD, Uniforms(1, 0, i), 20, constraint=regex(p)) for i, p in enumerate(PATTERNS)]
    with Scheduler(BACKEND, 8) as runner:
        handles = [runner.submit(Job(list(b"say"), [r])) for r in (free, *bound[:7])]
        while not runner.idle:
            runner.step()
    (alone,) = answers(None, 1, most=20)
    assert handles[0].result()[0].draws == alone.draws
    assert alone.complete is None


# ------------------------------------------------------------------------------------------- how they end


def test_an_answer_that_is_cut_off_says_so() -> None:
    (done,) = answers(regex("a{50}"), 1, most=7)
    assert (done.text, done.finish_reason, done.complete) == ("a" * 7, "length", False)


def test_an_answer_that_is_whole_at_the_limit_ended_by_itself() -> None:
    (done,) = answers(regex("a{7}"), 1, most=7)
    assert (done.text, done.finish_reason, done.complete) == ("a" * 7, "stop", True)


def test_the_end_token_is_legal_only_where_the_answer_may_end() -> None:
    """An engine that would end at once must write the whole of it first."""
    backend = FakeBackend(saying(""), sequences=1 + SPARE_SEQUENCES)
    (done,) = answers(regex("(ab){3,}"), 1, backend=backend, params=SamplingParams(temperature=0.0))
    assert (done.text, done.finish_reason) == ("ababab", "stop")
    assert done.draws[-1].token == END


@pytest.mark.parametrize(
    ("pattern", "stop", "text", "complete"),
    [("abcd", "c", "ab", False), ("abc(d)?", "d", "abc", True), ("abcd", "zz", "abcd", True)],
)
def test_a_stop_string_ends_it_and_what_is_left_is_judged(
    pattern: str, stop: str, text: str, complete: bool
) -> None:
    found = [c for seed in range(8) for c in answers(regex(pattern), seed=seed, stop=(stop,))]
    stopped = [c for c in found if c.stop == stop] or found
    assert {(c.text, c.complete) for c in stopped} == {(text, complete)}
    assert any(c.stop for c in found) == (stop in pattern)


def test_an_answer_goes_on_where_it_was_begun() -> None:
    (done,) = answers(regex("(cat|dog)[sz]"), 1, begun=tuple(b"do"))
    assert done.text in ("gs", "gz")


# ------------------------------------------------------------------------------------------ what is refused

BAD = {
    Constraint("json_schema", "{"): "not JSON",
    Constraint("json_schema", "[]"): "an object, true or false",
    Constraint("json_schema", '{"type":"foo"}'): "Invalid type",
    Constraint("json_schema", "false"): "no text meets it",
    Constraint("json_schema", '{"type":"integer","minimum":5,"maximum":3}'): "Unsatisfiable",
    Constraint("json_schema", '{"$ref":"http://x/y"}'): "not present",
    Constraint("json_schema", '{"$ref":"#"}'): "no text meets it",
    Constraint("json_schema", '{"type":"array","uniqueItems":true}'): "uniqueItems",
    Constraint("json_schema", '{"uniqueItems":true,"x-guidance":{"lenient":true}}'): "uniqueItems",
    Constraint("json_schema", '{"items":' * 3000 + "{}" + "}" * 3000): "nested more than 100",
    Constraint("json_schema", json.dumps({"enum": ["x" * 2_000_000]})): "bytes; it may have 1,048,576",
    Constraint(
        "json_schema",
        json.dumps({"properties": {f"p{i}": {"enum": [f"v{j}" for j in range(50)]} for i in range(2500)}}),
    ): "too big",
    Constraint("regex", "(" * 5000 + ")" * 5000): "cannot be used",
    Constraint("regex", "(?=x)y"): "look-ahead",
    Constraint("grammar", "start: foo"): "unknown name",
    Constraint("grammar", "x"): "cannot be used",
    Constraint("grammar", "start: start"): "cannot be used",
    Constraint("grammar", "root ::= ("): "not GBNF",
}


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: f"{bad.kind} {bad.text[:24]}")
def test_what_cannot_be_used_is_one_line(bad: Constraint) -> None:
    with pytest.raises(UsageError) as caught:
        Constrainer(BACKEND).compiled(bad)
    assert BAD[bad] in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("hostile", [r"((a{0,100}){0,100}){0,100}", r"(a{1000}){1000}"])
def test_a_limit_that_is_reached_on_the_way_fails_the_answer_alone(hostile: str) -> None:
    """Beside it another goes on."""
    bad = Request(WILD, Uniforms(1), 300, constraint=regex(hostile))
    good = Request(WILD, Uniforms(1), 10, constraint=regex("a{9}"))
    with Scheduler(BACKEND, 2) as runner:
        handles = [runner.submit(Job(list(b"say"), [good]))]
        try:
            handles.append(runner.submit(Job(list(b"say"), [bad])))
        except UsageError as why:
            assert "cannot be used" in why.message  # noqa: PT017
        while not runner.idle:
            runner.step()
    assert handles[0].result()[0].text == "a" * 9
    for handle in handles[1:]:
        try:
            (done,) = handle.result()
        except EmlocalError as why:
            assert "too many" in why.message  # noqa: PT017
        else:
            assert done.finish_reason in ("length", "stop")


def test_gbnf_is_converted() -> None:
    grammar = Constraint("grammar", 'root ::= ("yes" | "no") "!"+\n')
    assert all(re.fullmatch("(yes|no)!+", c.text) for c in answers(grammar) if c.finish_reason == "stop")


def test_compiled_constraints_are_kept_and_their_number_is_bounded() -> None:
    from emlocal.generation.constraints import COMPILED

    constrainer = Constrainer(BACKEND)
    first = constrainer.compiled(regex("a"))
    assert constrainer.compiled(regex("a")) is first
    for i in range(COMPILED + 5):
        constrainer.compiled(regex(f"b{i}"))
    assert constrainer.compiled(regex("a")) is not first


def test_bits_beyond_the_vocabulary_are_not_set() -> None:
    legal = Constrainer(BACKEND).compiled(regex(".*")).legal()
    assert not np.unpackbits(legal, bitorder="little")[VOCABULARY:].any()
