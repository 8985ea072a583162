"""Settings other than the EM step's: how a prompt is answered, and which model runs on which engine.

`SamplingParams` are the sampling settings of a row, `Plan` adds the limits of an answer, `EngineOptions` is
the model and how to run it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from emlocal.backends import ENGINES
from emlocal.em import EMStep
from emlocal.errors import UsageError
from emlocal.settings.constraint import ConstraintSettings
from emlocal.settings.table import Table, check_settings, setting, shown
from emlocal.settings.thinking import ThinkingSettings

MAX_SEED = 2**64 - 1
DEFAULT_MAX_TOKENS = 1024
"""The default limit of an answer, in tokens."""
_setting = partial(setting, panel="Sampling")
_LARGEST_BIAS = 1e30  # logits are float32: an infinite logit would make the row an impossible distribution
_LONGEST_NUMBER = 18  # digits of a token's id or a number of layers


def _bias(given: Any, said: str) -> tuple[tuple[int, float], ...]:
    """Reads a logit bias.

    It is {"token id": bias} as in OpenAI's API, or texts: ID=BIAS, or llama.cpp's ID+BIAS and ID-BIAS.
    """
    if isinstance(given, str):
        given = [given]
    if isinstance(given, list | tuple) and all(isinstance(text, str) for text in given):
        return tuple(_bias_of(text, said) for text in given)
    if not isinstance(given, Mapping):
        raise UsageError(f"{said} is {shown(given)}; it must be an object from token ids to numbers")
    return tuple(_checked_bias(token, bias, said) for token, bias in given.items())


def _bias_of(text: str, said: str) -> tuple[int, float]:
    for separator in "=+-":
        token, found, bias = text.partition(separator)
        if found and token.isdigit():
            try:
                return _checked_bias(token, float(bias if separator == "=" else separator + bias), said)
            except ValueError:
                break
    raise UsageError(f"{said} is {text!r}; it must be a token id and a number: 15043=-1.5 or 15043=-inf")


def _checked_bias(token: Any, bias: Any, said: str) -> tuple[int, float]:
    digits = str(token) if isinstance(token, int | str) and not isinstance(token, bool) else ""
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= _LONGEST_NUMBER):
        raise UsageError(f"{said} names {shown(token)}; it must be a token id, 0 or more")
    number = isinstance(bias, int | float) and not isinstance(bias, bool)
    if not number or not (abs(bias) <= _LARGEST_BIAS or bias == -math.inf):
        span = f"a number between {-_LARGEST_BIAS:g} and {_LARGEST_BIAS:g}, or -inf"
        raise UsageError(f"{said} of token {digits} is {shown(bias)}; it must be {span}")
    return int(digits), float(bias)


@dataclass(frozen=True)
class SamplingParams:
    """One row's settings, in the order in which they act. Raises UsageError for a value out of range."""

    repeat_penalty: float = _setting(
        1.0,
        "--repeat-penalty --repetition-penalty --penalty-repeat",
        0,
        100,
        "Lower the logits of repeated tokens by this factor (1 = off).",
        low_is_open=True,
    )
    presence_penalty: float = _setting(
        0.0, "--presence-penalty", -100, 100, "Subtract this from the logit of every token seen (0 = off)."
    )
    frequency_penalty: float = _setting(
        0.0,
        "--frequency-penalty",
        -100,
        100,
        "Subtract this from a token's logit for each time it was seen (0 = off).",
    )
    repeat_last_n: int = _setting(
        64,
        "--repeat-last-n --repetition-context-size --penalty-last-n",
        -1,
        10**9,
        "Apply penalties to this many last tokens (-1 = all, 0 = none).",
    )
    logit_bias: tuple[tuple[int, float], ...] = _setting(
        (),
        "--logit-bias",
        help="Add a bias to a token's logit; -inf bans the token. Repeatable.",
        metavar="ID=BIAS",
        read=_bias,
    )
    """Pairs of (token id, number to add to its logit); −inf bans the token."""
    em: EMStep | None = None
    temperature: float = _setting(
        0.8, "--temp --temperature", 0, 100, "Set the sampling temperature, applied after EM (0 = greedy)."
    )
    dynatemp_range: float = _setting(
        0.0,
        "--dynatemp-range",
        0,
        100,
        "Vary the temperature by ± this with the entropy of each token (0 = off).",
    )
    """llama.cpp's dynamic temperature: hotter where the model is unsure. A rival of EM, for comparison."""
    dynatemp_exponent: float = _setting(
        1.0, "--dynatemp-exp", 0, 100, "Set the exponent of the normalised entropy in --dynatemp-range."
    )
    top_k: int = _setting(0, "--top-k", 0, 10**9, "Keep the k most probable tokens (0 = all).")
    top_p: float = _setting(
        1.0,
        "--top-p",
        0,
        1,
        "Keep the most probable tokens up to this total probability (1 = all).",
        low_is_open=True,
    )
    min_p: float = _setting(
        0.05, "--min-p", 0, 1, "Drop tokens below this share of the highest probability (0 = none)."
    )

    def __post_init__(self) -> None:
        check_settings(self)
        for token, bias in self.logit_bias:
            if token < 0 or math.isnan(bias) or bias == math.inf:
                raise UsageError(
                    f"--logit-bias {token}={bias:g}: the token id must be 0 or more, the bias a"
                    " number or -inf"
                )

    @property
    def penalizes(self) -> bool:
        """Whether the tokens seen so far change the row."""
        off = (self.repeat_penalty, self.presence_penalty, self.frequency_penalty) == (1.0, 0.0, 0.0)
        return not off and self.repeat_last_n != 0

    def temperature_at(self, entropy: float, vocabulary: int) -> float:
        """Returns the temperature of a row with this entropy (nats) over a vocabulary of this size."""
        if self.dynatemp_range == 0 or vocabulary == 1:
            return self.temperature
        low = max(0.0, self.temperature - self.dynatemp_range)
        share = min(1.0, entropy / math.log(vocabulary))
        return float(low + (self.temperature + self.dynatemp_range - low) * share**self.dynatemp_exponent)

    def without_em(self) -> "SamplingParams":
        """Returns the same settings with the EM step off: the other side of a comparison."""
        return replace(self, em=None)


@dataclass(frozen=True)
class Plan(ConstraintSettings, ThinkingSettings):
    """How one prompt is answered.

    Raises UsageError, with flag and range, for a value out of range, and for two constraints.
    """

    params: SamplingParams = SamplingParams()
    max_tokens: int = _setting(
        DEFAULT_MAX_TOKENS,
        "--max-tokens --max-new-tokens --max-completion-tokens --n-predict --num-predict",
        1,
        math.inf,
        "Stop after this many tokens.",
    )
    stop: tuple[str, ...] = _setting(
        (),
        "--stop --stop-sequences --reverse-prompt",
        help="Stop before this text. Repeatable.",
        metavar="TEXT",
    )
    seed: int = _setting(
        0, "-s --seed", 0, MAX_SEED, "Set the seed of all draws. (default: random, and shown; 0 in a batch)"
    )
    samples: int = _setting(1, "--samples --n --num-return-sequences", 1, 1024)

    def __post_init__(self) -> None:
        check_settings(self)
        _ = self.constraint  # two contradict each other
        _ = self.template_variables


def _gpu_layers(given: Any, said: str) -> str:
    """Reads a number of layers, "all" or "auto"."""
    text = str(given) if isinstance(given, int) and not isinstance(given, bool) else given
    if isinstance(text, str):
        text = text.strip().lower()
        if text in ("all", "auto"):
            return text
        if text.isascii() and text.isdecimal() and len(text) <= _LONGEST_NUMBER:
            return str(int(text))
    raise UsageError(
        f"{said} is {shown(given)}; it must be a whole number at least 0, all or auto",
        "write all for all layers" if text == "-1" else "",
    )


def _tensor_split(given: Any, said: str) -> str:
    """Reads shares of GPUs: "3,1" or a list of numbers."""
    parts = given.replace("/", ",").split(",") if isinstance(given, str) else given
    try:
        shares = [float(part) for part in parts if not isinstance(part, bool)]
    except (TypeError, ValueError):
        shares = []
    valid = bool(shares) and all(0 <= share <= _LARGEST_BIAS for share in shares) and any(shares)
    if not valid or len(shares) != len(parts):
        raise UsageError(f"{said} is {shown(given)}; it must be one number for each GPU, such as 3,1")
    return ",".join(f"{share:g}" for share in shares)


if TYPE_CHECKING:
    BackendName = str
else:
    BackendName = Literal["auto", *ENGINES]
KVName = Literal["f32", "f16", "q8_0", "q4_0"]
SpeculateName = Literal["off", "auto", "lookup"]
SplitName = Literal["none", "layer", "row", "tensor"]
PANEL = "Model and engine"
CONTEXT_NAMES = "--ctx-size --max-model-len --context-length --n-ctx --num-ctx --max-kv-size"
"""Other programs' names for the context."""
_engine_setting = partial(setting, panel=PANEL)


@dataclass(frozen=True)
class EngineOptions:
    """Which model to run, and how. None: emlocal chooses."""

    model: str | None = _engine_setting(
        None,
        "-m --model --hf-repo",
        help="Set the model: a short name, auto, .gguf file, folder or org/name:QUANT.",
        metavar="MODEL",
    )
    backend: BackendName | None = _engine_setting(
        None, "--backend", help="Choose the engine that runs the model."
    )
    adapter: tuple[str, ...] = _engine_setting(
        (),
        "--adapter --lora --adapter-path",
        help="Load a LoRA adapter: a PEFT or MLX folder, or a GGUF file. Repeatable.",
        metavar="PATH[=SCALE]",
    )
    context: int | None = _engine_setting(
        None,
        f"-c --context {CONTEXT_NAMES}",
        16,
        help="Set the context length. (default: the model's, at most 8192; 2048 in a batch)",
        unit="tokens",
    )
    threads: int | None = _engine_setting(
        None, "-t --threads --n-threads", 1, help="Set the number of CPU threads. (default: physical cores)"
    )
    kv_type: KVName | None = _engine_setting(
        None,
        "--kv-type --kv-cache-dtype --cache-type",
        help="Set the type of cached keys and values. (default: f16; in torch the model's)",
    )
    offline: bool = _engine_setting(False, "--offline", help="Never use the network.")
    gpu_layers: str | None = _engine_setting(
        None,
        "-ngl --gpu-layers --n-gpu-layers",
        help="Put this many layers on GPUs in llama.cpp: a number, all, or auto. (default: auto)",
        metavar="LAYERS",
        read=_gpu_layers,
    )
    split_mode: SplitName | None = _engine_setting(
        None,
        "-sm --split-mode",
        help="Divide the model among several GPUs by layer, row or tensor, or use one. (default: layer)",
    )
    main_gpu: int | None = _engine_setting(
        None, "-mg --main-gpu", 0, 255, "Use this GPU with --split-mode none. (default: 0)"
    )
    tensor_split: str | None = _engine_setting(
        None,
        "-ts --tensor-split",
        help="Divide the layers among GPUs in these proportions, such as 3,1. (default: what fits)",
        metavar="SHARES",
        read=_tensor_split,
    )
    speculate: SpeculateName = _engine_setting(
        "off",
        "--speculate",
        help="Guess tokens from the text so far, and verify several in one pass: always (lookup) or where it"
        " pays (auto).",
    )


ENGINE = Table.of(EngineOptions)
NO_GUESSES = ENGINE.without("speculate")
"""For verbs that do not guess tokens."""
