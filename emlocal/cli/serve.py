"""`emlocal serve`: an OpenAI-compatible server on this machine."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from emlocal import __version__, console
from emlocal.cli.options import calibration_in, open_for_batch, warn_of_mismatch, with_options
from emlocal.errors import UsageError
from emlocal.methods import HOW, chosen_by
from emlocal.settings import Given, Resolved, resolve_settings
from emlocal.settings.confidence import CONFIDENCE, ConfidenceOptions
from emlocal.settings.em import EM
from emlocal.settings.options import NO_GUESSES, EngineOptions
from emlocal.settings.resolve import SAMPLING
from emlocal.settings.table import NOTHING, options_of, setting

if TYPE_CHECKING:
    from emlocal.backends.base import Backend
    from emlocal.loading import Loaded, NamedAdapters
    from emlocal.serve.guard import PublicURL
    from emlocal.serve.protocol import House

CONTEXT = 4096
"""Tokens of a conversation, where nobody says: each has this room to itself."""


@dataclass(frozen=True)
class ServeOptions:
    """Where the server listens, and how much it takes."""

    host: str = setting("127.0.0.1", "--host", help="Listen on this address.", metavar="ADDRESS")
    port: int = setting(8077, "--port", 0, 65535, "Listen on this port (0 = any free one).")
    api_key_file: Path | None = setting(
        None, "--api-key-file", help="Require one of the keys in this file, one a line.", metavar="FILE"
    )
    public_url: str | None = setting(
        None,
        "--public-url",
        help="Answer to this address, too: that of a proxy in front of the server.",
        metavar="URL",
    )
    parallel: int = setting(
        4, "--parallel --max-num-seqs --np", 1, 256, "Set the number of answers written at the same time."
    )
    deterministic: bool = setting(
        False,
        "--deterministic",
        help="Make answers independent of other requests to the last bit; slower (docs/serving.md).",
    )
    queue: int = setting(
        64, "--queue", 0, 10_000, "Let this many requests wait; refuse more with status 429."
    )
    grace: float = setting(
        30.0,
        "--grace",
        0,
        86_400,
        "Give running answers this many seconds at Ctrl-C or SIGTERM.",
        unit="seconds",
    )
    system: str | None = setting(
        None,
        "--system --system-prompt",
        help="Add this system message to conversations without one.",
        metavar="TEXT",
    )
    quiet: bool = setting(False, "-q --quiet", help="Write only errors to stderr.")


@with_options
def serve(
    run: ServeOptions = ServeOptions(),
    how: Annotated[Given, HOW] = NOTHING,
    given: Annotated[Given, CONFIDENCE, EM, SAMPLING, NO_GUESSES] = NOTHING,
) -> None:
    """Serve a model over HTTP to any client of OpenAI's API.

    Clients find it at http://127.0.0.1:8077/v1. A request may set any sampling, EM or method setting by its
    name in a batch line. The flags set the defaults. --adapter NAME=PATH serves an adapter as model NAME.
    """
    from emlocal.backends.fixed_shapes import fixed_shapes
    from emlocal.generation.adapters import runner_of
    from emlocal.loading import add_adapters, named_apart
    from emlocal.methods.confidence import subject_of
    from emlocal.methods.hints import without_effect
    from emlocal.serve.guard import PublicURL
    from emlocal.serve.server import Server, Terms, bind, is_loopback, read_keys
    from emlocal.settings.resolve import read_config

    layers = ("flag", given), ("config", read_config())
    resolved = resolve_settings(*layers)
    chosen_by(how).plan(resolved.plan, resolved.chosen)  # what contradicts itself fails before the load
    sure = options_of(ConfidenceOptions, *layers)
    calibration = calibration_in(sure.calibration)
    keys = read_keys(run.api_key_file)
    public = None if run.public_url is None else PublicURL.read(run.public_url)
    sockets = bind(run.host, run.port)
    try:
        if not keys and not is_loopback(sockets):
            raise UsageError(
                f"--host {run.host} lets other machines connect, and there is no key",
                "give --api-key-file FILE, or leave --host out",
            )
        if public is not None and not keys and not run.quiet:
            console.warn(
                f"{public.origin} answers everybody who reaches it: give --api-key-file, or let the proxy ask"
            )
        options = options_of(EngineOptions, *layers)
        unnamed, named = named_apart(options.adapter)
        if run.deterministic and named:
            raise UsageError("--deterministic has no adapters by name", "leave out NAME= or --deterministic")
        options = replace(options, adapter=unnamed)
        kept = max(2, run.parallel // 2)
        with open_for_batch(options, run.parallel, quiet=run.quiet, spare=kept, context=CONTEXT) as model:
            backend = fixed_shapes(model.backend) if run.deterministic else model.backend
            numbers = add_adapters(model, named, console.warn) if named else {}
            house = _house(model, backend, resolved, how, run, sure, calibration, named)
            warn_of_mismatch(calibration, subject_of(house.name, house.settings.method, house.settings.plan))
            for text in () if run.quiet else without_effect(house.settings.plan, backend.info):
                console.warn(text)
            server = Server(
                house,
                runner_of(backend, run.parallel, numbers),
                sockets,
                Terms(run.parallel, run.queue, run.grace, keys, public),
                ready=lambda: _say_where(run, sockets[0].getsockname()[1], house.name, public),
                warn=console.warn,
            )
            with server.ended_by_signals():
                server.run()
    finally:
        for each in sockets:
            each.close()
    if not run.quiet:
        console.note("the server has ended")


def _house(
    model: "Loaded",
    backend: "Backend",
    resolved: Resolved,
    how: Given,
    run: ServeOptions,
    sure: ConfidenceOptions,
    calibration: object,
    named: "NamedAdapters",
) -> "House":
    """The model, and how it answers where a request does not say otherwise."""
    from emlocal.batch.lines import digest
    from emlocal.batch.run import BatchSettings
    from emlocal.methods.confidence import Calibration
    from emlocal.serve.protocol import House

    assert calibration is None or isinstance(calibration, Calibration)
    resolved = resolved.with_model(backend.info.sampling)
    method = chosen_by(how)
    settings = BatchSettings(
        method.plan(resolved.plan, resolved.chosen),
        method,
        resolved.chosen,
        run.system,
        calibration=calibration,
        abstain_below=sure.abstain_below,
    )
    adapters = [f"{path}={scale}" for path, scale in model.adapters]
    adapters += [f"{name}={path}={scale}" for name, (path, scale) in named.items()]
    quantization = model.model.header.quantization
    identity = digest(
        backend.info.name, quantization, model.backend.name, backend.arithmetic, __version__, *adapters
    )
    return House(backend, resolved, settings, how, int(time.time()), f"emlocal-{identity[:12]}", [*named])


def _say_where(run: ServeOptions, port: int, model: str, public: "PublicURL | None" = None) -> None:
    """Prints the addresses of the API and of the page, and a request to copy."""
    if run.quiet:
        return
    host = f"[{run.host}]" if ":" in run.host else run.host
    local = f"http://{host}:{port}"
    address = public.origin if public else local
    if public is not None:
        console.note(f"the proxy at {public.origin} must pass requests on to {local}")
    console.note(f"{model} answers at {address}/v1, {run.parallel:,} requests at a time; Ctrl-C ends it")
    console.note(f"open {address}/ in a browser for a chat, or ask from a shell:")
    request = ["curl", f"{address}/v1/chat/completions", "-H", "Content-Type: application/json"]
    if run.api_key_file is not None:
        request += ["-H", "Authorization: Bearer KEY"]
    console.command([*request, "-d", '{"messages": [{"role": "user", "content": "Hi"}]}'])
