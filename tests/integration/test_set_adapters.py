"""Changing adapters on a loaded model, as training does at every step: correct each time, without leaks."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from emlocal.backends.base import Feed, LoadOptions
from emlocal.backends.llama_cpp import LlamaCppBackend
from emlocal.errors import BackendError, ModelError
from emlocal.models.adapters.folders import write_peft
from emlocal.models.adapters.gguf_lora import write_gguf
from emlocal.models.gguf import read_header
from emlocal.models.resolve import resolve
from tests.tiny_gguf import write_tiny_gguf
from tests.tiny_pair import random_adapter

PROMPT = [1, 70, 45, 200, 261, 33]


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[LlamaCppBackend]:
    model = resolve(str(write_tiny_gguf(tmp_path / "tiny.gguf")))
    opened = LlamaCppBackend(model, LoadOptions(context=64, sequences=2))
    yield opened
    opened.close()


def adapter(tmp_path: Path, seed: int, rank: int = 4) -> Path:
    path = tmp_path / f"{seed}.gguf"
    write_gguf(random_adapter(layers=1, seed=seed, rank=rank), path, read_header(tmp_path / "tiny.gguf"))
    return path


def logits(backend: LlamaCppBackend) -> np.ndarray:
    sequence = backend.open()
    backend.forward([Feed(sequence, PROMPT)])
    row = backend.logits(sequence)
    backend.release(sequence)
    return row


def test_adapters_come_and_go(tmp_path: Path, backend: LlamaCppBackend) -> None:
    first, second = adapter(tmp_path, 1), adapter(tmp_path, 2)
    plain = logits(backend)
    backend.set_adapters([(first, 1.0)])
    with_first = logits(backend)
    backend.set_adapters([(second, 1.0)])
    with_second = logits(backend)
    backend.set_adapters([(first, 1.0), (second, 0.0)])
    assert np.array_equal(logits(backend), with_first)
    backend.set_adapters([(first, 0.5)])
    assert not np.allclose(logits(backend), with_first, atol=1e-2)
    backend.set_adapters([])
    assert np.array_equal(logits(backend), plain)
    assert np.abs(with_first - plain).max() > 0.1
    assert np.abs(with_first - with_second).max() > 0.1


def test_a_folder_will_do_too(tmp_path: Path, backend: LlamaCppBackend) -> None:
    backend.set_adapters([(adapter(tmp_path, 1), 1.0)])
    wanted = logits(backend)
    write_peft(random_adapter(layers=1, seed=1), tmp_path / "peft")
    backend.set_adapters([(tmp_path / "peft", 1.0)])
    assert np.array_equal(logits(backend), wanted)


def test_not_while_a_sequence_is_open(tmp_path: Path, backend: LlamaCppBackend) -> None:
    sequence = backend.open()
    with pytest.raises(BackendError, match="adapters cannot change while 1 sequence of tokens is open"):
        backend.set_adapters([])
    backend.release(sequence)
    backend.set_adapters([])


def test_a_bad_adapter_leaves_the_old_ones(tmp_path: Path, backend: LlamaCppBackend) -> None:
    good = adapter(tmp_path, 1)
    backend.set_adapters([(good, 1.0)])
    wanted = logits(backend)
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(good.read_bytes()[:-64])
    with pytest.raises(ModelError, match="the file has"):
        backend.set_adapters([(adapter(tmp_path, 2), 1.0), (bad, 1.0)])
    assert np.array_equal(logits(backend), wanted)


def test_two_hundred_changes_do_not_leak(tmp_path: Path, backend: LlamaCppBackend) -> None:
    """The adapters have 4.6 MB each: 200 that stayed would take 920 MB."""
    paths = [adapter(tmp_path, seed, rank=2048) for seed in (1, 2)]
    assert paths[0].stat().st_size > 4_000_000
    wanted = []
    for path in paths:
        backend.set_adapters([(path, 1.0)])
        wanted.append(logits(backend))
    for step in range(20):
        backend.set_adapters([(paths[step % 2], 1.0)])
    before = resident_bytes()
    for step in range(200):
        backend.set_adapters([(paths[step % 2], 1.0)])
        if step % 3:  # not every change is followed by a token: llama.cpp keeps graphs by address
            assert np.array_equal(logits(backend), wanted[step % 2])
    assert resident_bytes() - before < 40_000_000


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
