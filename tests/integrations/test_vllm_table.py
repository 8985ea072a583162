"""The table of a vLLM batch: each row gets what its request asks for, whatever else is in the batch."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from emlocal_vllm.request import Request, read
from emlocal_vllm.ring import Ring
from emlocal_vllm.table import Table, token_index
from hypothesis import given, settings
from hypothesis import strategies as st

from emlocal.em.steps import EMInf
from emlocal.sampling.draw import Uniforms, inverse_cdf, probabilities, request_key
from emlocal.settings import SamplingParams
from tests.integrations.requests import asked_of

CPU = torch.device("cpu")
V = 400
ASKED: Sequence[dict[str, Any]] = (
    {},
    {"em_inf": 1},
    {"em_inf": 1, "em_steps": 3, "em_threshold": 0.1},
    {"em_preset": "em-pt"},
    {"adaptive_temp": 1, "em_record": 1, "em_id": "cool"},
    {"em_draw": 1, "em_id": "drawn"},
    {"em_inf": 1, "em_steps": 100, "em_draw": 1, "em_id": "both"},
    {"em_record": 1, "em_id": "seen"},
)
REQUESTS = tuple(read(replace(asked_of(extra), seed=3, top_p=0.9)) for extra in ASKED)
LOGITS = torch.from_numpy(np.random.default_rng(0).normal(size=(24, V)).astype(np.float32) * 3)


def alone(request: Request, row: torch.Tensor, token: int) -> torch.Tensor:
    table = Table(1, CPU)
    table.put(0, request)
    table.flush()
    return table.step(row[None].clone(), np.arange(1), None, token_index([token], CPU))[0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_requests_come_go_and_move(data: st.DataObject) -> None:
    """A random walk of a batch, as vLLM's V1 runner has it, beside a dictionary that says who is where."""
    table, there = Table(8, CPU), dict[int, int]()
    for step in range(data.draw(st.integers(1, 6))):
        for slot in data.draw(st.lists(st.sampled_from(sorted(there) or [0]), unique=True, max_size=3)):
            there.pop(slot, None)
            table.clear(slot)
        for slot in data.draw(st.lists(st.integers(0, 7), unique=True, max_size=4)):
            there[slot] = data.draw(st.integers(0, len(REQUESTS) - 1))
            table.put(slot, REQUESTS[there[slot]])
        for _ in range(data.draw(st.integers(0, 2)) if there else 0):
            source = data.draw(st.sampled_from(sorted(there)))
            target = data.draw(st.sampled_from([slot for slot in range(8) if slot != source]))
            swap = target in there and data.draw(st.booleans())
            table.move(source, target, swap=swap)
            there[target], other = there.pop(source), there.get(target)
            if swap and other is not None:
                there[source] = other
        table.flush()
        rows = LOGITS[step : step + 8].clone()
        tokens = list(range(8))
        if not table.any(np.arange(8)):
            assert not any(REQUESTS[i].wanted for i in there.values())
            continue
        table.step(rows, np.arange(8), None, token_index(tokens, CPU))
        for slot in range(8):
            was = LOGITS[step + slot]
            own = REQUESTS[there[slot]] if slot in there else Request("none")
            expected = alone(own, was, slot) if own.wanted else was
            torch.testing.assert_close(rows[slot], expected, rtol=0, atol=1e-5)


def test_rows_of_drafts_find_their_requests() -> None:
    """With speculation the host does not know the rows' requests; the V2 runner's layout."""
    table = Table(8, CPU)
    for slot, request in enumerate(REQUESTS):
        table.put(slot, request)
    table.flush()
    of_rows = torch.tensor([5, 5, 5, 1, 0, 6, 6, 4, 2])
    tokens = torch.tensor([7, 8, 9, 0, 1, 2, 3, 4, 5])
    rows = LOGITS[:9].clone()
    table.step(rows, np.array([5, 1, 0, 6, 4, 2]), of_rows, tokens)
    for i, (slot, token) in enumerate(zip(of_rows.tolist(), tokens.tolist(), strict=True)):
        request = REQUESTS[slot]
        expected = alone(request, LOGITS[i], token) if request.wanted else LOGITS[i]
        torch.testing.assert_close(rows[i], expected, rtol=0, atol=1e-5)


def test_em_draw_gives_emlocals_tokens() -> None:
    step = EMInf()
    request = read(replace(asked_of({"em_inf": 1, "em_draw": 1, "em_id": "q1", "em_seed": 2}), seed=4))
    params = SamplingParams(temperature=1.0, min_p=0.0)
    uniforms = Uniforms(2, request_key("q1"), sample=2)
    for token, row in enumerate(LOGITS):
        after = step.apply(row.numpy()).logits
        expected = inverse_cdf(probabilities(after, params), uniforms[token])
        drawn = alone(request, row, token)
        assert drawn.argmax() == expected
        assert (drawn > -torch.inf).sum() == 1


def test_the_ring_keeps_the_last_records() -> None:
    ring = Ring(CPU, records=5)
    table = Table(2, CPU, ring)
    table.put(0, REQUESTS[4])
    table.put(1, REQUESTS[7])
    table.flush()
    assert table.draws.all()
    for token in range(4):
        table.step(LOGITS[:2].clone(), np.arange(2), None, token_index([token, token], CPU))
    found = ring.read()
    keys = [request_key("seen"), request_key("cool")]
    assert [(key, token) for key, _, token, *_ in found] == [
        (keys[1], 1),
        *[(key, token) for token in (2, 3) for key in keys],
    ]
    entropy = float(torch.distributions.Categorical(logits=LOGITS[1].double()).entropy())
    assert all(abs(before - entropy) < 1e-5 for key, _, _, before, *_ in found if key == keys[0])
    ring.clear()
    assert ring.read() == []
