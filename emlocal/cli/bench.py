"""The command `emlocal bench`: measures the speed of a model on this machine, and the cost of EM."""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emlocal import __version__, console
from emlocal.cli.options import open_backend, with_options
from emlocal.errors import UsageError
from emlocal.settings import EM_STEPS, Given, resolve_settings
from emlocal.settings.em import EM, switch_of
from emlocal.settings.options import NO_GUESSES, EngineOptions
from emlocal.settings.table import NOTHING, options_of

if TYPE_CHECKING:
    from emlocal.backends.base import Backend
    from emlocal.generation import Scheduler
    from emlocal.measure import Ratio
    from emlocal.settings import SamplingParams

_SAMPLED_ROWS = 48
_CHANCES = (0.5, 0.8, 0.95)
"""How often a guess is right: the shares for which the gain of speculation is shown."""
_PROMPT_TOKENS = 256


@with_options
def bench(
    tokens: Annotated[
        int,
        typer.Option(
            "--tokens", help="Set the number of tokens that each side decodes per round.", metavar="N"
        ),
    ] = 32,
    rounds: Annotated[
        int,
        typer.Option(
            "--rounds", help="Set the number of rounds; more rounds give narrower intervals.", metavar="N"
        ),
    ] = 12,
    seed: Annotated[int, typer.Option("-s", "--seed", help="Set the seed of all draws.", metavar="N")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of tables.")] = False,
    given: Annotated[Given, EM, NO_GUESSES] = NOTHING,
) -> None:
    """Measure speed and the cost of entropy minimization.

    Decoding runs in rounds. In each round three sides decode equally many tokens after the same
    prompt: a bare llama.cpp loop (llama_decode and argmax), emlocal with EM off, and emlocal with EM on.
    They use the same positions and draws, and ignore end tokens. A ratio is the median over the rounds with
    its 95 % interval, or with the range of the rounds if there are fewer than six. A token's time includes
    the forward pass, the sampler and the assembly of text. It excludes the prompt and the terminal.
    """
    from emlocal.generation import interruptible
    from emlocal.settings.resolve import read_config

    if tokens < 1 or rounds < 1:
        raise UsageError("--tokens and --rounds must be at least 1")
    config = read_config()
    layers = ("flag", _with_em(given, config)), ("config", config)
    resolved = resolve_settings(*layers)
    options = options_of(EngineOptions, *layers)
    # An exception in the callback of a prefill would be lost, so the flag is checked between measurements.
    with interruptible() as cancelled, console.progress() as progress:

        def say(text: str) -> None:
            if cancelled():
                raise KeyboardInterrupt
            progress(text, 0, None)

        say("loading the model")
        started = time.perf_counter()
        with open_backend(options, sequences=2, quiet=as_json) as backend:
            load_seconds = time.perf_counter() - started
            params = resolved.with_model(backend.info.sampling).params
            measured = _measure(backend, params, (tokens, rounds, seed), load_seconds, say)
    if as_json:
        console.print_json(measured)
    else:
        _show(measured)


def _with_em(given: Given, config: Given) -> Given:
    """Adds the EM step to measure: the requested one, or EM-INF."""
    if given.get("em_inf") is False:
        raise UsageError(
            "bench compares decoding with and without EM; --no-em-inf leaves one side only", "leave it out"
        )
    asking = ("em_preset", *(switch_of(step).name for step in EM_STEPS))
    asked = any(layer.get(name) for layer in (given, config) for name in asking)
    return given if asked else {**given, "em_inf": True}


def _measure(
    backend: "Backend",
    params: "SamplingParams",
    size: tuple[int, int, int],
    load_seconds: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measures everything that `bench` reports, in the layout of --json."""
    from emlocal import machine, measure
    from emlocal.generation import Scheduler

    tokens, rounds, seed = size
    measure.check_room(backend, tokens)
    runner = Scheduler(backend, 1)
    say("first token")
    first = _first_token(runner, params, seed) | {"load_seconds": round(load_seconds, 4)}
    say("reading prompts")
    prompt_length = min(_PROMPT_TOKENS, backend.context // 2)
    runner.forget()
    prompt_speed = measure.prompt_speed(backend, prompt_length)
    decoded = measure.measure_decoding(
        runner,
        params,
        tokens=tokens,
        rounds=rounds,
        seed=seed,
        progress=lambda done: say(f"decoding, round {done + 1} of {rounds}"),
        expected=lambda seconds: _warn_if_long(seconds, tokens, rounds),
    )
    say("passes of several rows")
    runner.forget()
    costs = measure.pass_costs(backend)
    say("sampling")
    rows = measure.recorded_rows(runner, params, rows=_SAMPLED_ROWS, seed=seed)
    times = measure.measure_sampler(rows, params, seed=seed)
    return {
        "emlocal": __version__,
        "machine": machine.describe(),
        "model": backend.info.name,
        "backend": backend.name,
        "runs_as": backend.describe(),
        "vocabulary": backend.info.vocabulary,
        "settings": {"tokens": tokens, "rounds": rounds, "seed": seed, "em": _settings(params)},
        "decode": _decode_json(decoded),
        "sampler": {
            "rows": len(rows),
            "off_microseconds": round(times.off, 1),
            "on_microseconds": round(times.on, 1),
            "numpy_microseconds": round(times.plain, 1),
            "on_over_numpy": asdict(times.plain_over_on),
            "paths": [asdict(path) for path in times.paths],
        },
        "prompt": {"tokens": prompt_length, "tokens_per_second": round(prompt_speed, 1)},
        "first_token": first,
        "passes": {
            "relative_seconds": {str(size): round(cost, 3) for size, cost in costs.items()},
            "speculation": {
                str(chance): round(measure.speculation_gain(costs, chance), 2) for chance in _CHANCES if costs
            },
        },
        "memory": {"engine_bytes": backend.memory_bytes(), "resident_bytes": machine.resident_bytes()},
    }


def _warn_if_long(seconds: float, tokens: int, rounds: int) -> None:
    from emlocal.text import counted, long_run

    why = f"{counted(rounds, 'round')} of {counted(tokens, 'token')} on each side"
    for line in long_run(seconds, why, "--rounds or --tokens"):
        console.note(line)


def _settings(params: "SamplingParams") -> dict[str, Any]:
    return {"step": type(params.em).__name__, **asdict(params)["em"], "temperature": params.temperature}


def _decode_json(decoded: Any) -> dict[str, Any]:
    def ratio(side: str, reference: str) -> dict[str, Any] | None:
        found: Ratio | None = decoded.ratio(side, reference)
        return asdict(found) if found else None

    speeds = {side: decoded.speed(side) for side in decoded.seconds}
    drawn = decoded.tokens * len(decoded.seconds["on"])
    return {
        **{f"{side}_tokens_per_second": speed and round(speed, 2) for side, speed in speeds.items()},
        "on_over_off": ratio("on", "off"),
        "off_over_bare": ratio("off", "bare"),
        "on_over_bare": ratio("on", "bare"),
        "touched": round(decoded.touched / (drawn + len(decoded.seconds["on"])), 4),
    }


def _first_token(runner: "Scheduler", params: "SamplingParams", seed: int) -> dict[str, float]:
    """Times the first token of a loaded model: prefill, and the rest (template, tokenizer, draw)."""
    from emlocal.generation import Job, Request
    from emlocal.measure import PROMPTS, question_tokens
    from emlocal.sampling import Uniforms

    started = time.perf_counter()
    prompt = question_tokens(runner.backend, PROMPTS[0])
    events = runner.follow([Job(prompt, [Request(params, Uniforms(seed), 1)], at_once=True)])
    handle = next(events).handle
    total = time.perf_counter() - started
    for _ in events:
        pass
    prefill = handle.timings.prompt_seconds
    return {
        "prompt_tokens": len(prompt),
        "prefill_seconds": round(prefill, 4),
        "rest_seconds": round(total - prefill, 4),
    }


def _show(measured: dict[str, Any]) -> None:
    """Prints the measurements as a table."""
    from emlocal.text import counted, human_size

    machine, decode, sampler = measured["machine"], measured["decode"], measured["sampler"]
    first, memory, settings = measured["first_token"], measured["memory"], measured["settings"]
    resident = memory["resident_bytes"]
    rows = [
        ("machine", f"{machine['cpu']}, {machine['physical_cores']} cores, {machine['system']}"),
        ("model", f"{measured['model']} on {measured['backend']}, {measured['runs_as']}"),
        ("EM", ", ".join(f"{k} {v}" for k, v in settings["em"].items())),
        ("", ""),
        ("decode, EM off", _speed(decode["off_tokens_per_second"])),
        (
            "decode, EM on",
            f"{_speed(decode['on_tokens_per_second'])}; {decode['touched']:.0%} of tokens touched",
        ),
        ("bare llama.cpp", _speed(decode["bare_tokens_per_second"])),
        ("EM on / off", _ratio(decode["on_over_off"])),
        ("emlocal / bare", _ratio(decode["off_over_bare"])),
        ("", ""),
        ("sampler, EM off", f"{sampler['off_microseconds']:.0f} µs a row of {measured['vocabulary']:,}"),
        ("sampler, EM on", f"{sampler['on_microseconds']:.0f} µs"),
        *(
            (f"  {p['name']}", f"{p['microseconds']:.0f} µs ({counted(p['rows'], 'row')})")
            for p in sampler["paths"]
        ),
        ("plain numpy", f"{sampler['numpy_microseconds']:.0f} µs (softmax, cumulative sum, search)"),
        ("", ""),
        (
            "prompt",
            f"{measured['prompt']['tokens_per_second']:.1f} tok/s ({measured['prompt']['tokens']} tokens)",
        ),
        (
            "first token",
            f"load {first['load_seconds']:.2f} s, prefill of {first['prompt_tokens']} tokens"
            f" {first['prefill_seconds']:.2f} s, rest {first['rest_seconds']:.3f} s",
        ),
        *_passes(measured["passes"]),
        (
            "memory",
            f"engine {human_size(memory['engine_bytes'])}"
            + (f", process {human_size(resident)}" if resident else ""),
        ),
    ]
    console.pairs(rows)


def _passes(passes: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the lines on passes of several rows, which speculation uses; none if the engine has none."""
    costs, gains = passes["relative_seconds"], passes["speculation"]
    if not costs:
        return []
    shown = ", ".join(f"{gain:.2f}× at {float(chance):.0%}" for chance, gain in gains.items())
    return [
        (
            f"pass of {', '.join(costs)} rows",
            ", ".join(f"{cost:.2f}" for cost in costs.values()) + " of one row's time",
        ),
        ("speculation", f"at best {shown} of guesses right"),
    ]


def _speed(tokens_per_second: float | None) -> str:
    return "not measured" if tokens_per_second is None else f"{tokens_per_second:.1f} tok/s"


def _ratio(ratio: dict[str, Any] | None) -> str:
    from emlocal.measure import Ratio

    return "not measured" if ratio is None else str(Ratio(**ratio))
