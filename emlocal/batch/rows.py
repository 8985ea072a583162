"""Output rows: emlocal's own, and lines of OpenAI's batch output."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emlocal.generation import Completion
from emlocal.generation.sample import summarize
from emlocal.methods import Outcome
from emlocal.methods.confidence import Confidence
from emlocal.methods.scoring import scores_json

Row = dict[str, Any]
_ANSWERS = ("text", "answer")
"""What a row has of the answer; where it is withheld, these are null."""
_ENDINGS = {"stop": "stop", "length": "length", "context": "length", "cancelled": "stop"}


@dataclass(frozen=True)
class AnsweredLine:
    """A line with its answer."""

    key: str
    custom_id: str
    model: str
    method: str
    seed: int
    outcome: Outcome
    extra: Mapping[str, Any]
    """Fields of the line that are carried through."""
    entropies: bool = False
    """Whether emlocal's row has the entropy of each token."""
    confidence: Confidence | None = None
    abstained: bool | None = None
    """Whether the answer is withheld, because it is not sure enough; None: nobody asked for that."""


def own_row(answered: AnsweredLine) -> Row:
    """emlocal's row."""
    outcome = answered.outcome
    chosen = outcome.completion
    row: Row = {
        "custom_id": answered.custom_id,
        "text": chosen.text,
        "finish_reason": chosen.finish_reason,
        "prompt_tokens": outcome.timings.prompt_tokens,
        "cached_tokens": outcome.timings.cached_tokens,
        "completion_tokens": outcome.generated_tokens,
        "forward_passes": sum(job.forward_passes for job in outcome.jobs),
        "seconds": round(sum(job.seconds for job in outcome.jobs), 4),
        "entropy": summarize(chosen.draws).as_json(),
        "scores": scores_json(chosen),
        **({} if answered.confidence is None else answered.confidence.as_json()),
        "method": answered.method,
        "model": answered.model,
        "seed": answered.seed,
        **outcome.fields,
    }
    if len(outcome.completions) > 1:
        row["samples"] = [_sample(c) for c in outcome.completions]
    if answered.abstained is not None:
        row["abstained"] = answered.abstained
    if answered.abstained:
        row["withheld"] = {name: row[name] for name in _ANSWERS if name in row}
        row |= dict.fromkeys(row["withheld"])
    if outcome.drafts:
        row["rounds"] = [*outcome.drafts]
    if answered.entropies:
        row["entropies"] = {
            "before": [round(draw.entropy_before, 3) for draw in chosen.draws],
            "after": [round(draw.entropy_after, 3) for draw in chosen.draws],
        }
    if answered.extra:
        row["kept"] = dict(answered.extra)
    return row | {"key": answered.key}


def _sample(completion: Completion) -> Row:
    return {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "completion_tokens": len(completion.tokens),
        "entropy": summarize(completion.draws).as_json(),
        "scores": scores_json(completion),
    }


def openai_row(answered: AnsweredLine) -> Row:
    """A line as OpenAI's batch output has it; what it has no place for is under "emlocal"."""
    own = own_row(answered)
    beside = ["entropy", "scores", "confidence", "confidence_from", "calibrated", "abstained", "withheld"]
    beside += ["method", "seed", "forward_passes", "seconds", *answered.outcome.fields, "kept"]
    withheld = answered.outcome.index if answered.abstained else None
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": None if i == withheld else c.text},
            "finish_reason": _ENDINGS[c.finish_reason],
            "logprobs": None,
        }
        for i, c in enumerate(answered.outcome.completions)
    ]
    body = {
        "id": f"emlocal-{answered.key}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": answered.model,
        "choices": choices,
        "usage": {
            "prompt_tokens": own["prompt_tokens"],
            "completion_tokens": own["completion_tokens"],
            "total_tokens": own["prompt_tokens"] + own["completion_tokens"],
        },
        "emlocal": {name: own[name] for name in beside if name in own},
    }
    response = {"status_code": 200, "request_id": f"emlocal-{answered.key}", "body": body}
    return {"id": answered.key, "custom_id": answered.custom_id, "response": response, "error": None}


def error_row(key: str, custom_id: str | None, line: int, message: str, *, openai: bool) -> Row:
    """A line that could not be answered."""
    if openai:
        error = {"code": "invalid_request", "message": message, "line": line}
        return {"id": key, "custom_id": custom_id, "response": None, "error": error}
    return {"custom_id": custom_id, "error": message, "line": line, "key": key}


def key_of(row: Mapping[str, object]) -> str:
    """The key of a row of either form; raises KeyError where it has none."""
    key = row["id"] if "response" in row else row["key"]
    if not isinstance(key, str):
        raise KeyError("key")
    return key


def is_error(row: Mapping[str, object]) -> bool:
    """Whether a row of either form stands for a failure."""
    return row.get("error") is not None
