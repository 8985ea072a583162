"""The two processors, driven through vLLM's own records of a batch."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from emlocal_vllm import v1, v2
from emlocal_vllm.request import read
from emlocal_vllm.table import Table, token_index
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext

CPU = torch.device("cpu")
LOGITS = torch.randn((8, 300), generator=torch.Generator().manual_seed(0)) * 3
CONFIG = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=8))
DRAWN: dict[str, Any] = {"em_inf": 1, "em_draw": 1, "em_id": "x"}


def params(**extra: Any) -> SamplingParams:
    return SamplingParams(temperature=0.8, seed=5, extra_args=extra or None)


def alone(given: SamplingParams, row: torch.Tensor, token: int) -> torch.Tensor:
    table = Table(1, CPU)
    table.put(0, read(given))
    table.flush()
    return table.step(row[None].clone(), np.arange(1), None, token_index([token], CPU))[0]


def test_v1_follows_added_moved_and_removed_requests() -> None:
    processor = v1.EMProcessor(CONFIG, CPU, False)
    outputs: list[int] = []
    processor.update_state(
        BatchUpdate(
            3,
            [],
            [(0, params(), None, []), (1, params(em_inf=1), None, []), (2, params(**DRAWN), None, outputs)],
            [],
        )
    )
    rows = processor.apply(LOGITS[:3].clone())
    torch.testing.assert_close(rows[0], LOGITS[0], rtol=0, atol=0)
    torch.testing.assert_close(rows[1], alone(params(em_inf=1), LOGITS[1], 0))
    torch.testing.assert_close(rows[2], alone(params(**DRAWN), LOGITS[2], 0))
    outputs += [11, 12]  # vLLM's own list grows
    swap = (2, 0, MoveDirectionality.SWAP)
    processor.update_state(BatchUpdate(2, [1], [], [swap, (2, 1, MoveDirectionality.UNIDIRECTIONAL)]))
    rows = processor.apply(LOGITS[3:5].clone())
    torch.testing.assert_close(rows[0], alone(params(**DRAWN), LOGITS[3], 2))
    torch.testing.assert_close(rows[1], LOGITS[4], rtol=0, atol=0)
    processor.update_state(None)
    outputs += [13]
    torch.testing.assert_close(processor.apply(LOGITS[:2].clone())[0], alone(params(**DRAWN), LOGITS[0], 3))


def context(slots: list[int], rows: list[int], pos: list[int]) -> LogitsContext:
    return LogitsContext(
        expanded_idx_mapping=torch.tensor(rows, dtype=torch.int32),
        idx_mapping=torch.tensor(slots, dtype=torch.int32),
        idx_mapping_np=np.array(slots, dtype=np.int32),
        expanded_local_pos=torch.zeros(len(rows), dtype=torch.int32),
        input_ids=torch.zeros(len(rows), dtype=torch.int32),
        pos=torch.tensor(pos),
        seq_lens_upper_bound_np=np.array([0] * len(slots)),
    )


@pytest.mark.parametrize("rows", [[6, 2, 4], [6, 6, 6, 2, 4, 4]], ids=["one each", "drafts"])
def test_v2_finds_slots_and_token_indices(rows: list[int]) -> None:
    lengths = torch.full((8,), 10, dtype=torch.int32)
    states = SimpleNamespace(device=CPU, max_num_reqs=8, prompt_len=SimpleNamespace(gpu=lengths))
    processor = v2.EMProcessor(CONFIG, states)
    assert processor.add_request(6, params(em_inf=1))
    assert processor.add_request(6, params(**DRAWN))  # a slot is used again
    assert not processor.add_request(2, params())
    assert processor.add_request(4, params(adaptive_temp=1))
    processor.apply_staged_writes()
    pos = [9 + i for i in range(len(rows))]
    found = processor.apply(LOGITS[: len(rows)].clone(), context([6, 2, 4], rows, pos))
    own = {6: params(**DRAWN), 4: params(adaptive_temp=1)}
    for i, slot in enumerate(rows):
        expected = alone(own[slot], LOGITS[i], i) if slot in own else LOGITS[i]
        torch.testing.assert_close(found[i], expected)


@pytest.mark.parametrize("cls", [v1.EMProcessor, v2.EMProcessor])
def test_values_out_of_range_are_refused_in_the_front_end(cls: Any) -> None:
    with pytest.raises(ValueError, match="em_steps is 5000; it must be between 0 and 1000"):
        cls.validate_params(params(em_inf=1, em_steps=5000))
    cls.validate_params(params(em_inf=1))


def test_penalties_are_refused_by_v1_alone() -> None:
    asked = SamplingParams(presence_penalty=0.5, extra_args={"em_inf": 1})
    with pytest.raises(ValueError, match="presence_penalty"):
        v1.EMProcessor.validate_params(asked)
    v2.EMProcessor.validate_params(asked)
