"""From lines to rows, on the engine without a model."""

import io
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from emlocal.backends.fake import CHAT_TEMPLATE, END, VOCABULARY, FakeBackend, hashed, saying
from emlocal.batch.keys import Keys
from emlocal.batch.lines import Item, is_error, key_of, read_lines
from emlocal.batch.run import Batch
from emlocal.errors import CancelledError
from emlocal.generation import Scheduler
from emlocal.methods import Chosen
from emlocal.settings import EMInf, SamplingParams
from tests.batch.batches import batch, batch_on, engine, row, rows, settings, timeless

LINES: list[Any] = [
    {"custom_id": f"q{i}", "prompt": "say something " + "long " * (i * 7 % 23), "max_tokens": 1 + i * 5 % 40}
    for i in range(30)
]


def template(fake: FakeBackend, text: str) -> None:
    object.__setattr__(fake.info, "chat_template", text)


# ------------------------------------------------------------------------------------------------ the forms


def test_a_row_has_all_that_was_promised() -> None:
    found = row([{"custom_id": "a", "prompt": "hi"}], settings(max_tokens=50), script=saying("Hello!"))
    assert found.pop("seconds") >= 0
    assert len(found.pop("key")) == 32
    scores = found.pop("scores")
    assert scores["tokens"] == 7
    assert scores["answer_entropy"] is None  # there is neither a box nor a number
    assert found.pop("confidence") == pytest.approx(math.exp(scores["mean_log_probability"]), abs=1e-6)
    assert (found.pop("confidence_from"), found.pop("calibrated")) == ("mean-log-probability", False)
    assert set(found.pop("entropy")) == {"mean_before", "mean_after", "touched", "changed", "mean_steps"}
    assert found == {
        "custom_id": "a",
        "text": "Hello!",
        "finish_reason": "stop",
        "prompt_tokens": len("[user]hi\n[assistant]"),
        "cached_tokens": 0,
        "completion_tokens": 6,
        "forward_passes": 8,  # one reads the prompt, and one each the tokens and the end
        "method": "sample",
        "model": "fake",
        "seed": 0,
    }


def test_the_forms_ask_the_same() -> None:
    messages = [{"role": "user", "content": "hi"}]
    forms = [
        "hi",
        {"prompt": "hi", "custom_id": "b"},
        {"messages": messages, "custom_id": "c"},
        {"custom_id": "d", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": messages}},
    ]
    found = rows(forms, settings(), script=saying("Hello!"))
    assert {each["text"] for each in found} == {"Hello!"}
    assert {each["prompt_tokens"] for each in found} == {len("[user]hi\n[assistant]")}


def test_raw_prompts_go_without_template() -> None:
    for lines, how in [
        ([{"prompt": "hi", "raw": True}], settings()),
        ([{"prompt": "hi"}], settings(raw=True)),
        ([{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "hi"}}], settings()),
    ]:
        assert row(lines, how)["prompt_tokens"] == 2


def test_without_a_chat_template_single_questions_are_sent_as_they_are() -> None:
    warnings: list[str] = []
    fake = engine(2, saying("Hello!"))
    fake.info = replace(fake.info, chat_template=None)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    lines = [
        {"custom_id": "a", "prompt": "hi"},
        {"custom_id": "b", "messages": messages[:1]},
        {"custom_id": "c", "messages": [*messages, messages[0]]},
    ]
    items = read_lines(io.BytesIO(b"".join(json.dumps(line).encode() + b"\n" for line in lines)))
    running = Batch(fake, items, settings(), runner=Scheduler(fake, 2), warn=warnings.append)
    found = {each["custom_id"]: each for each in running.rows()}
    assert [found[name]["prompt_tokens"] for name in "ab"] == [2, 1]
    assert "no chat template" in found["c"]["error"]
    assert warnings == ["fake has no chat template; prompts are sent as they are (--raw)"]


def test_a_system_message_is_for_lines_without_one() -> None:
    own = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "x"}]
    lines = [{"custom_id": "a", "prompt": "x"}, {"custom_id": "b", "messages": own}]
    found = {r["custom_id"]: r["prompt_tokens"] for r in rows(lines, settings(system="be very kind"))}
    assert found["a"] == len("[system]be very kind\n[user]x\n[assistant]")
    assert found["b"] == len("[system]be brief\n[user]x\n[assistant]")


def test_other_fields_are_kept_if_asked() -> None:
    line = {"prompt": "hi", "gold": {"answer": [1, None]}, "temperature": 0}
    assert row([line], settings(keep=True))["kept"] == {"gold": {"answer": [1, None]}}
    assert "kept" not in row([line], settings())
    assert "kept" not in row([{"prompt": "hi"}], settings(keep=True))


@pytest.mark.parametrize("samples", [1, 3])
def test_openai_rows_have_openai_s_shape(samples: int) -> None:
    lines = [{"custom_id": "a", "prompt": "hi", "gold": 1}, {"custom_id": "b", "prompt": 5}]
    how = settings(Chosen(samples=samples), openai=True, keep=True, max_tokens=5)
    good, bad = sorted(rows(lines, how), key=lambda r: r["custom_id"])
    assert set(good) == set(bad) == {"id", "custom_id", "response", "error"}
    assert good["error"] is None
    assert (good["response"]["status_code"], good["custom_id"]) == (200, "a")
    body = good["response"]["body"]
    assert body["object"] == "chat.completion"
    assert body["model"] == "fake"
    assert abs(body["created"] - time.time()) < 60
    assert [choice["index"] for choice in body["choices"]] == list(range(samples))
    for choice in body["choices"]:
        assert choice["message"]["role"] == "assistant"
        assert isinstance(choice["message"]["content"], str)
        assert choice["finish_reason"] in ("stop", "length")
    usage = body["usage"]
    assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]
    assert body["emlocal"]["kept"] == {"gold": 1}
    assert bad["response"] is None
    assert bad["error"] == {
        "code": "invalid_request", "message": "prompt is a number; it must be a text", "line": 2,
    }  # fmt: skip
    assert [is_error(good), is_error(bad)] == [False, True]
    assert key_of(good) == good["id"] != key_of(bad) == bad["id"]


# -------------------------------------------------------------------------------------- order and batching


@pytest.mark.parametrize(
    "how",
    [
        settings(params=SamplingParams(em=EMInf(), temperature=1.0)),
        settings(Chosen("self-consistency", samples=3)),
        settings(Chosen("sequential-refinement")),
    ],
    ids=lambda how: how.method.name or "em-inf",
)
def test_rows_do_not_depend_on_how_many_run_at_once(how: Any) -> None:
    alone = timeless(rows(LINES[:12], how, parallel=1))
    assert len(alone) == 12
    for parallel in (3, 16):
        assert timeless(rows(LINES[:12], how, parallel=parallel)) == alone


def test_draws_do_not_depend_on_the_other_lines() -> None:
    whole = {r["custom_id"]: r["text"] for r in rows(LINES)}
    for line in LINES[5:8]:
        assert row([line])["text"] == whole[line["custom_id"]]
    assert row([LINES[5]], settings(seed=1))["text"] != whole["q5"]
    assert row([LINES[5] | {"seed": 1}])["seed"] == 1


@pytest.mark.parametrize("ahead", [0, 1, 4, 1024])
def test_ordered_rows_and_how_many_wait(ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emlocal.batch.tasks.AHEAD", ahead)
    lines = [*LINES[:10], b"broken", *LINES[10:], {"prompt": ""}]
    lines[0] = LINES[0] | {"max_tokens": 300, "logit_bias": {str(END): -100}}  # all others wait for the first
    running = batch(lines, settings(ordered=True), parallel=4)
    found, most = [], 0
    for each in running.rows():
        most = max(most, len(running._held))
        found.append(each.get("line") or int(each["custom_id"].removeprefix("q")))
    assert found == [*range(10), 11, *range(10, 30), 32]
    assert most <= ahead + 1  # the row about to be given, and those that wait
    unordered = [r["custom_id"] for r in rows(lines, settings(), parallel=4)]
    assert unordered.index("q0") > 5


def test_lines_are_read_when_there_is_a_place() -> None:
    taken = 0

    def endless() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield Item(taken, None, None, f"prompt {taken}")

    running = batch_on(engine(4), endless(), settings(), 4).rows()
    for _ in range(30):
        next(running)
    assert taken <= 30 + 4
    running.close()


def test_stopping() -> None:
    running = batch(LINES)
    with pytest.raises(CancelledError):
        list(running.rows(lambda: running.tally.answered >= 5))
    assert running.runner.backend.open() == 0
    assert 5 <= running.tally.answered < 30


# ---------------------------------------------------------------------------------------------------- names


def test_lines_without_a_name_are_named_by_their_content() -> None:
    lines = ["same", "same", {"prompt": "same"}, {"prompt": "same", "temperature": 0}, {"prompt": "other"}]
    found = rows(lines, settings(ordered=True))
    names = [r["custom_id"] for r in found]
    assert names[1:3] == [f"{names[0]}-2", f"{names[0]}-3"]
    assert len(set(names)) == len({r["key"] for r in found}) == 5
    assert len({r["text"] for r in found[:3]}) == 3  # each has its own draws
    assert timeless(found) == timeless(rows(lines, settings(ordered=True)))


def test_a_name_given_twice_is_an_error_of_the_later_line() -> None:
    lines = [{"custom_id": "a", "prompt": p} for p in ("x", "y", "x")]
    found = rows(lines, settings(ordered=True))
    assert [is_error(r) for r in found] == [False, True, True]
    assert found[1]["error"] == "the custom_id 'a' repeats that of an earlier line"
    assert [r["custom_id"] for r in found] == ["a", "a", "a"]
    assert len({r["key"] for r in found}) == 3


def test_bad_lines_with_the_same_content_have_rows_of_their_own() -> None:
    found = rows([b"broken", b"broken", b"{}"])
    assert len({r["key"] for r in found}) == 3
    assert [r["line"] for r in found] == [1, 2, 3]


def test_done_lines_are_passed_over() -> None:
    lines = [*LINES, "same", "same", b"broken", {"custom_id": "q3", "prompt": "again"}]
    whole = rows(lines)
    with Keys() as done:
        for each in whole[::2]:
            done.add(each["key"])
        running = batch(lines, done=done)
        rest = list(running.rows())
        assert running.tally.skipped == len(whole[::2])
    assert timeless(rest) == timeless(whole[1::2])


def test_keys_tell_settings_apart() -> None:
    line = {"custom_id": "a", "prompt": "x"}
    keys = {
        row([each], how)["key"]
        for each in (line, line | {"seed": 1}, line | {"prompt": "y"}, line | {"raw": True})
        for how in (settings(), settings(fingerprint="other model"))
    }
    assert len(keys) == 8


# --------------------------------------------------------------------------------------------------- errors


def test_what_cannot_be_answered_is_an_error_row_and_others_go_on() -> None:
    lines = [
        {"custom_id": "long", "prompt": "x" * 500},
        b"broken",
        {"custom_id": "hot", "prompt": "x", "temperature": 101},
        {"custom_id": "bias", "prompt": "x", "logit_bias": {"300": 1}},
        {"custom_id": "huge", "prompt": "x", "top_k": 10**30, "seed": 10**30},
        {"custom_id": "preset", "prompt": "x", "em_preset": ["paper"]},
        {"custom_id": "good", "prompt": "x"},
    ]
    running = batch(lines, settings(max_tokens=4, ordered=True), context=256)
    found = list(running.rows())
    said = {r["custom_id"] or f"line {r['line']}": r.get("error") for r in found}
    assert said["long"].startswith("the prompt has 518 tokens; the context holds 256")
    assert said["line 2"].startswith("not JSON")
    assert said["hot"] == "temperature is 101; it must be between 0 and 100"
    assert said["bias"] == "logit_bias names token 300; the model has 257"
    assert "must be" in said["huge"]
    assert said["preset"].startswith('em_preset is ["paper"]')
    assert said["good"] is None
    assert (running.tally.answered, running.tally.errors) == (1, 6)


def test_what_the_template_refuses_is_an_error_row() -> None:
    running = batch([{"custom_id": "a", "prompt": "refuse"}, {"custom_id": "b", "prompt": "ok"}], settings())
    refusing = "{% if 'refuse' in messages[0].content %}{{ raise_exception('no!') }}{% endif %}"
    template(running.runner.backend, refusing + CHAT_TEMPLATE)  # type: ignore[arg-type]
    found = {r["custom_id"]: r.get("error") for r in running.rows()}
    assert found == {"a": "the model's chat template refuses this conversation: no!", "b": None}
    broken = batch([{"custom_id": "a", "prompt": "x"}], settings())
    template(broken.runner.backend, "{% for %}")  # type: ignore[arg-type]
    assert "chat template fails" in next(broken.rows())["error"]


def test_a_row_of_logits_that_is_no_distribution_fails_alone() -> None:
    def script(tokens: Sequence[int]) -> np.ndarray:
        bad = b"poison" in bytes(t for t in tokens if t < END)
        return np.full(VOCABULARY, np.nan, dtype=np.float32) if bad else hashed(tokens)

    lines = [{"custom_id": "a", "prompt": "poison"}, {"custom_id": "b", "prompt": "ok"}]
    found = {r["custom_id"]: is_error(r) for r in rows(lines, settings(), script=script)}
    assert found == {"a": True, "b": False}


def test_the_tally() -> None:
    lines = [{"prompt": "one"}, {"prompt": "two", "max_tokens": 2}, b"broken"]
    running = batch(lines, settings(), script=saying("Hello!"))
    assert sorted(r.get("finish_reason", "") for r in running.rows()) == ["", "length", "stop"]
    assert vars(running.tally) == {
        "answered": 2, "errors": 1, "skipped": 0, "cut_off": 1, "abstained": 0, "votes_lost": 0,
    }  # fmt: skip
    assert running.runner.counters.generated_tokens == 7 + 2


def test_questions_run_nothing() -> None:
    running = batch([*LINES[:3], b"broken", {"prompt": "x", "min_p": 2}])
    asked = [(task.line, task.error, len(tokens)) for task, tokens in running.questions()]
    assert [line for line, error, _ in asked if error] == [4, 5]
    assert asked[0][2] == len("[user]say something \n[assistant]")
    assert isinstance(running.runner.backend, FakeBackend)
    assert running.runner.backend.fed == 0
    assert json.dumps(asked)
