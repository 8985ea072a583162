"""Reads exact entropies back from a vLLM that runs in the same program.

    llm = LLM(model, logits_processors=[...], worker_extension_cls="emlocal_vllm.worker.Entropies")
    llm.generate(prompts, SamplingParams(extra_args={"em_inf": 1, "em_record": 1, "em_id": "line 1"}))
    records = llm.collective_rpc("em_entropies")

A server does not offer this: its clients have log-probabilities instead (docs/scale.md).
"""

from emlocal_vllm.ring import RINGS


class Entropies:
    """What `collective_rpc` can call by name."""

    def em_entropies(self) -> list[tuple[int, int, int, float, float, int]]:
        """Returns (key of em_id, sample, token, entropy before, after, steps) and forgets them."""
        found = [record for ring in RINGS.values() for record in ring.read()]
        for ring in RINGS.values():
            ring.clear()
        return found
