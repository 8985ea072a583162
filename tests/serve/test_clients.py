"""Requests that other programs sent, replayed; and OpenAI's client where SmolLM2 would not do as it is told.

The files in `clients/` were recorded from the real programs against a running `emlocal serve`. So a change
here that breaks one of these programs is seen without installing it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from pydantic import BaseModel

from emlocal.backends.fake import saying
from tests.serve.servers import Running, running

DOG = '{"name": "Fido", "age": 3}'
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ASK: list[Any] = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
RECORDED: list[tuple[str, dict[str, Any], dict[str, str]]] = [
    (f"{path.stem}: {each['what']}", each, found["headers"])
    for path in sorted((Path(__file__).parent / "clients").glob("*.json"))
    for found in [json.loads(path.read_text())]
    for each in found["requests"]
]


class Dog(BaseModel):
    name: str
    age: int


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """Says the same JSON to everything, one character a token."""
    with running(saying(DOG)) as found:
        yield found


@pytest.fixture(scope="module")
def caller() -> Iterator[Running]:
    """Calls a tool, whatever it is asked."""
    with running(saying(CALL)) as found:
        yield found


@pytest.mark.parametrize(
    ("recorded", "headers"), [each[1:] for each in RECORDED], ids=[name for name, *_ in RECORDED]
)
def test_a_recorded_request(server: Running, recorded: dict[str, Any], headers: dict[str, str]) -> None:
    body = recorded["body"]
    if "prompt" in body:
        body = {**body, "prompt": begun(body["prompt"])}
    response = server.post(recorded["path"], body, headers=headers)
    assert response.status_code == recorded["status"], response.text
    if recorded["status"] != 200:
        error = response.json()["error"]
        assert error["param"] == recorded["param"]
        assert error["message"]
        return
    most = body.get("max_tokens") or body.get("max_completion_tokens") or body["max_output_tokens"]
    values = events(response.text) if body.get("stream") else [response.json()]
    if must_call(body):
        assert text_of(recorded["path"], values, stream=body.get("stream")) != DOG[:most]
        return
    assert text_of(recorded["path"], values, stream=body.get("stream")) == DOG[:most]
    if body.get("stream_options"):
        assert values[-1]["usage"]["completion_tokens"] > 0


def must_call(body: dict[str, Any]) -> bool:
    return body.get("tool_choice") not in (None, "auto", "none")


def begun(prompt: Any) -> Any:
    """Returns a prompt after which this engine speaks: it waits for the mark of a chat's answer."""
    return [begun(each) for each in prompt] if isinstance(prompt, list) else f"{prompt}[assistant]"


def events(text: str) -> list[dict[str, Any]]:
    """Returns the values of a stream that ends as it should."""
    lines = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
    if lines[-1] == "[DONE]":
        lines.pop()
    else:  # of /v1/responses
        assert json.loads(lines[-1])["type"] in ("response.completed", "response.incomplete")
    return [json.loads(line) for line in lines]


def text_of(path: str, values: list[dict[str, Any]], *, stream: bool | None) -> str:
    """Returns the text of the first answer."""
    if path == "/v1/responses" and stream:
        return "".join(v["delta"] for v in values if v["type"] == "response.output_text.delta")
    if path == "/v1/responses":
        text: str = values[0]["output"][0]["content"][0]["text"]
        return text
    found = ""
    for value in values:
        for choice in value["choices"][:1]:
            said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
            found += said.get("content") or ""
    return found


def test_recorded_tools_are_called(caller: Running) -> None:
    """The requests with tools again, on a model that calls one."""
    asked = 0
    for name, each, headers in RECORDED:
        body = each["body"]
        if each["status"] == 200 and body.get("tools") and not body["stream"] and not must_call(body):
            body = {**body, "max_completion_tokens": 200}
            [choice] = caller.post(each["path"], body, headers=headers).json()["choices"]
            calls = choice["message"].get("tool_calls")
            assert bool(calls) == (body.get("tool_choice") != "none"), name
            asked += 1
    assert asked >= 4


@pytest.mark.parametrize(
    ("tool", "arguments"), [("Dog", {"name": "Fido", "age": 3}), ("weather", {"city": "Paris"})]
)
def test_recorded_calls_that_must_be(tool: str, arguments: dict[str, Any]) -> None:
    bodies = [each["body"] for _, each, _ in RECORDED if must_call(each["body"])]
    [body] = [body for body in bodies if body["tools"][0]["function"]["name"] == tool]
    called = json.dumps({"name": tool, "arguments": arguments})
    with running(saying(called)) as server:
        found = server.post("/v1/chat/completions", {**body, "max_completion_tokens": 200}).json()
    [call] = found["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == tool
    assert json.loads(call["function"]["arguments"]) == arguments


def test_openais_client_parses_an_answer_in_a_form(server: Running) -> None:
    with client_of(server) as client:
        found = client.chat.completions.parse(model="fake", messages=ASK, response_format=Dog)
        assert found.choices[0].message.parsed == Dog(name="Fido", age=3)
        assert client.responses.parse(model="fake", input="Hello", text_format=Dog).output_parsed == Dog(
            name="Fido", age=3
        )


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_reads_calls_of_tools(caller: Running, stream: bool) -> None:
    fields: dict[str, Any] = {"model": "fake", "messages": ASK, "tools": [TOOL]}
    with client_of(caller) as client:
        if stream:
            chunks = [*client.chat.completions.create(**fields, stream=True)]
            calls = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or ()]
        else:
            calls = client.chat.completions.create(**fields).choices[0].message.tool_calls
    [call] = calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    assert call.id


def client_of(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
