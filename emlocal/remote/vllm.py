"""What a vLLM with emlocal's processor (integrations/vllm) is asked, and what its log-probabilities tell.

vLLM ignores fields in `vllm_xargs` that nobody reads. So a run first sends one value out of range: a server
with the processor refuses it, a server without answers. EM would otherwise be left out without a word.
"""

import math
from collections.abc import Mapping
from typing import Any

from emlocal.em.steps.em_inf import EM_PRESETS
from emlocal.remote.client import TEXT, Client, ServerError
from emlocal.settings import Plan
from emlocal.settings.em import EM, PRESET, em_numbers, switch_of
from emlocal.settings.resolve import overridden

SAMPLING = {"top_k": "top_k", "min_p": "min_p"}
"""Settings beyond OpenAI's that vLLM knows by the same names and meanings."""
_ALTERNATIVES = 20  # log-probabilities of each token: the most that vLLM gives without a flag
_PROBE = {"em_inf": 1, "em_steps": -1}


def has_processor(client: Client, model: str) -> bool:
    """Returns whether a vLLM runs emlocal's processor. Raises ServerError."""
    body = {"model": model, "prompt": "x", "max_tokens": 1, "vllm_xargs": _PROBE}
    try:
        client.post(TEXT, body)
    except ServerError as error:
        if error.status == 400 and "em_steps" in error.message:
            return True
        raise
    return False


def said(plan: Plan) -> dict[str, Any]:
    """Returns the EM step of a plan under its request fields; empty without one."""
    step = plan.params.em
    if step is None:
        return {}
    numbers = {name: vars(step)[known.field] for name, known in em_numbers(type(step)).items()}
    return {switch_of(type(step)).name: 1, **numbers}


def with_line(plan: Plan, own: Mapping[str, Any]) -> tuple[Plan, dict[str, Any]]:
    """Returns the settings of a line, and what of its own is left to say. Raises UsageError."""
    return overridden(plan, own), without_em(own)


def without_em(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings without those of EM, with the sampling settings that a preset stands for."""
    preset = EM_PRESETS[given[PRESET.name]][1] if given.get(PRESET.name) in EM_PRESETS else {}
    return {**preset, **{name: value for name, value in given.items() if name not in EM.settings}}


def fields(plan: Plan, custom_id: str) -> dict[str, Any]:
    """Returns the fields of a request that the processor reads.

    emlocal's draw is asked for, too. Without an EM step it is left out for a line with penalties: one of
    vLLM's two runners cannot combine them.
    """
    step = said(plan)
    if not step and plan.params.penalizes:
        return {}
    return {"vllm_xargs": {**step, "em_draw": 1, "em_id": custom_id, "em_seed": plan.seed}}


def seed(body: dict[str, Any], *, chat: bool, entropies: bool) -> None:
    """Puts the seed where it is read, and asks for log-probabilities.

    Samples of one request are told apart by vLLM's own seeds. One answer needs none, and vLLM 0.32 on CPUs
    fails for seeded requests whose prompts it reads in parts.
    """
    if "vllm_xargs" in body and body.get("n", 1) == 1:
        body.pop("seed", None)
    if entropies and chat:
        body |= {"logprobs": True, "top_logprobs": _ALTERNATIVES}
    elif entropies:
        body |= {"logprobs": _ALTERNATIVES, "return_tokens_as_token_ids": True}


def entropy_at_least(choice: Mapping[str, Any]) -> float | None:
    """Returns a lower bound of the mean entropy of an answer's tokens before EM, in nats.

    None without log-probabilities. The tokens that are not listed have the rest of the mass, each at most the
    least probability listed; so their share of the entropy is at least that of tokens as probable as that.
    """
    rows = _alternatives(choice.get("logprobs"))
    if not rows:
        return None
    return round(sum(map(_bound, rows)) / len(rows), 6)


def _alternatives(found: Any) -> list[list[float]]:
    """Returns the log-probabilities of each token, of a chat or of a text."""
    if not isinstance(found, dict):
        return []
    if isinstance(found.get("content"), list):
        return [[each["logprob"] for each in token.get("top_logprobs", ())] for token in found["content"]]
    return [list(token.values()) for token in found.get("top_logprobs") or () if token]


def _bound(logprobs: list[float]) -> float:
    listed = sorted(logprobs, reverse=True)[:_ALTERNATIVES]  # the drawn token may come on top
    if not listed:
        return 0.0
    known = -sum(math.exp(each) * each for each in listed)
    rest = max(0.0, 1.0 - sum(map(math.exp, listed)))
    least = min(listed[-1], math.log(rest)) if rest > 0 else listed[-1]
    return known - rest * least
