"""Requests in a vLLM that runs: what each gets does not depend on the others."""

import random
from collections import defaultdict
from typing import Any

from vllm import SamplingParams

PREFIX = "You are a helpful assistant. You answer in one short sentence, and you are always polite. "
QUESTIONS = ["Name a colour.", "What is 2 + 2?", "Name a city in France.", "Say hello."]
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"em_inf": 1},
    {"em_inf": 1, "em_draw": 1},
    {"em_preset": "paper", "em_draw": 1},
    {"adaptive_temp": 1, "em_draw": 1},
    {"em_draw": 1},
)
TOKENS = 10


def asked(i: int) -> tuple[str, SamplingParams]:
    """Request i: greedy, or drawn by emlocal's uniforms. Every second prompt is longer than a part of 64.

    No request has a seed of vLLM's: with prompts in parts, vLLM 0.32 on CPUs fails.
    """
    kind = dict(KINDS[i % len(KINDS)])
    if kind:
        kind |= {"em_id": f"request {i}", "em_record": 1, "em_seed": i}
    temperature = 1.0 if kind.get("em_draw") else 0.0
    prompt = PREFIX * (1 + 4 * (i % 2)) + QUESTIONS[i % len(QUESTIONS)]
    own = SamplingParams(temperature=temperature, max_tokens=TOKENS, ignore_eos=True, extra_args=kind or None)
    return prompt, own


def test_each_of_64_requests_is_answered_as_alone(llm: Any) -> None:
    """Random arrivals and aborts, prefix cache on; the entropies, too."""
    chance = random.Random(0)
    engine = llm.llm_engine
    waiting, aborted = list(range(64)), set[int]()
    chance.shuffle(waiting)
    found: dict[int, list[int]] = {}
    running: set[int] = set()
    while waiting or running:
        for _ in range(min(len(waiting), chance.randrange(4))):
            i = waiting.pop()
            prompt, own = asked(i)
            engine.add_request(str(i), prompt, own)
            running.add(i)
        if running and chance.random() < 0.08:
            i = chance.choice(sorted(running))
            engine.abort_request([str(i)])
            running.discard(i)
            aborted.add(i)
        for output in engine.step():
            i = int(output.request_id)
            if output.finished and i in running:
                found[i] = list(output.outputs[0].token_ids)
                running.discard(i)
    together = entropies(llm)
    assert len(found) + len(aborted) == 64
    assert len(aborted) >= 5
    for i, tokens in sorted(found.items()):
        prompt, own = asked(i)
        alone = llm.generate([prompt], own, use_tqdm=False)[0].outputs[0].token_ids
        assert tokens == list(alone), (i, KINDS[i % len(KINDS)])
    alone_entropies = entropies(llm)
    for key in alone_entropies.keys() & together.keys():
        for token, values in alone_entropies[key].items():
            for one, other in zip(values, together[key][token], strict=True):
                assert abs(one - other) < 1e-3
    recorded = [i for i in found if KINDS[i % len(KINDS)]]
    assert len(alone_entropies) == len(recorded)
    assert all(sorted(tokens) == list(range(TOKENS)) for tokens in alone_entropies.values())


def entropies(llm: Any) -> dict[int, dict[int, tuple[float, float, int]]]:
    found: dict[int, dict[int, tuple[float, float, int]]] = defaultdict(dict)
    for records in llm.collective_rpc("em_entropies"):
        for key, _, token, *values in records:
            found[key][token] = tuple(values)
    return found


def test_samples_of_one_request_have_draws_of_their_own(llm: Any) -> None:
    own = {"em_draw": 1, "em_id": "n", "em_seed": 3}
    many = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=6, ignore_eos=True, extra_args=own)
    texts = [list(each.token_ids) for each in llm.generate(["Hello"], many, use_tqdm=False)[0].outputs]
    assert len({tuple(each) for each in texts}) == 3
    second = SamplingParams(temperature=1.0, seed=4, max_tokens=6, ignore_eos=True, extra_args=own)
    assert list(llm.generate(["Hello"], second, use_tqdm=False)[0].outputs[0].token_ids) == texts[1]


def test_a_bias_is_seen_and_a_grammar_is_kept(llm: Any) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    choice = StructuredOutputsParams(choice=["yes", "no"])
    own = SamplingParams(
        temperature=1.0,
        max_tokens=6,
        seed=1,
        structured_outputs=choice,
        extra_args={"em_inf": 1, "em_draw": 1},
    )
    for output in llm.generate(["Is water wet?", "Is fire cold?"], own, use_tqdm=False):
        assert output.outputs[0].text in ("yes", "no")
    token = 100
    biased = SamplingParams(
        temperature=1.0,
        max_tokens=2,
        seed=1,
        logit_bias={token: 100.0},
        extra_args={"em_inf": 1, "em_draw": 1},
    )
    assert list(llm.generate(["Hi"], biased, use_tqdm=False)[0].outputs[0].token_ids) == [token, token]
