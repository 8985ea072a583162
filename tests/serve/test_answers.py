"""What the endpoints answer, on the engine without a model."""

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from emlocal.backends.fake import CHAT_TEMPLATE, saying
from tests.serve.servers import HELLO, Running, endless, running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def speaker() -> Iterator[Running]:
    """Says "The answer is 42." to everything."""
    with running(saying("The answer is 42.")) as found:
        yield found


def test_a_chat_has_the_shape_that_clients_know(speaker: Running) -> None:
    found = speaker.chat(model="fake", seed=7)
    assert found["object"] == "chat.completion"
    assert found["id"].startswith("chatcmpl-")
    [choice] = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": "The answer is 42."}
    assert choice["finish_reason"] == "stop"
    usage = found["usage"]
    assert usage["completion_tokens"] == len("The answer is 42.")
    assert usage["prompt_tokens"] == len("[user]Hello\n[assistant]")
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    own = found["emlocal"]
    assert own["seed"] == 7
    assert 0 < own["confidence"] <= 1
    assert own["scores"]["tokens"] == usage["completion_tokens"] + 1
    assert found["system_fingerprint"] == "emlocal-test"


def test_a_stream_says_the_same(speaker: Running) -> None:
    *chunks, done = speaker.stream(seed=7, stream_options={"include_usage": True})
    assert done == "[DONE]"
    *chunks, usage = chunks
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len("The answer is 42.")
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "The answer is 42."
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["emlocal"]["seed"] == 7
    assert {c["id"] for c in [*chunks, usage]} == {usage["id"]}
    assert all("usage" not in c for c in speaker.stream(seed=7)[:-1])


def test_several_answers(server: Running) -> None:
    found = server.chat(n=3, seed=1, max_tokens=12)
    texts = [choice["message"]["content"] for choice in found["choices"]]
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    assert len({*texts}) == 3
    streamed = ["", "", ""]
    for chunk in server.stream(n=3, seed=1, max_tokens=12)[:-1]:
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == texts


def test_logprobs_are_exact_and_have_the_entropies(server: Running) -> None:
    [choice] = server.chat(seed=3, max_tokens=5, em_inf=True, logprobs=True, top_logprobs=4, temperature=1)[
        "choices"
    ]
    entries = choice["logprobs"]["content"]
    assert bytes(b for e in entries for b in e["bytes"]).decode(errors="replace")[:1]
    for entry in entries:
        own = entry["emlocal"]
        assert 0 <= own["entropy_after"] <= own["entropy_before"] <= math.log(257)
        top = entry["top_logprobs"]
        assert len(top) == 4
        assert [each["logprob"] for each in top] == sorted((e["logprob"] for e in top), reverse=True)
        for each in top:
            if each["emlocal"]["token_id"] == own["token_id"]:
                assert each["logprob"] == pytest.approx(entry["logprob"], abs=1e-5)
                assert each["emlocal"]["logprob_after"] == pytest.approx(own["logprob_after"], abs=1e-3)
    assert any(entry["emlocal"]["steps"] for entry in entries)
    chunks = server.stream(seed=3, max_tokens=5, em_inf=True, logprobs=True, top_logprobs=4, temperature=1)[
        :-1
    ]
    streamed = [e for c in chunks if (found := c["choices"][0]["logprobs"]) for e in found["content"]]
    assert streamed == entries


def test_the_first_row_of_alternatives_is_that_of_the_logits(server: Running) -> None:
    import numpy as np

    from emlocal.backends.fake import hashed

    [choice] = server.chat(seed=3, max_tokens=1, logprobs=True, top_logprobs=20)["choices"]
    row = hashed(list(b"[user]Hello\n[assistant]")).astype(np.float64)
    expected = row - row.max() - math.log(np.exp(row - row.max()).sum())
    [entry] = choice["logprobs"]["content"]
    assert [e["emlocal"]["token_id"] for e in entry["top_logprobs"]] == [*np.argsort(-expected)[:20]]
    assert entry["top_logprobs"][0]["logprob"] == pytest.approx(expected.max(), abs=1e-5)


def test_text_completions(speaker: Running) -> None:
    found = speaker.post("/v1/completions", {"prompt": "[assistant]", "logprobs": 2}).json()
    assert found["object"] == "text_completion"
    [choice] = found["choices"]
    assert choice["text"] == "The answer is 42."
    assert choice["logprobs"]["tokens"] == [*"The answer is 42."]
    assert choice["logprobs"]["text_offset"] == [*range(len(choice["text"]))]
    assert len(choice["logprobs"]["top_logprobs"][0]) == 2
    chunks = speaker.stream("/v1/completions", prompt=["[assistant]"])[:-1]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "The answer is 42."


def test_responses(speaker: Running) -> None:
    body = {"input": "Hello", "instructions": "Be brief.", "max_output_tokens": 200}
    found = speaker.post("/v1/responses", body).json()
    assert found["status"] == "completed"
    assert found["output"][0]["content"][0]["text"] == "The answer is 42."
    assert found["usage"]["total_tokens"] == found["usage"]["input_tokens"] + found["usage"]["output_tokens"]
    events = speaker.stream("/v1/responses", **body)
    assert [e["sequence_number"] for e in events] == [*range(len(events))]
    deltas = [e["delta"] for e in events if e["type"] == "response.output_text.delta"]
    assert "".join(deltas) == "The answer is 42."
    assert events[0]["type"] == "response.created"
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "The answer is 42."
    cut = speaker.post("/v1/responses", {**body, "max_output_tokens": 3}).json()
    assert cut["status"] == "incomplete"
    assert cut["incomplete_details"] == {"reason": "max_output_tokens"}


def test_a_vote_streams_its_choice_at_the_end(speaker: Running) -> None:
    whole = speaker.chat(model="fake:vote", samples=3, seed=2)
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["The answer is 42."]
    assert whole["emlocal"]["method"] == "vote"
    assert whole["emlocal"]["answer"] == "42"
    assert len(whole["emlocal"]["samples"]) == 3
    chunks = speaker.stream(model="fake:vote", samples=3, seed=2)[:-1]
    texts = [text for c in chunks if (text := c["choices"][0]["delta"].get("content"))]
    assert texts == ["The answer is 42."]
    assert chunks[-1]["emlocal"]["answer"] == "42"


def test_settings_of_em_and_methods_by_their_names(server: Running) -> None:
    plain = server.chat(seed=5, max_tokens=8)
    assert plain["emlocal"]["entropy"]["touched"] == 0
    for fields in (
        {"em_inf": True},
        {"em_preset": "paper"},
        {"model": "fake:em-inf"},
        {"method": "em-inf"},
        {"em_inf": True, "em_threshold": 0.2},
    ):
        found = server.chat(seed=5, max_tokens=8, **fields)
        assert found["emlocal"]["entropy"]["touched"] > 0, fields
    found = server.chat(method="vote", samples=2, beta=0.5, max_tokens=8)
    assert found["emlocal"]["method"] == "vote"
    listed = server.chat(max_tokens=4, seed=1, entropies=True)["emlocal"]["entropies"]
    assert len(listed["before"]) == len(listed["after"]) >= 1


def test_stop_and_bias(server: Running) -> None:
    text = server.text(seed=9, max_tokens=30, temperature=1, logit_bias={"256": -100})
    assert len(text) >= 3
    stop = text[2]
    assert stop not in server.text(
        seed=9, max_tokens=30, temperature=1, logit_bias={"256": -100}, stop=[stop]
    )
    assert server.text(max_tokens=3, logit_bias={"97": 1000}) == "aaa"


SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "y"]}},
    "required": ["a"],
    "additionalProperties": False,
}


def test_answers_in_a_form(server: Running) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}
    fields = {"response_format": form, "logprobs": True, "top_logprobs": 2, "seed": 1}
    whole = server.chat(**fields)
    text = whole["choices"][0]["message"]["content"]
    assert json.loads(text)["a"] in ("x", "y")
    assert whole["emlocal"]["complete"] is True
    chunks = server.stream(**fields)[:-1]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == text
    body = {"input": "Hello", "text": {"format": {"type": "json_schema", "name": "it", "schema": SCHEMA}}}
    found = server.post("/v1/responses", body).json()
    assert json.loads(found["output"][0]["content"][0]["text"])["a"] in ("x", "y")


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def test_tools_are_called() -> None:
    with running(saying(CALL)) as server:
        [choice] = server.chat(tools=[TOOL], tool_choice="auto")["choices"]
        assert choice["finish_reason"] == "tool_calls"
        [call] = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "weather"
        assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
        chunks = server.stream(tools=[TOOL])[:-1]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        [streamed] = [calls for delta in deltas if (calls := delta.get("tool_calls"))]
        assert streamed[0]["index"] == 0
        assert streamed[0]["function"] == call["function"]
        assert not any(delta.get("content") for delta in deltas)
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
        assert server.chat()["choices"][0]["finish_reason"] == "stop"


def test_a_call_can_be_required() -> None:
    """Of a model that would rather write letters."""
    city = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    other = {"type": "function", "function": {"name": "clock"}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": city}}
    tool["function"]["parameters"]["additionalProperties"] = False
    fields = {"tools": [other, tool], "tool_choice": {"type": "function", "function": {"name": "weather"}}}
    with running(endless) as server:
        [choice] = server.chat(**fields)["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        [call] = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "weather"
        assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")
        error = server.post(
            "/v1/chat/completions", {"messages": HELLO, "tools": [other], "tool_choice": "some"}
        )
        assert error.status_code == 400
        assert error.json()["error"]["param"] == "tool_choice"


def test_thoughts_are_apart() -> None:
    template = CHAT_TEMPLATE + "{# <think></think> #}"
    with running(saying("<think>Let me see.</think>It is 4."), template=template) as server:
        [choice] = server.chat()["choices"]
        assert choice["message"]["reasoning_content"].strip() == "Let me see."
        assert choice["message"]["content"].strip() == "It is 4."
        deltas = [chunk["choices"][0]["delta"] for chunk in server.stream()[:-1]]
        thought = "".join(delta.get("reasoning_content", "") for delta in deltas)
        said = "".join(delta.get("content", "") for delta in deltas)
        assert (thought.strip(), said.strip()) == ("Let me see.", "It is 4.")
        found = server.chat()
        assert found["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0


def test_the_model_list(server: Running) -> None:
    with server.client() as client:
        ids = [each["id"] for each in client.get("/v1/models").json()["data"]]
        assert ids == ["fake", "fake:em-inf", "fake:vote"]
        assert client.get("/v1/models/fake:vote").json()["id"] == "fake:vote"
        assert client.get("/v1/models/other").status_code == 404
        assert client.get("/health").json() == {"status": "ok"}


def test_tokenize(server: Running) -> None:
    found = server.post("/tokenize", {"prompt": "aé", "with_pieces": True}).json()
    assert found["tokens"] == [97, 0xC3, 0xA9]
    assert found["count"] == 3
    found = server.post("/tokenize", {"messages": HELLO}).json()
    assert bytes(found["tokens"]) == b"[user]Hello\n[assistant]"


def test_metrics_count(server: Running) -> None:
    def value(name: str) -> float:
        with server.client() as client:
            text = client.get("/metrics").text
        lines = [line for line in text.split("\n") if line.startswith(f"{name} ")]
        return float(lines[0].split()[-1]) if lines else 0.0

    chats = 'emlocal_requests_total{endpoint="/v1/chat/completions",status="200"}'
    before, tokens = value(chats), value("emlocal_generated_tokens_total")
    first = value("emlocal_first_token_seconds_count")
    server.chat(max_tokens=5, logit_bias={"256": -100})
    assert value(chats) == before + 1
    assert value("emlocal_generated_tokens_total") == tokens + 5
    assert value("emlocal_first_token_seconds_count") == first + 1
    assert value("emlocal_entropy_before_nats_sum") > 0


def test_a_later_turn_reads_only_what_is_new(server: Running) -> None:
    messages = [{"role": "user", "content": "x" * 200}]
    first = server.chat(messages=messages, max_tokens=3, seed=1)
    answer = {"role": "assistant", "content": "ok"}
    turn = [*messages, answer, {"role": "user", "content": "more"}]
    second = server.chat(messages=turn, max_tokens=3, seed=1)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] < 100
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 200


@pytest.mark.parametrize("fields", [{}, {"em_inf": True}, {"n": 3}, {"method": "vote", "samples": 3}])
def test_the_same_request_has_the_same_answer_among_sixteen_others(fields: dict[str, object]) -> None:
    request = {"seed": 11, "max_tokens": 40, "temperature": 1.0, **fields}
    with running(endless, parallel=6, seconds=0.0005) as server:
        alone = server.chat(**request)["choices"]

        def ask(number: int) -> object:
            if number % 4 == 0:
                return server.chat(**request)["choices"]
            other = [{"role": "user", "content": f"question {number}" * number}]
            return server.text(messages=other, seed=number, max_tokens=20 + number)

        with ThreadPoolExecutor(17) as pool:
            found = [*pool.map(ask, range(17))]
        assert all(found[number] == alone for number in range(0, 17, 4))


def test_without_a_seed_answers_differ_and_the_seed_is_told(server: Running) -> None:
    one, two = (server.chat(max_tokens=20, temperature=1) for _ in range(2))
    assert one["emlocal"]["seed"] != two["emlocal"]["seed"]
    again = server.text(max_tokens=20, temperature=1, seed=one["emlocal"]["seed"])
    assert again == one["choices"][0]["message"]["content"]


def test_flags_are_the_defaults_of_requests() -> None:
    with running(given={"seed": 4, "em_inf": True, "max_tokens": 6}) as server:
        found = server.chat(logit_bias={"256": -100})
        assert found["usage"]["completion_tokens"] == 6
        assert found["emlocal"]["seed"] == 4
        assert found["emlocal"]["entropy"]["touched"] > 0
        assert server.chat(em_inf=False)["emlocal"]["entropy"]["touched"] == 0
        assert server.chat(max_tokens=2, logit_bias={"256": -100})["usage"]["completion_tokens"] == 2
