"""`--connect URL`: from flags to what a server is asked."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emlocal.cli.options import BatchOptions
from emlocal.errors import UsageError
from emlocal.settings import Given, Plan
from emlocal.settings.confidence import CONFIDENCE
from emlocal.settings.em import EM
from emlocal.settings.options import ENGINE
from emlocal.settings.resolve import GENERATION, resolve_settings

if TYPE_CHECKING:
    from emlocal.chat.talk import Turn
    from emlocal.remote.batch import Remote, Served

_OWNERS = ("allow_code", "pattern")


def connected(url: str, key_file: Path | None, given: Given) -> "Served":
    """Connects to the server that the flags name.

    Raises EmlocalError: no server, or flags that are for an engine here.
    """
    from emlocal.remote.batch import served
    from emlocal.remote.client import Client, api_key

    for name, known in (ENGINE | CONFIDENCE).settings.items():
        if name in given and name != "model":
            raise UsageError(f"{known.flag} is set where the server starts", "leave it out here")
    return served(Client(url, api_key(key_file)), given.get("model"))


def asked_of(server: "Served", plan: Plan, how: Given, given: Given, config: Given) -> dict[str, Any]:
    """Returns the fields of a request, without those of the method.

    Args:
        plan: what the settings come to.
        how: the method and its settings.
        given: settings of the flags. Those of the config file go along, except those of engines.
    Raises UsageError for settings that the server cannot know.
    """
    from emlocal.remote.batch import fields_of
    from emlocal.remote.vllm import without_em

    if any(how.get(name) for name in _OWNERS):
        raise UsageError("a request cannot allow code or set a pattern", "set it where the server starts")
    if server.is_vllm and server.kind != "vllm" and plan.params.em is not None:
        raise UsageError(
            f"the vLLM at {server.client.url} has no EM processor",
            "start it with --logits-processors emlocal_vllm.v1:EMProcessor (v2 on GPUs; docs/scale.md)",
        )
    vllm = server.kind == "vllm"
    asked = {**config, **without_em(given)} if vllm else {**config, **given}
    asked = {name: value for name, value in asked.items() if not vllm or name not in EM.settings}
    return fields_of(_sent(asked), server.kind)


def remote_turn(server: "Served", turn: "Turn") -> "Remote":
    """Returns what the request of a chat's turn says. Raises UsageError for what the server does not know."""
    from emlocal.remote.batch import Remote

    method = turn.method.written
    if method and server.kind != "emlocal":
        raise UsageError(
            f"the server at {server.client.url} does not know the method {method}",
            "use --method with emlocal serve, or a model here",
        )
    fields = {"seed": turn.plan.seed, **asked_of(server, turn.plan, {}, turn.given, {})}
    if method:
        fields["method"] = method
    return Remote(server.client, server.model, server.kind, fields, turn.plan)


def own(values: Given) -> Given:
    """Returns the settings that a request may have."""
    return {name: value for name, value in values.items() if name in GENERATION.settings}


def remote_of(run: BatchOptions, how: Given, given: Given, config: Given) -> "Remote":
    """Connects a batch to the server that the flags name.

    Raises EmlocalError as `connected` and `asked_of` do.
    """
    from emlocal.remote.batch import Remote, fields_of

    assert run.connect is not None
    if run.dry_run:
        raise UsageError("--dry-run needs a model here to count tokens", "leave out --connect")
    # contradictions are errors before anything is asked
    plan = resolve_settings(("flag", own(given)), ("config", own(config))).plan
    server = connected(run.connect, run.api_key_file, given)
    fields: dict[str, Any] = {"seed": 0, **asked_of(server, plan, how, own(given), own(config))}
    methods = dict(how)
    if server.kind != "emlocal" and "samples" in methods:
        fields["n"] = methods.pop("samples")
    fields |= fields_of(methods, server.kind)
    entropies = server.kind == "vllm" and run.form != "openai"
    return Remote(
        server.client, server.model, server.kind, fields, plan, entropies, run.system, run.raw, run.keep
    )


def _sent(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings as JSON has them."""
    found = dict(values)
    bias = found.get("logit_bias")
    if isinstance(bias, list | tuple) and all(isinstance(each, str) for each in bias):
        found["logit_bias"] = {token: float(b) for token, _, b in (each.partition("=") for each in bias)}
    return found
