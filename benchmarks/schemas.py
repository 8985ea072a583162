"""Constrained output: do answers meet their JSON schemas, and what does a schema cost?

    python benchmarks/schemas.py answers --models smollm2-135m --engine llama.cpp --max-tokens 160
    python benchmarks/schemas.py speed --models qwen2.5-coder-0.5b --rounds 10

`answers` asks for each of 20 schemas with EM off and on, and holds each answer that ends by itself against
`jsonschema`. `speed` decodes the same prompt with and without a schema, in pairs whose order alternates: the
ratio of a pair is of rates, tokens a second of the processor's time: with one thread others hardly change it.
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from common import MODELS, say

NAMED = {"type": "string", "minLength": 1, "maxLength": 24}


def record(**properties: Any) -> dict[str, Any]:
    """An object with these properties, all of them required."""
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }


def schemas() -> dict[str, dict[str, Any]]:
    """Name → schema: flat and nested, unions, references, patterns, ranges, formats."""
    point = record(x={"type": "number", "minimum": -10, "maximum": 10}, y={"type": "integer"})
    tree = {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": record(
                value={"type": "integer", "minimum": 0, "maximum": 99},
                children={"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            )
        },
    }
    return {
        "person": record(name=NAMED, age={"type": "integer", "minimum": 0, "maximum": 130}),
        "verdict": record(
            answer={"enum": ["yes", "no", "unknown"]}, reason={"type": "string", "maxLength": 60}
        ),
        "boolean": {"type": "boolean"},
        "null or integer": {"anyOf": [{"type": "null"}, {"type": "integer"}]},
        "short text": {"type": "string", "minLength": 3, "maxLength": 12},
        "colours": {
            "type": "array",
            "items": {"enum": ["red", "green", "blue"]},
            "minItems": 2,
            "maxItems": 4,
        },
        "numbers": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 4},
        "point": point,
        "points": {"type": "array", "items": point, "minItems": 2, "maxItems": 2},
        "tree": tree,
        "date": record(day={"type": "string", "format": "date"}, at={"type": "string", "format": "time"}),
        "plate": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,4}$"},
        "shape": {
            "anyOf": [
                record(kind={"const": "circle"}, radius={"type": "number"}),
                record(kind={"const": "square"}, side={"type": "number"}),
            ]
        },
        "call": record(
            name={"enum": ["search", "open"]},
            arguments=record(query=NAMED, limit={"type": "integer", "minimum": 1, "maximum": 50}),
        ),
        "optional": {
            "type": "object",
            "properties": {"a": {"type": "boolean"}, "b": {"type": "integer"}, "c": NAMED},
            "required": ["b"],
            "additionalProperties": False,
        },
        "scores": {
            "type": "object",
            "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 9},
            "maxProperties": 3,
        },
        "pair": {
            "type": "array",
            "prefixItems": [NAMED, {"type": "boolean"}],
            "items": False,
            "minItems": 2,
        },
        "unicode": {"enum": ["Zürich", "Kraków", "東京", "São Paulo"]},
        "deep": record(a=record(b=record(c=record(d=record(e={"type": "boolean"}))))),
        "address": record(
            street=NAMED, number={"type": "integer"}, country={"type": "string", "pattern": "^[A-Z]{2}$"}
        ),
    }


def runners(model: str, engine: str, parallel: int) -> Any:
    """The model, loaded. The tiny one is for engines that would take too long."""
    import emlocal

    path = str(MODELS.get(model, model))
    return emlocal.load(path, parallel=parallel, backend=engine, threads=1, context=1024)


def lines(most: int, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    for seed in seeds:
        for name, wanted in schemas().items():
            yield {
                "custom_id": f"{name} {seed}",
                "prompt": f"Answer with an example of JSON for: {name}.",
                "json_schema": wanted,
                "seed": seed,
                "max_tokens": most,
            }


def answers(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    import jsonschema

    wanted = schemas()
    found = []
    for model in chosen.models:
        loaded = runners(model, chosen.engine, chosen.parallel)
        for em in (False, True):
            counts: Counter[str] = Counter()
            tokens = 0
            for row in loaded.batch(lines(chosen.max_tokens, chosen.seeds), em=em):
                if row.get("error"):
                    sys.exit(f"{row['custom_id']}: {row['error']}")
                counts["answers"] += 1
                tokens += row["completion_tokens"]
                ended = row["finish_reason"] == "stop"
                counts["ended" if ended else "cut off"] += 1
                if not ended and not row["complete"]:
                    continue
                counts["cut off, but complete"] += not ended  # of a number the beginning is one
                name = row["custom_id"].rpartition(" ")[0]
                try:
                    jsonschema.validate(json.loads(row["text"]), wanted[name])
                    counts["valid"] += row["complete"] is True
                except (ValueError, jsonschema.ValidationError) as why:
                    say(f"{row['custom_id']}: {row['text']!r}: {str(why).splitlines()[0]}")
            found.append({"model": model, "engine": chosen.engine, "em": em, "tokens": tokens, **counts})
            say(json.dumps(found[-1]))
        loaded.close()
    return found


ENDLESS = {
    "type": "array",
    "minItems": 1000,
    "items": record(name={"type": "string"}, text={"type": "string"}, number={"type": "integer"}),
}
PROMPT = "Write a long JSON list of people, each with name, text and number."


def speed(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Rates of pairs, for one sequence and for `parallel`."""
    from emlocal.settings import EMInf

    found = []
    for model in chosen.models:
        loaded = runners(model, chosen.engine, 1)
        for parallel in (1, chosen.parallel):
            if parallel > 1:
                loaded.close()
                loaded = runners(model, chosen.engine, parallel)
            ratios, rates = [], {True: [], False: []}
            for number in range(-1, chosen.rounds):
                pair = {}
                for with_schema in (True, False) if number % 2 else (False, True):
                    pair[with_schema] = _rate(
                        loaded, parallel, with_schema, number, chosen.max_tokens, EMInf()
                    )
                if number >= 0:
                    ratios.append(pair[True] / pair[False])
                    for side, rate in pair.items():
                        rates[side].append(rate)
            ordered = sorted(ratios)
            found.append(
                {
                    "model": model,
                    "sequences": parallel,
                    "pairs": len(ratios),
                    "tokens": chosen.max_tokens,
                    "with": round(statistics.median(rates[True]), 1),
                    "without": round(statistics.median(rates[False]), 1),
                    "ratio": round(statistics.median(ratios), 3),
                    "lowest": round(ordered[0], 3),
                    "highest": round(ordered[-1], 3),
                }
            )
            say(json.dumps(found[-1]))
        loaded.close()
    return found


def _rate(loaded: Any, parallel: int, with_schema: bool, number: int, most: int, em: Any) -> float:
    """Tokens a second of decoding, prompts read before."""
    from emlocal.generation import Completed, Job, Request, Token
    from emlocal.generation.prompt import prompt_tokens
    from emlocal.sampling import SamplingParams, Uniforms
    from emlocal.settings.constraint import Constraint

    constraint = Constraint("json_schema", json.dumps(ENDLESS)) if with_schema else None
    params = SamplingParams(em=em)
    prompt = prompt_tokens(loaded.backend, [{"role": "user", "content": PROMPT}])
    requests = [
        Request(params, Uniforms(number + 2, 0, i), most, constraint=constraint) for i in range(parallel)
    ]
    stamps: list[float] = []
    handle = loaded.runner.submit(Job(prompt, requests))
    while True:
        events = loaded.runner.step()
        if any(isinstance(event, Completed) for event in events):
            break
        now = time.process_time()  # of steps with all sequences: fewer are faster
        stamps += [now for event in events if isinstance(event, Token)]
    loaded.runner.cancel(handle)
    first = parallel  # tokens of the first step, whose time is that of reading, too
    return (len(stamps) - first) / (stamps[-1] - stamps[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("answers", "speed"))
    parser.add_argument("--models", nargs="+", default=[*MODELS], help=f"{', '.join(MODELS)}, or a path")
    parser.add_argument("--engine", default="llama.cpp")
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parts: Mapping[str, Any] = {"answers": answers, "speed": speed}
    chosen = parser.parse_args()
    print(json.dumps(parts[chosen.part](chosen), indent=1))


if __name__ == "__main__":
    main()
