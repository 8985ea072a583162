"""Every flag, declared once for all verbs.

A verb takes groups of flags as dataclasses:

    @with_options
    def generate(prompt: ..., engine: EngineOptions, sampling: SamplingOptions) -> None: ...

`with_options` shows typer each field of a group as a parameter of its own and hands the group back whole.
A flag that was not given is None, so that the config file, the model and emlocal's defaults can follow.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from emlocal.errors import UsageError
from emlocal.settings import SamplingParams, settings_of

R = TypeVar("R")
ENGINE, SAMPLING, EM, OUTPUT = "Model and engine", "Sampling", "Entropy minimization", "Output"


class BackendChoice(StrEnum):
    auto = "auto"
    llama_cpp = "llama.cpp"
    mlx = "mlx"
    torch = "torch"


class KVChoice(StrEnum):
    f32 = "f32"
    f16 = "f16"
    q8_0 = "q8_0"
    q4_0 = "q4_0"


class Optimizer(StrEnum):
    sgd = "sgd"
    adam = "adam"


class Preset(StrEnum):
    default = "default"
    paper = "paper"
    em_pt = "em-pt"


def flag(panel: str, *names: str, help: str, metavar: str | None = None) -> Any:
    """A flag in one of the help's panels."""
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, show_default=False)


def number_flag(cls: type, name: str, panel: str, metavar: str) -> Any:
    """The flag of a number that a settings dataclass declares, with its help text and default."""
    known = settings_of(cls)[name]
    default = next(f.default for f in fields(cls) if f.name == name)
    return flag(panel, known.flag, help=f"{known.help} (default: {default:g})", metavar=metavar)


def _sampling(name: str, metavar: str = "X") -> Any:
    return number_flag(SamplingParams, name, SAMPLING, metavar)


@dataclass(frozen=True)
class EngineOptions:
    """Which model, and how to run it."""

    model: Annotated[
        str | None,
        flag(
            ENGINE,
            "-m",
            "--model",
            help="Short name, .gguf file, or org/name:QUANT of the hub.",
            metavar="MODEL",
        ),
    ] = None
    backend: Annotated[BackendChoice | None, flag(ENGINE, "--backend", help="Engine to run on.")] = None
    adapter: Annotated[
        list[str] | None,
        flag(
            ENGINE,
            "--adapter",
            help="LoRA adapter: a PEFT or MLX folder, or a GGUF file. Repeatable.",
            metavar="PATH[=SCALE]",
        ),
    ] = None
    context: Annotated[
        int | None,
        flag(
            ENGINE,
            "-c",
            "--context",
            help="Tokens of context. (default: the model's, at most 8192; 2048 in a batch)",
            metavar="N",
        ),
    ] = None
    threads: Annotated[
        int | None,
        flag(ENGINE, "-t", "--threads", help="CPU threads. (default: physical cores)", metavar="N"),
    ] = None
    kv_type: Annotated[
        KVChoice | None,
        flag(
            ENGINE,
            "--kv-type",
            help="Type of the cached keys and values. (default: f16; in torch the model's)",
        ),
    ] = None
    offline: Annotated[bool | None, flag(ENGINE, "--offline", help="Never use the network.")] = None


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen; see SamplingParams."""

    temperature: Annotated[float | None, _sampling("temperature")] = None
    dynatemp_range: Annotated[float | None, _sampling("dynatemp_range")] = None
    dynatemp_exponent: Annotated[float | None, _sampling("dynatemp_exponent")] = None
    top_k: Annotated[int | None, _sampling("top_k", "N")] = None
    top_p: Annotated[float | None, _sampling("top_p")] = None
    min_p: Annotated[float | None, _sampling("min_p")] = None
    repeat_penalty: Annotated[float | None, _sampling("repeat_penalty")] = None
    repeat_last_n: Annotated[int | None, _sampling("repeat_last_n", "N")] = None
    presence_penalty: Annotated[float | None, _sampling("presence_penalty")] = None
    frequency_penalty: Annotated[float | None, _sampling("frequency_penalty")] = None
    logit_bias: Annotated[
        list[str] | None,
        flag(
            SAMPLING,
            "--logit-bias",
            help="Add to a token's logit; -inf bans it. Repeatable.",
            metavar="ID=BIAS",
        ),
    ] = None
    seed: Annotated[
        int | None,
        flag(
            SAMPLING,
            "-s",
            "--seed",
            help="Seed of the draws. (default: random, and shown; 0 in a batch)",
            metavar="N",
        ),
    ] = None
    max_tokens: Annotated[
        int | None,
        flag(SAMPLING, "--max-tokens", help="Stop after this many tokens. (default: 1024)", metavar="N"),
    ] = None
    stop: Annotated[
        list[str] | None, flag(SAMPLING, "--stop", help="Stop before this text. Repeatable.", metavar="TEXT")
    ] = None


@dataclass(frozen=True)
class EMOptions:
    """The entropy-minimizing step; see EMInf and AdaptiveTemperature."""

    em_inf: Annotated[
        bool | None, flag(EM, "--em-inf/--no-em-inf", help="Minimize each token's entropy while decoding.")
    ] = None
    adaptive_temperature: Annotated[
        bool | None,
        flag(
            EM,
            "--adaptive-temp/--no-adaptive-temp",
            help="Cool each token to a target entropy instead.",
        ),
    ] = None
    em_preset: Annotated[
        Preset | None,
        flag(
            EM,
            "--em-preset",
            help="EM-INF settings: paper is eq. 5, em-pt the authors' code. Implies --em-inf.",
        ),
    ] = None
    em_threshold: Annotated[
        float | None,
        flag(EM, "--em-threshold", help="δ in nats: leave rows below it alone. (default: 0.3)", metavar="X"),
    ] = None
    em_steps: Annotated[
        int | None, flag(EM, "--em-steps", help="Most gradient steps per token. (default: 10)", metavar="N")
    ] = None
    em_learning_rate: Annotated[
        float | None, flag(EM, "--em-learning-rate", help="η, size of a step. (default: 2)", metavar="X")
    ] = None
    em_optimizer: Annotated[
        Optimizer | None, flag(EM, "--em-optimizer", help="How steps are taken. (default: sgd)")
    ] = None
    em_kl_weight: Annotated[
        float | None,
        flag(EM, "--em-kl-weight", help="κ, weight of KL(original ‖ new). (default: 0)", metavar="X"),
    ] = None
    em_ratio: Annotated[
        float | None,
        flag(
            EM,
            "--em-ratio",
            help="α of adaptive temperature: share of the entropy kept. (default: 0.5)",
            metavar="X",
        ),
    ] = None


@dataclass(frozen=True)
class PromptOptions:
    """What is said before the answer."""

    system: Annotated[str | None, typer.Option("--system", help="System message.", metavar="TEXT")] = None
    raw: Annotated[bool, typer.Option("--raw", help="Send the prompt as it is, without chat template.")] = (
        False
    )


def check_roles(raw: bool, system: str | None) -> None:
    """Raise UsageError where a system message has no template to go into."""
    if raw and system is not None:
        raise UsageError("--raw and --system contradict each other: without a template there are no roles")


@dataclass(frozen=True)
class OutputOptions:
    """What is shown and written beside the answer."""

    show_entropy: Annotated[
        bool, flag(OUTPUT, "--show-entropy", help="Colour the answer by each token's entropy before EM.")
    ] = False
    trace: Annotated[
        Path | None, flag(OUTPUT, "--trace", help="Write one JSON line per token.", metavar="FILE")
    ] = None
    quiet: Annotated[bool, flag(OUTPUT, "-q", "--quiet", help="No notes and no statistics on stderr.")] = (
        False
    )


def with_options(verb: Callable[..., R]) -> Callable[..., R]:
    """Let `verb` take groups of flags; see the module."""
    signature = inspect.signature(verb)
    hints = get_type_hints(verb, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = []
    for name, parameter in signature.parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        group_hints = get_type_hints(groups[name], include_extras=True)
        parameters += [
            inspect.Parameter(
                f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=group_hints[f.name]
            )
            for f in fields(groups[name])
        ]

    @functools.wraps(verb)
    def flat(**values: Any) -> R:
        for name, cls in groups.items():
            values[name] = cls(**{f.name: values.pop(f.name) for f in fields(cls)})
        return verb(**values)

    flat.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {p.name: p.annotation for p in parameters}
    del flat.__wrapped__  # or typer would look through to `verb`
    return flat
