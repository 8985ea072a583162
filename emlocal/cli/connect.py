"""`--connect URL`: from flags to what a server is asked."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from emlocal.cli.options import BatchOptions
from emlocal.errors import UsageError
from emlocal.settings import Given
from emlocal.settings.confidence import CONFIDENCE
from emlocal.settings.em import EM
from emlocal.settings.options import ENGINE
from emlocal.settings.resolve import GENERATION, resolve_settings

if TYPE_CHECKING:
    from emlocal.remote.batch import Remote

_OWNERS = ("allow_code", "pattern")


def remote_of(run: BatchOptions, how: Given, given: Given, config: Given) -> "Remote":
    """Connects to the server that the flags name.

    Settings of the config file go along, except those of engines. Raises EmlocalError: no server, or settings
    that it cannot know.
    """
    from emlocal.remote.batch import Remote, fields_of, served
    from emlocal.remote.client import Client, api_key
    from emlocal.remote.vllm import without_em

    assert run.connect is not None
    for name, known in (ENGINE | CONFIDENCE).settings.items():
        if name in given and name != "model":
            raise UsageError(f"{known.flag} is set where the server starts", "leave it out here")
    if run.dry_run:
        raise UsageError("--dry-run needs a model here to count tokens", "leave out --connect")
    if any(how.get(name) for name in _OWNERS):
        raise UsageError("a request cannot allow code or set a pattern", "set it where the server starts")
    own = {name: value for name, value in given.items() if name in GENERATION.settings}
    kept = {name: value for name, value in config.items() if name in GENERATION.settings}
    # contradictions are errors before anything is asked
    plan = resolve_settings(("flag", own), ("config", kept)).plan
    client = Client(run.connect, api_key(run.api_key_file))
    model, kind, is_vllm = served(client, given.get("model"))
    if is_vllm and kind != "vllm" and plan.params.em is not None:
        raise UsageError(
            f"the vLLM at {run.connect} has no EM processor",
            "start it with --logits-processors emlocal_vllm.v1:EMProcessor (v2 on GPUs; docs/scale.md)",
        )
    asked = {**kept, **without_em(own)} if kind == "vllm" else {**kept, **own}
    asked = {name: value for name, value in asked.items() if kind != "vllm" or name not in EM.settings}
    fields: dict[str, Any] = {"seed": 0, **fields_of(_sent(asked), kind)}
    methods = dict(how)
    if kind != "emlocal" and "samples" in methods:
        fields["n"] = methods.pop("samples")
    fields |= fields_of(methods, kind)
    entropies = kind == "vllm" and run.form != "openai"
    return Remote(client, model, kind, fields, plan, entropies, run.system, run.raw, run.keep)


def _sent(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings as JSON has them."""
    found = dict(values)
    bias = found.get("logit_bias")
    if isinstance(bias, list | tuple) and all(isinstance(each, str) for each in bias):
        found["logit_bias"] = {token: float(b) for token, _, b in (each.partition("=") for each in bias)}
    return found
