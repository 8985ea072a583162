"""Batches on a server: lines become requests, responses become rows.

The lines' keys, the order of rows and the journal are those of a batch on an engine. The rows are not made by
`batch.lines.own_row`, which needs every draw of an answer: a row here has what the server sent, and lacks the
rest.
"""

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Literal

from emlocal.batch.keys import Keys, Places
from emlocal.batch.lines import BadLine, Item, Row
from emlocal.batch.tasks import Task, Tasks, said_in
from emlocal.cancel import never
from emlocal.errors import CancelledError, EmlocalError, UsageError
from emlocal.remote import vllm
from emlocal.remote.client import CHAT, TEXT, Client, ServerError
from emlocal.settings import Plan
from emlocal.settings.constraint import NAMES as CONSTRAINT_NAMES
from emlocal.settings.resolve import LINE

_LOOK_SECONDS = 0.05  # between two checks of `cancelled`
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds before another try
OPENAI = {
    "temperature": "temperature",
    "top_p": "top_p",
    "max_tokens": "max_tokens",
    "seed": "seed",
    "stop": "stop",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "logit_bias": "logit_bias",
    "json_schema": "response_format",
    "reasoning_effort": "reasoning_effort",
}
"""The settings that any server knows, by emlocal's names, with OpenAI's."""
Kind = Literal["emlocal", "vllm", "openai"]
"""What a server knows: every setting, OpenAI's with EM's and `vllm.SAMPLING`, or OpenAI's alone."""


@dataclass(frozen=True)
class Remote:
    """A server, and what its requests have in common."""

    client: Client
    model: str
    kind: Kind
    fields: Mapping[str, Any]
    """Settings by the names of request fields."""
    plan: Plan = Plan()
    """The settings of all lines; what a vLLM needs to know of them."""
    entropies: bool = False
    """Whether a vLLM is asked for log-probabilities, which bound the entropy."""
    system: str | None = None
    raw: bool = False
    keep: bool = False
    tries: int = 8
    """Requests for a line at most, while the server is busy or away."""

    def identity(self) -> dict[str, object]:
        """What makes two outputs differ. The URL is not part of it: a server may move."""
        own = {"em": vllm.said(self.plan)} if self.kind == "vllm" else {}
        return {
            "server": self.kind,
            **own,
            "model": self.model,
            "fields": dict(self.fields),
            "system": self.system,
            "raw": self.raw,
            "keep": self.keep,
        }


@dataclass(frozen=True)
class Served:
    """A server, the model to ask there, and what the server knows."""

    client: Client
    model: str
    kind: Kind
    is_vllm: bool
    context: int | None
    """The most tokens of a prompt and its answer, if the server tells."""


def served(client: Client, model: str | None) -> Served:
    """Asks a server what it serves. Raises EmlocalError.

    Without `model` it is the first that the server lists.
    """
    listed = client.models()
    names = [name for each in listed if isinstance(name := each.get("id"), str)]
    if model is None and not names:
        raise UsageError(f"{client.url} lists no models", "name one with -m MODEL")
    asked = model or names[0]
    about = next((each for each in listed if each.get("id") == asked), {})
    own = about.get("emlocal")
    told = own.get("context") if isinstance(own, dict) else about.get("max_model_len")
    context = told if isinstance(told, int) else None
    if any(each.get("owned_by") == "emlocal" and "emlocal" in each for each in listed):
        return Served(client, asked, "emlocal", False, context)
    if any(each.get("owned_by") == "vllm" for each in listed):
        kind: Kind = "vllm" if vllm.has_processor(client, asked) else "openai"
        return Served(client, asked, kind, True, context)
    return Served(client, asked, "openai", False, context)


def fields_of(given: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """Returns settings as fields of a request. Raises UsageError for those that the server cannot know."""
    known = OPENAI | (vllm.SAMPLING if kind == "vllm" else {})
    found: dict[str, Any] = {}
    for name, value in given.items():
        if kind == "emlocal":
            found[name] = value
        elif name in known:
            found[known[name]] = _schema(value) if name == "json_schema" else value
        elif value not in (None, False):
            raise UsageError(
                f"the server is not emlocal's and does not know {name}",
                "leave it out, or connect to emlocal serve",
            )
    return found


def _schema(value: Any) -> Any:
    schema = json.loads(value) if isinstance(value, str) else value
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def request_of(line: Item, custom_id: str, remote: Remote) -> tuple[str, dict[str, Any]]:
    """Returns the path and the body of a line's request. Raises UsageError.

    emlocal's server draws by `custom_id` as a batch does, so a line has the same answer there.
    """
    own = {known.name if (known := LINE.find(name)) else name: v for name, v in line.overrides.items()}
    samples = own.pop("samples", None)
    common = dict(remote.fields)
    if own.keys() & {*CONSTRAINT_NAMES}:  # an answer has one form
        common = {k: v for k, v in common.items() if k not in (*CONSTRAINT_NAMES, "response_format")}
    said = said_in(line, system=remote.system, raw=remote.raw)
    if remote.kind == "vllm":
        plan, own = vllm.with_line(remote.plan, own)
        common |= vllm.fields(plan, custom_id)
    body: dict[str, Any] = {"model": remote.model, **common, **fields_of(own, remote.kind)}
    if samples is not None:
        body["n"] = samples
    if remote.kind == "emlocal":
        body["custom_id"] = custom_id
    if remote.kind == "vllm":
        vllm.seed(body, chat=not isinstance(said, str), entropies=remote.entropies)
    if isinstance(said, str):
        return TEXT, {**body, "prompt": said}
    if line.tools:
        body["tools"] = [*line.tools]
    return CHAT, {**body, "messages": [*said]}


def row_of(key: str, custom_id: str, answer: Mapping[str, Any], extra: Mapping[str, Any]) -> Row:
    """Returns a response as a row in emlocal's form, with what the server sent. Raises ServerError."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not all(isinstance(c, dict) for c in choices):
        raise ServerError(200, "the server's answer has no choices")
    first = _completion(choices[0])
    bound = vllm.entropy_at_least(choices[0])
    if bound is not None:
        first["entropy_at_least"] = bound
    own = answer.get("emlocal")
    row: Row = {"custom_id": custom_id, **first}
    usage = answer.get("usage")
    if isinstance(usage, dict):
        row |= {n: usage[n] for n in ("prompt_tokens", "completion_tokens") if n in usage}
    row |= {name: value for name, value in own.items() if name not in row} if isinstance(own, dict) else {}
    if len(choices) > 1:
        ours = row.get("samples")
        beside = ours if isinstance(ours, list) and len(ours) == len(choices) else [{}] * len(choices)
        row["samples"] = [{**b, **_completion(c)} for b, c in zip(beside, choices, strict=True)]
    if isinstance(answer.get("model"), str):
        row["model"] = answer["model"]
    if extra:
        row["kept"] = dict(extra)
    return row | {"key": key}


def _completion(choice: Mapping[str, Any]) -> Row:
    message = choice.get("message")
    said = message if isinstance(message, dict) else {"content": choice.get("text")}
    row: Row = {"text": said.get("content"), "finish_reason": choice.get("finish_reason")}
    if said.get("reasoning_content"):
        row["reasoning"] = said["reasoning_content"]
    if said.get("tool_calls"):
        row["tool_calls"] = said["tool_calls"]
    return row


class RemoteBatch(Tasks):
    """One run over the lines, N requests at a time. `rows` may be called once."""

    def __init__(
        self,
        remote: Remote,
        lines: Iterable[Item | BadLine],
        *,
        fingerprint: str,
        parallel: int,
        openai: bool = False,
        ordered: bool = False,
        done: Keys | None = None,
        places: Places | None = None,
    ) -> None:
        super().__init__(
            lines, fingerprint=fingerprint, openai=openai, ordered=ordered, done=done, places=places
        )
        self._remote = remote
        self._parallel = parallel
        self._cancelled: Callable[[], bool] = never
        self.generated_tokens = 0
        """As the server counts them."""

    def rows(self, cancelled: Callable[[], bool] = never) -> Iterator[Row]:
        """Yields rows as they are finished or, with `ordered`, in the order of the lines.

        Raises CancelledError; the requests in progress then end, too. Raises ServerError if the server stays
        away or refuses the key: their lines have no rows and are asked again when the run resumes.
        """
        left = False

        def stop() -> bool:
            return left or cancelled()

        self._cancelled = stop
        running: dict[Future[dict[str, Any]], tuple[Task, Item]] = {}
        with self._seen, ThreadPoolExecutor(self._parallel) as pool:
            try:
                more = True
                while more or running:
                    while (
                        len(running) < self._parallel
                        and not self._ready
                        and (taken := self._take()) is not None
                    ):
                        task, line = taken
                        self._start(pool, running, task, line)
                    more = len(running) >= self._parallel
                    while self._ready:
                        more = True
                        yield self._ready.popleft()
                    finished, _ = wait(running, _LOOK_SECONDS, FIRST_COMPLETED) if running else (set(), set())
                    if cancelled():
                        raise CancelledError
                    for future in finished:
                        self._finish(future, *running.pop(future))
                        more = True
                yield from self._ready
            finally:
                left = True
                if running:
                    self._remote.client.close()

    def _start(
        self,
        pool: ThreadPoolExecutor,
        running: dict[Future[dict[str, Any]], tuple[Task, Item]],
        task: Task,
        line: Item | BadLine,
    ) -> None:
        if task.error or isinstance(line, BadLine):
            self._failed(task, task.error)
            return
        try:
            path, body = request_of(line, task.custom_id or "", self._remote)
        except EmlocalError as error:
            self._failed(task, error.message)
            return
        task.extra = dict(line.extra) if self._remote.keep else {}
        running[pool.submit(self._post, path, body)] = task, line

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Asks until the server answers. It runs in a thread of its own."""
        pause = _FIRST_WAIT
        for left in range(self._remote.tries - 1, -1, -1):
            try:
                return self._remote.client.post(path, body)
            except ServerError as error:
                if not error.passing or not left:
                    raise
                seconds = pause * random.uniform(0.5, 1.0) if error.retry_after is None else error.retry_after
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                if self._cancelled():
                    raise CancelledError
                time.sleep(_LOOK_SECONDS)
            pause = min(2 * pause, _LONGEST_WAIT)
        raise AssertionError("unreachable")

    def _finish(self, future: Future[dict[str, Any]], task: Task, line: Item) -> None:
        """Makes a line's row. Raises ServerError if the server failed and the line is good."""
        try:
            answer = future.result()
            row = row_of(task.key, task.custom_id or "", answer, task.extra)
        except ServerError as error:
            if error.passing or error.status in (401, 403, 404):
                raise
            self._failed(task, error.message)
            return
        self.tally.answered += 1
        self.tally.cut_off += row["finish_reason"] == "length"
        self.tally.abstained += bool(row.get("abstained"))
        tokens = row.get("completion_tokens")
        self.generated_tokens += tokens if isinstance(tokens, int) else 0
        if self._openai:
            response = {"status_code": 200, "request_id": answer.get("id"), "body": answer}
            row = {"id": task.key, "custom_id": task.custom_id, "response": response, "error": None}
        self._give(task, row)
