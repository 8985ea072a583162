"""Helpers of the contract tests."""

import numpy as np

from emlocal.backends.base import Backend, Feed, Row
from emlocal.backends.fake import FakeBackend
from emlocal.backends.mlx.backend import MLXBackend
from emlocal.backends.torch.backend import TorchBackend
from emlocal.em.steps import EMInf
from emlocal.sampling import SamplingParams, Uniforms

CONTEXT, SEQUENCES = 256, 5
LONG = 4000
EM = SamplingParams(em=EMInf(0.1, 5, 1.0), temperature=1.0, min_p=0.0)


def tokens(backend: Backend, text: str = "the cat sat on the mat and the rat") -> list[int]:
    return backend.encode(text, add_special=True, parse_special=True)


def read(backend: Backend, *chunks: list[int]) -> int:
    """Opens a sequence and feeds these chunks."""
    sequence = backend.open()
    for chunk in chunks:
        backend.forward([Feed(sequence, chunk)])
    return sequence


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Root mean square of the difference, in standard deviations of the logits."""
    return float(np.sqrt(((one - other) ** 2).mean()) / one.std())


def same(backend: Backend) -> float:
    """Returns the tolerance for the logits of one state.

    Batch shapes choose the kernels. llama.cpp's kernels for four-bit weights round activations to eight bits
    in some shapes and not in others. On SmolLM2 (Q4_1) that gave up to 0.124 on a processor with AVX2 alone.
    With another last token the logits are 2 apart, without the first token 0.18.
    """
    if isinstance(backend, FakeBackend):
        return 0.0
    if isinstance(backend, TorchBackend | MLXBackend):
        return 1e-4
    return 0.002 if backend.info.vocabulary < 1000 else 0.15


def assert_same_logits(backend: Backend, one: np.ndarray, other: np.ndarray) -> None:
    assert one.dtype == other.dtype == np.float32
    assert one.shape == other.shape == (backend.info.vocabulary,)
    assert distance(one, other) <= same(backend)


def said(backend: Backend, sequence: int, n: int, params: SamplingParams = EM, seed: int = 1) -> list[int]:
    """Draws n tokens one after another; the sequence has just been fed."""
    uniforms, out = Uniforms(seed), []
    for t in range(n):
        out.append(backend.sample([Row(sequence, params, uniforms[t])])[0].token)
        backend.forward([Feed(sequence, out[-1:])])
    return out
