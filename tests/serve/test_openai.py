"""OpenAI's own client against `emlocal serve`, with a real model, in a process of its own."""

import asyncio
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import httpx2 as httpx
import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI

from emlocal.models.resolve import GGUFModel

pytestmark = pytest.mark.real
ASK = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


def start(model: str, *flags: str) -> tuple[subprocess.Popen[str], str]:
    """A server, and its address once it answers."""
    command = [sys.executable, "-m", "emlocal", "serve", "-m", model, "--port", "0", "--threads", "1"]
    process = subprocess.Popen(
        [*command, "-c", "1024", *flags], stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if found := re.search(r"http://\S+/v1", line):
            return process, found[0].rstrip(",")
    raise AssertionError(said)


@pytest.fixture(scope="module")
def url(smollm2: GGUFModel) -> Iterator[str]:
    process, address = start(str(smollm2.path))
    yield address
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in said


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=url, api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def name(client: OpenAI) -> str:
    return client.models.list().data[0].id


def test_a_chat_and_its_stream(client: OpenAI, name: str) -> None:
    fields = {"model": name, "messages": ASK, "seed": 1, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**fields)
    text = whole.choices[0].message.content
    assert text is not None
    assert "Paris" in text
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = [*client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_several_answers_with_logprobs(client: OpenAI, name: str) -> None:
    found = client.chat.completions.create(
        model=name,
        messages=ASK,
        n=3,
        seed=2,
        max_tokens=12,
        temperature=1.0,
        logprobs=True,
        top_logprobs=5,
        extra_body={"em_inf": True},
    )
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    for choice in found.choices:
        assert choice.logprobs is not None
        entries = choice.logprobs.content or []
        assert b"".join(bytes(e.bytes or []) for e in entries).decode() == choice.message.content
        for entry in entries:
            assert len(entry.top_logprobs) == 5
            assert entry.logprob <= 0
            own = (entry.model_extra or {})["emlocal"]
            assert 0 <= own["entropy_after"] <= own["entropy_before"] <= math.log(49_152)
            for each in entry.top_logprobs:
                if (each.model_extra or {})["emlocal"]["token_id"] == own["token_id"]:
                    assert each.logprob == pytest.approx(entry.logprob, abs=1e-3)
    own = (found.model_extra or {})["emlocal"]
    assert own["entropy"]["touched"] > 0


def test_a_model_id_chooses_em(client: OpenAI, name: str) -> None:
    fields = {"messages": ASK, "seed": 3, "max_tokens": 16, "temperature": 1.0}
    plain = client.chat.completions.create(model=name, **fields)
    sharp = client.chat.completions.create(model=f"{name}:em-inf", **fields)
    touched = [(each.model_extra or {})["emlocal"]["entropy"]["touched"] for each in (plain, sharp)]
    assert touched[0] == 0 < touched[1]


def test_text_completions(client: OpenAI, name: str) -> None:
    fields = {"model": name, "prompt": "One, two, three, four,", "max_tokens": 6, "temperature": 0}
    text = client.completions.create(**fields, logprobs=2).choices[0].text
    assert "five" in text
    assert "".join(c.choices[0].text for c in client.completions.create(**fields, stream=True)) == text


def test_responses(client: OpenAI, name: str) -> None:
    fields = {"model": name, "input": ASK[0]["content"], "max_output_tokens": 24, "temperature": 0}
    whole = client.responses.create(**fields)
    assert "Paris" in whole.output_text
    with client.responses.stream(**fields) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(deltas) == whole.output_text
        assert stream.get_final_response().output_text == whole.output_text


def test_errors_are_of_their_classes(client: OpenAI, name: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": "x y " * 2_000}])
    assert caught.value.code == "context_length_exceeded"
    assert "1,024" in str(caught.value)
    with pytest.raises(BadRequestError):
        client.chat.completions.create(model=name, messages=ASK, extra_body={"em_treshold": 0.1})
    with pytest.raises(NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=ASK)


def test_many_at_once(url: str, name: str) -> None:
    async def run() -> list[str | None]:
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

            async def ask(number: int) -> str | None:
                said = [{"role": "user", "content": f"Say the number {number}."}]
                fields = {"model": name, "messages": said, "seed": 1, "max_tokens": 10}
                if number % 2:
                    found = await client.chat.completions.create(**fields)
                    return found.choices[0].message.content
                stream = await client.chat.completions.create(**fields, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(ask(number) for number in range(8)))

    texts = asyncio.run(run())
    assert all(texts)


def test_sigterm_lets_a_stream_finish(smollm2: GGUFModel) -> None:
    process, url = start(str(smollm2.path))
    with httpx.Client(timeout=60) as client:
        body = {"messages": ASK, "max_tokens": 60, "stream": True, "seed": 1, "logit_bias": {"2": -100}}
        with client.stream("POST", f"{url}/chat/completions", json=body) as found:
            lines = found.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
    assert process.wait(30) == 0


def test_a_bind_for_others_needs_a_key(smollm2: GGUFModel) -> None:
    command = [sys.executable, "-m", "emlocal", "serve", "-m", str(smollm2.path), "--host", "0.0.0.0"]  # noqa: S104
    done = subprocess.run([*command, "--port", "0"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--api-key-file" in done.stderr
