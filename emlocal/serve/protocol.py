"""Reads the body of a request into a question, by the reader of batch lines.

A body has fields that a batch line lacks: how the answer is sent (`stream`, `logprobs`), the model and the
method. They are taken out first. The rest goes through `batch.lines.parse_object`, so batch and server
take the same fields, with the same checks.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from emlocal.backends.base import Backend
from emlocal.batch.lines import BadLine, Item, parse_object, strict_json
from emlocal.batch.run import BatchSettings, question_of
from emlocal.cancel import never
from emlocal.errors import EmlocalError, UsageError
from emlocal.generation.alternatives import MOST as MOST_ALTERNATIVES
from emlocal.methods import HOW, Chosen, chosen_by
from emlocal.methods.asking import Question
from emlocal.sampling.draw import request_key
from emlocal.serve.errors import Refusal, refusal_of
from emlocal.settings import Given, Plan, Resolved, overridden
from emlocal.settings.resolve import names_in, random_seed
from emlocal.settings.table import NAMES, Table, shown

MOST_SAMPLES = 64
"""The most samples of one request; more would keep all others waiting."""
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
_SUFFIXES = ("em-inf", "vote")
"""Methods for model ids of the form NAME:METHOD, for clients that cannot send fields."""
_METHOD = re.compile(r"[a-z-]+(:[a-z0-9-]+)?(\+[a-z-]+(:[a-z0-9-]+)?)?")
"""The form of a method: NAME, NAME:VALUE or A+B; its other settings are fields."""
OWNERS = frozenset({"allow_code", "pattern"})
"""Settings that no request may set: running programs, and a regular expression, which may never end."""
_OWN = Table({name: known for name, known in HOW.settings.items() if name not in ("method", "samples")})
_IGNORED = frozenset({"prediction"})
"""Further fields of OpenAI's API that are ignored, beside those that a batch line ignores."""


class Served(NamedTuple):
    """What a model id stands for."""

    method: str | None = None
    adapter: str = ""


@dataclass(frozen=True)
class House:
    """The served model, and the defaults of its answers."""

    backend: Backend
    resolved: Resolved
    settings: BatchSettings
    """Settings of requests that name no method."""
    how: Given = field(default_factory=dict)
    """The method and its settings, as flags choose them."""
    created: int = 0
    """Time when the model was loaded, in seconds since 1970."""
    fingerprint: str = ""
    """Identifies model, adapters, engine and emlocal's version."""
    adapters: Sequence[str] = ()
    """The names of the adapters that requests may choose."""

    @property
    def name(self) -> str:
        """The model's name."""
        return self.backend.info.name

    @cached_property
    def models(self) -> Mapping[str, Served]:
        """Each model id, with the adapter and the method that it stands for."""
        found = {}
        for name, adapter in {self.name: "", **{name: name for name in self.adapters}}.items():
            found[name] = Served(None, adapter)
            found |= {f"{name}:{suffix}": Served(suffix, adapter) for suffix in _SUFFIXES}
        return found

    @cached_property
    def seed(self) -> int | None:
        """Seed of requests without one; None: a random seed for each."""
        return None if self.resolved.sources.get("seed") == "default" else self.resolved.plan.seed

    def model(self, given: Any) -> str:
        """Returns the model id of a request. Raises Refusal for one that is not served."""
        if given is None:
            return self.name
        if not isinstance(given, str) or given not in self.models:
            served = ", ".join(self.models)
            raise Refusal(
                404, f"there is no model {shown(given)}; served are {served}", "model_not_found", "model"
            )
        return given


@dataclass(frozen=True)
class Asked:
    """A request that was read."""

    house: House
    item: Item
    settings: BatchSettings
    model: str
    """The model id, as the client wrote it."""
    seed: int
    stream: bool = False
    usage: bool = False
    """Whether the stream ends with a chunk that has the usage."""
    top: int | None = None
    """Number of alternatives of each token; None: no log-probabilities at all."""
    key: int = 0
    """Key of the draws: that of a batch line if the request names its `custom_id`."""

    @property
    def chooses(self) -> bool:
        """Whether the text is known at the end only.

        This is so if the method makes one answer of several, or the answer may be withheld or call tools.
        """
        method = self.settings.method.collecting
        return method.collects or self.settings.abstain_below is not None or bool(self.item.tools)

    @cached_property
    def plan(self) -> Plan:
        """Returns the settings of the answer. Raises EmlocalError for contradictory settings."""
        return self.question().plan

    def question(self, gone: Callable[[], bool] = never) -> Question:
        """Returns the question for the engine. Equal requests get equal answers, whatever runs beside them.

        Args:
            gone: whether to stop; asked while the prompt is tokenized.
        Raises EmlocalError for settings that contradict each other.
        """
        made = question_of(
            self.item, self.settings, self.house.backend, self.key, warn=_silent, cancelled=gone
        )
        return replace(
            made,
            plan=replace(made.plan, seed=self.seed),
            top=self.top or 0,
            adapter=self.house.models[self.model].adapter,
        )


def _silent(text: str) -> None:
    """Ignores a note. Whoever starts the server reads those on a model without chat template."""


def read_json(raw: bytes) -> dict[str, Any]:
    """Returns the JSON object in a body. Raises Refusal."""
    try:
        value = strict_json(raw)
    except UnicodeDecodeError as why:
        raise Refusal(400, f"byte {why.start + 1:,} of the body is not UTF-8", "invalid_json") from None
    except ValueError as why:
        raise Refusal(400, f"the body is {why}", "invalid_json") from None
    if not isinstance(value, dict):
        raise Refusal(400, "the body must be a JSON object", "invalid_json")
    return value


def read_asked(house: House, url: str, body: Mapping[str, Any]) -> Asked:
    """Reads a request of chat or text completions. Raises Refusal."""
    left = {name: value for name, value in body.items() if value is not None and name not in _IGNORED}
    stream = switch_in(left, "stream")
    usage = _stream_options(left, stream)
    top = _top(left) if url == CHAT else _legacy(left)
    model = house.model(left.pop("model", None))
    entropies = switch_in(left, "entropies")
    return question_asked(house, url, left, model, stream=stream, usage=usage, top=top, entropies=entropies)


def question_asked(
    house: House,
    url: str,
    left: dict[str, Any],
    model: str,
    *,
    stream: bool,
    usage: bool,
    top: int | None,
    entropies: bool,
) -> Asked:
    """Reads a request from the fields of batch lines and methods. Raises Refusal."""
    try:
        key = _key(left)
        settings = replace(_settings(house, left, house.models[model].method), entropies=entropies)
        found = parse_object(1, {"url": url, "body": left})
        if isinstance(found, BadLine):
            word = found.message.split(" ", 1)[0]
            raise Refusal(400, found.message, "invalid_value", word if word in left else None)
        line = overridden(settings.plan, found.overrides)  # what is wrong is said before it waits
        given = "seed" in names_in(found.overrides)
        seed = line.seed if given else random_seed() if house.seed is None else house.seed
        asked = Asked(house, found, settings, model, seed, stream, usage, top, key)
        plan = asked.plan
    except EmlocalError as error:
        raise refusal_of(error) from None
    if plan.samples > MOST_SAMPLES:
        said = f"{plan.samples:,} samples are asked for; a request has {MOST_SAMPLES} at most"
        raise Refusal(400, said, "invalid_value", "n")
    return asked


def _settings(house: House, left: dict[str, Any], by_name: str | None) -> BatchSettings:
    """Returns the settings with the request's method; takes the method's fields out of `left`."""
    own: dict[str, Any] = {}
    for name in [*left]:
        known = _OWN.find(name)
        if known is not None:
            value = left.pop(name)
            if known.name in OWNERS or value == "regex":
                raise UsageError(f"a request cannot set {name}", "set it when the server starts")
            own |= _OWN.read({name: value}, NAMES)
    method = left.pop("method", by_name)
    if by_name is not None and method != by_name:
        raise UsageError(
            f"the model's name says method {by_name}, and method is {shown(method)}", "leave one of them out"
        )
    if method is None and not own:
        chosen = house.settings.method
    elif method is None:
        chosen = chosen_by({**house.how, **own})
    elif not isinstance(method, str) or not _METHOD.fullmatch(method):
        raise UsageError(
            f"method is {shown(method)}; it must be NAME, NAME:VALUE or A+B", "give other settings as fields"
        )
    else:
        chosen = Chosen(method, **own)
    _choices(left, chosen)
    resolved = house.resolved
    plan = chosen.plan(resolved.plan, resolved.chosen)
    return replace(house.settings, plan=plan, method=chosen)


def _key(left: dict[str, Any]) -> int:
    """Returns the key of the draws: 0, or that of the batch line with this `custom_id`."""
    given = left.pop("custom_id", None)
    if given is None:
        return 0
    if not isinstance(given, str) or not given:
        raise UsageError(f"custom_id is {shown(given)}; it must be a text that is not empty")
    return request_key(given)


def _choices(left: dict[str, Any], chosen: Chosen) -> None:
    """Checks `n`, the number of answers: a method that chooses gives one, from `samples` samples."""
    if not chosen.collecting.collects or "n" not in left:
        return
    n = left.pop("n")
    if n != 1 or isinstance(n, bool):
        raise UsageError(
            f"n is {shown(n)}; {chosen.name} gives one answer", "samples says how many it chooses from"
        )


def switch_in(left: dict[str, Any], name: str) -> bool:
    """Takes a field that is true or false out of a request; false if it is not there. Raises Refusal."""
    value = left.pop(name, False)
    if not isinstance(value, bool):
        raise Refusal(400, f"{name} is {shown(value)}; it must be true or false", "invalid_value", name)
    return value


def _stream_options(left: dict[str, Any], stream: bool) -> bool:
    name = "stream_options"
    options = left.pop(name, None)
    if options is None:
        return False
    if not isinstance(options, dict):
        raise Refusal(400, f"{name} is {shown(options)}; it must be an object", "invalid_value", name)
    if not stream:
        raise Refusal(400, f"{name} is only allowed with stream true", "invalid_value", name)
    options = {key: value for key, value in options.items() if key != "include_obfuscation"}
    usage = switch_in(options, "include_usage")
    if options:
        raise Refusal(400, f"{name} has no field {shown(next(iter(options)))}", "invalid_value", name)
    return usage


def _top(left: dict[str, Any]) -> int | None:
    """Returns the alternatives that a chat asks for: `logprobs` is a switch, `top_logprobs` a number."""
    wanted = switch_in(left, "logprobs")
    if "top_logprobs" not in left:
        return 0 if wanted else None
    most = alternatives_asked(left.pop("top_logprobs"), "top_logprobs")
    if most and not wanted:
        raise Refusal(400, "top_logprobs needs logprobs true", "invalid_value", "top_logprobs")
    return most if wanted else None


def _legacy(left: dict[str, Any]) -> int | None:
    """Returns the alternatives that a text completion asks for; takes out the fields that only they have."""
    best_of = left.pop("best_of", None)
    if best_of is not None and best_of != left.get("n", 1):
        raise Refusal(400, "best_of must be n: no answers are thrown away", "invalid_value", "best_of")
    if switch_in(left, "echo"):
        raise Refusal(400, "echo can only be false", "invalid_value", "echo")
    prompt = left.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        left["prompt"] = prompt[0]
    elif isinstance(prompt, list):
        raise Refusal(400, "prompt is a list; it must be one text", "invalid_value", "prompt")
    given = left.pop("logprobs", None)
    return None if given is None or given is False else alternatives_asked(given, "logprobs")


def alternatives_asked(given: Any, name: str) -> int:
    """Returns a number of alternatives. Raises Refusal."""
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given <= MOST_ALTERNATIVES:
        said = f"{name} is {shown(given)}; it must be a whole number between 0 and {MOST_ALTERNATIVES}"
        raise Refusal(400, said, "invalid_value", name)
    return given
