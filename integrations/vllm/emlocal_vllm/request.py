"""The fields of a request: `extra_args` offline, `vllm_xargs` in HTTP requests, under emlocal's names.

Names, ranges, defaults and presets are those of emlocal.em.steps, which a test compares. They are repeated
because this package must be importable where emlocal is not installed.
"""

import difflib
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from emlocal_vllm.steps import REACH, Kernel


class Params(Protocol):
    """What is read of vLLM's SamplingParams."""

    extra_args: dict[str, Any] | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | None
    n: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float


@dataclass(frozen=True)
class Number:
    """A field that is a number, with its range."""

    default: float
    low: float
    high: float
    whole: bool = False
    low_is_open: bool = False
    unit: str = ""

    def span(self) -> str:
        """Returns the range in words, as emlocal's messages have it."""
        if math.isinf(self.high):
            span = f"at least {self.low:g}"
        elif self.low_is_open:
            span = f"more than {self.low:g} and at most {self.high:g}"
        else:
            span = f"between {self.low:g} and {self.high:g}"
        return f"{span} {self.unit}".rstrip()

    def read(self, name: str, value: Any) -> float:
        """Returns the value. Raises ValueError with the range."""
        kind = int if self.whole else int | float
        if not isinstance(value, kind) or isinstance(value, bool) or value != value:
            what = "a whole number" if self.whole else "a number"
            raise ValueError(f"{name} is {value!r}; it must be {what} {self.span()}")
        too_low = value <= self.low if self.low_is_open else value < self.low
        if too_low or value > self.high or math.isinf(value):
            raise ValueError(f"{name} is {value:g}; it must be {self.span()}")
        return value


EM_INF: Mapping[str, Number] = {
    "em_threshold": Number(0.3, 0, math.inf, unit="nats"),
    "em_steps": Number(10, 0, 1000, whole=True),
    "em_learning_rate": Number(2.0, 0, 1e6, low_is_open=True),
    "em_kl_weight": Number(0.0, 0, 1e6),
}
ADAPTIVE: Mapping[str, Number] = {
    "em_ratio": Number(0.5, 0, 1),
    "em_threshold": Number(0.1, 0, math.inf, unit="nats"),
}
OPTIMIZERS = ("sgd", "adam")
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "paper": {"em_threshold": 0.3, "em_steps": 15, "em_learning_rate": 1.0},
    "em-pt": {
        "em_threshold": 0.3,
        "em_steps": 3,
        "em_learning_rate": 0.1,
        "em_optimizer": "adam",
        "em_kl_weight": 0.05,
    },
}
"""The EM step of each preset. Its sampling settings are vLLM's own, and the client sends them."""
_OF_EM_INF = (*EM_INF, "em_optimizer")
_SWITCHES = ("em_inf", "adaptive_temp", "em_draw", "em_record")
NAMES = (*_SWITCHES, "em_preset", *_OF_EM_INF, "em_ratio", "em_seed", "em_id")
_SEEDS = 2**64


@dataclass(frozen=True)
class Request:
    """What a request asks for."""

    kernel: Kernel
    threshold: float = 0.0
    steps: int = 0
    learning_rate: float = 0.0
    kl_weight: float = 0.0
    ratio: float = 0.0
    draw: bool = False
    """Whether the token is drawn here, by emlocal's uniforms, and not by vLLM."""
    record: bool = False
    """Whether the entropies are kept for `worker.Entropies`."""
    seed: int = 0
    key: int = 0
    """Of the request, 64 bits; see emlocal.sampling.draw.request_key."""
    sample: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do for the request."""
        return self.kernel != "none" or self.draw or self.record


def read(params: Params) -> Request:
    """Returns what a request asks for. Raises ValueError, with the range, for what is out of range."""
    given = {name: value for name, value in (params.extra_args or {}).items() if _ours(name)}
    if not given:
        return Request("none")
    on = {name: _switch(name, given[name]) for name in _SWITCHES if name in given}
    preset = _choice("em_preset", given, tuple(PRESETS))
    em_inf = on.get("em_inf", preset is not None)
    adaptive = on.get("adaptive_temp", False)
    if preset is not None and on.get("em_inf") is False:
        raise ValueError("em_inf false and em_preset contradict each other; leave one of them out")
    if em_inf and adaptive:
        raise ValueError("em_inf and adaptive_temp contradict each other: only one EM step can run")
    _check_needed(given, em_inf, adaptive)
    common = _draws(params, given, on)
    if adaptive:
        numbers = {name: known.read(name, given.get(name, known.default)) for name, known in ADAPTIVE.items()}
        return Request("adaptive", threshold=numbers["em_threshold"], ratio=numbers["em_ratio"], **common)
    if not em_inf:
        return Request("none", **common)
    of_preset = PRESETS[preset] if preset else {}
    numbers = {
        name: known.read(name, given.get(name, of_preset.get(name, known.default)))
        for name, known in EM_INF.items()
    }
    optimizer = _choice("em_optimizer", given, OPTIMIZERS) or of_preset.get("em_optimizer", "sgd")
    steps, rate, kl = int(numbers["em_steps"]), numbers["em_learning_rate"], numbers["em_kl_weight"]
    kernel: Kernel = "sgd" if steps * rate <= REACH and not kl else "full"
    return Request(
        "adam" if optimizer == "adam" else kernel,
        threshold=numbers["em_threshold"],
        steps=steps,
        learning_rate=rate,
        kl_weight=kl,
        **common,
    )


def refuse_penalties(params: Params) -> None:
    """Raises ValueError for a request with penalties: the V1 runner applies them after the EM step."""
    asked = read(params)
    penalties = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
    for name, neutral in penalties.items():
        if asked.wanted and vars_of(params, name) != neutral:
            raise ValueError(
                f"{name} is {vars_of(params, name):g}; vLLM's V1 runner applies penalties after the EM step, "
                "so here it must be left out (the V2 runner takes both)"
            )


def vars_of(params: Params, name: str) -> float:
    """Returns a penalty of the request."""
    return {
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "repetition_penalty": params.repetition_penalty,
    }[name]


def _ours(name: str) -> bool:
    """Whether a field is emlocal's. Raises ValueError for a misspelt one."""
    if name in NAMES:
        return True
    if name.startswith(("em_", "adaptive_")):
        near = difflib.get_close_matches(name, NAMES, 1)
        raise ValueError(f"there is no field {name}" + (f"; did you mean {near[0]}?" if near else ""))
    return False


def _switch(name: str, value: Any) -> bool:
    if value in (True, False, "true", "false"):  # 1 and 0 are among them
        return value in (True, "true")
    raise ValueError(f"{name} is {value!r}; it must be 1 or 0")


def _choice(name: str, given: Mapping[str, Any], choices: tuple[str, ...]) -> str | None:
    if name not in given:
        return None
    value = given[name]
    if value in choices:
        return str(value)
    raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


def _check_needed(given: Mapping[str, Any], em_inf: bool, adaptive: bool) -> None:
    """Raises ValueError for a number that has no effect."""
    for name in given:
        if name in _OF_EM_INF and name not in ADAPTIVE and not em_inf:
            raise ValueError(f"{name} has no effect without em_inf; set em_inf 1")
        if name == "em_ratio" and not adaptive:
            raise ValueError("em_ratio has no effect without adaptive_temp; set adaptive_temp 1")
        if name == "em_threshold" and not (em_inf or adaptive):
            raise ValueError("em_threshold has no effect without em_inf or adaptive_temp; set em_inf 1")


def _draws(params: Params, given: Mapping[str, Any], on: Mapping[str, bool]) -> dict[str, Any]:
    """Returns the fields of the draw.

    vLLM gives the samples of a request with `n` the seeds `seed`, `seed + 1`, …. Their distance to `em_seed`
    is the sample's number. Without `seed` the samples would be alike, so `n` needs it. One answer does not,
    and vLLM 0.32 on CPUs ends when the prompt of a seeded request is read in parts.
    """
    draw, record = on.get("em_draw", False), on.get("em_record", False)
    name = given.get("em_id", "")
    if not isinstance(name, str):
        raise ValueError(f"em_id is {name!r}; it must be a text")  # noqa: TRY004 - HTTP 400
    seed = given.get("em_seed", params.seed or 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < _SEEDS:
        raise ValueError(f"em_seed is {seed!r}; it must be a whole number between 0 and 2^64 - 1")
    if draw and params.n > 1 and (params.seed is None or params.seed != seed):
        raise ValueError(f"em_draw with n {params.n} needs a seed: set seed and em_seed to the same number")
    sample = 0 if params.seed is None else params.seed - seed
    if draw and sample < 0:
        raise ValueError(f"em_seed is {seed}; it must be at most the request's seed, {params.seed}")
    return {
        "draw": draw,
        "record": record,
        "seed": seed,
        "key": request_key(name) if name else 0,
        "sample": max(0, sample),
        "temperature": params.temperature,
        "top_k": max(0, params.top_k),
        "top_p": params.top_p,
        "min_p": params.min_p,
    }


def request_key(name: str) -> int:
    """Returns the 64-bit key for a request's name, as emlocal.sampling.draw does."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
