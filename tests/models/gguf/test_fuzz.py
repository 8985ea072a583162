"""10,000 broken models: each is refused in one line, or is accepted and does not crash llama.cpp."""

from collections import Counter
from pathlib import Path

import pytest

from tests.models.gguf.loading import Worker, accepted
from tests.models.gguf.mutants import mutant
from tests.processor_time import at_most
from tests.tiny_architectures import ARCHITECTURES, write_tiny_architecture
from tests.tiny_gguf import write_tiny_gguf

MUTANTS = 10_000
LOADED = 1_500  # number of accepted ones that the real library loads


def test_no_mutant_brings_the_reader_down(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "mutant.gguf"
    outcomes: Counter[bool] = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(MUTANTS):
        path.write_bytes(mutant(seed))
        with at_most(5):  # a thousand times the time of one
            outcomes[accepted(path)] += 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # kB on Linux
    print(f"{outcomes[True]} accepted, {outcomes[False]} refused")
    assert outcomes[False] > MUTANTS // 4, "the mutations are too tame"
    assert outcomes[True] > MUTANTS // 20, "nothing is left for the real library"
    assert grown < 100_000


@pytest.mark.real
def test_the_tiny_models_decode(worker: Worker, tmp_path: Path) -> None:
    paths = [write_tiny_architecture(tmp_path / f"{name}.gguf", name) for name in ARCHITECTURES]
    for path in [write_tiny_gguf(tmp_path / "tiny.gguf"), *paths]:
        assert accepted(path)
        assert worker.load(path).startswith("decoded")


@pytest.mark.real
def test_what_is_accepted_does_not_crash_llama_cpp(worker: Worker, tmp_path: Path) -> None:
    path, verdicts, crashes, loaded = tmp_path / "mutant.gguf", Counter[str](), [], 0
    for seed in range(MUTANTS):
        path.write_bytes(mutant(seed))
        if not accepted(path):
            continue
        verdict = worker.load(path)
        verdicts[verdict.split()[0]] += 1
        if verdict.startswith("killed"):
            crashes.append((seed, verdict))
        loaded += 1
        if loaded == LOADED:
            break
    print(dict(verdicts))
    assert not crashes
    assert verdicts["decoded"] > loaded // 10
