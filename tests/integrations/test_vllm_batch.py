"""`emlocal batch --connect` to a vLLM: what it is asked, and what the rows say.

The server here is not vLLM. It reads `vllm_xargs` with the plugin's own reader, as vLLM's front end does.
`integrations/check.sh` runs the same against vLLM.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emlocal_vllm.request import Request, read
from hypothesis import given
from hypothesis import strategies as st

from emlocal.remote.vllm import entropy_at_least
from emlocal.sampling.draw import request_key
from tests.integrations.requests import asked_of
from tests.remote.test_batch import Plain, batch, serving

LISTED = [{"token": "a", "logprob": math.log(0.5)}, {"token": "b", "logprob": math.log(0.25)}]


class Vllm(Plain):
    """Refuses what the processor refuses, and gives log-probabilities."""

    processor = True

    def do_GET(self) -> None:  # noqa: N802
        self._send(200, {"data": [{"id": "m", "owned_by": "vllm"}]})

    def do_POST(self) -> None:  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.processor:
            try:
                read(
                    replace(asked_of(body.get("vllm_xargs") or {}), seed=body.get("seed"), n=body.get("n", 1))
                )
            except ValueError as why:
                self._send(400, {"error": {"message": str(why)}})
                return
        self.bodies.append(body)
        content = [{"token": "a", "logprob": math.log(0.5), "top_logprobs": LISTED}]
        choice = {"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}
        choice["logprobs"] = {"content": content}
        usage = {"prompt_tokens": 3, "completion_tokens": 1}
        self._send(200, {"id": "x", "model": "m", "choices": [choice] * body.get("n", 1), "usage": usage})


class Bare(Vllm):
    """A vLLM without the processor: it ignores the fields."""

    processor = False


@contextmanager
def vllm(kind: type[Vllm] = Vllm) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    with serving(kind) as found:
        yield found


def asked_in(body: dict[str, Any]) -> Request:
    own = replace(asked_of(body["vllm_xargs"]), seed=body.get("seed"), n=body.get("n", 1))
    return read(own)


def test_a_line_becomes_a_request_of_the_processor(tmp_path: Path) -> None:
    lines = [
        {"prompt": "1", "custom_id": "a"},
        {"prompt": "2", "custom_id": "b", "em_steps": 3, "top_k": 7},
        {"prompt": "3", "custom_id": "c", "em_inf": False, "adaptive_temp": True, "em_ratio": 0.4},
        {"prompt": "4", "custom_id": "d", "em_preset": "em-pt", "seed": 9},
        {"prompt": "5", "custom_id": "e", "em_inf": False, "presence_penalty": 0.5},
        {"prompt": "6", "custom_id": "f", "samples": 2},
        {"prompt": "7", "custom_id": "g", "em_steps": 5000},
    ]
    raw = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    with vllm() as (url, bodies):
        more = (
            "--em-inf",
            "--em-threshold",
            "0.2",
            "--seed",
            "5",
            "--min-p",
            "0",
            "--parallel",
            "1",
            "--ordered",
        )
        code, said, rows = batch(url, tmp_path, *more, lines=raw)
    assert "a vLLM with emlocal's processor" in said
    assert code == 1
    by_name = {body["messages"][-1]["content"]: body for body in bodies}
    first, second, third, fourth, _, sixth = (
        asked_in(by_name[n]) if "vllm_xargs" in by_name[n] else Request("none") for n in "123456"
    )
    assert (first.kernel, first.threshold, first.steps) == ("sgd", 0.2, 10)
    assert (first.draw, first.seed, first.key) == (True, 5, request_key("a"))
    assert "seed" not in by_name["1"]
    assert by_name["1"]["min_p"] == 0
    assert (second.steps, by_name["2"]["top_k"]) == (3, 7)
    assert (third.kernel, third.ratio) == ("adaptive", 0.4)
    assert (fourth.kernel, fourth.learning_rate, fourth.seed) == ("adam", 0.1, 9)
    assert by_name["4"]["temperature"] == 0.1
    assert "vllm_xargs" not in by_name["5"]
    assert (by_name["5"]["presence_penalty"], by_name["5"]["seed"]) == (0.5, 5)
    assert (by_name["6"]["n"], by_name["6"]["seed"], sixth.seed) == (2, 5, 5)
    assert [row["custom_id"] for row in rows] == list("abcdefg")
    assert "between 0 and 1000" in rows[-1]["error"]
    assert rows[0]["entropy_at_least"] == pytest.approx(1.5 * math.log(2), abs=1e-6)


def test_em_is_refused_where_nobody_would_take_it(tmp_path: Path) -> None:
    with vllm(Bare) as (url, _):
        code, said, rows = batch(url, tmp_path, "--em-inf")
        assert (code, rows) == (2, [])
        assert "--logits-processors emlocal_vllm.v1:EMProcessor" in said
        code, said, _ = batch(url, tmp_path)
        assert code == 0, said


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 6), st.integers(21, 300))
def test_the_bound_is_below_the_entropy(seed: int, scale: float, size: int) -> None:
    random = np.random.default_rng(seed)
    z = random.normal(size=size) * scale
    log_p = z - np.log(np.exp(z).sum())
    exact = float(-(np.exp(log_p) * log_p).sum())
    drawn = int(random.integers(size))
    listed = sorted({*np.argsort(-log_p)[:20].tolist(), drawn})
    text = {"top_logprobs": [{f"token_id:{i}": float(log_p[i]) for i in listed}]}
    chat = {"content": [{"top_logprobs": [{"logprob": float(log_p[i])} for i in listed]}]}
    for logprobs in (text, chat):
        found = entropy_at_least({"logprobs": logprobs})
        assert found is not None
        assert -1e-6 <= found <= exact + 1e-6
    assert entropy_at_least({"text": "nothing"}) is None
