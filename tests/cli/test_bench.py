"""`emlocal bench` on the tiny model and on the fake engine. No test looks at how fast anything is."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from emlocal import measure
from emlocal.backends.fake import END, FakeBackend
from emlocal.cli.app import build
from emlocal.errors import UsageError
from emlocal.generation import Scheduler
from emlocal.settings import EMInf, SamplingParams
from tests.tiny_gguf import write_tiny_gguf


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMLOCAL_CONFIG_DIR", str(tmp_path / "config"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_gguf(tmp_path_factory.mktemp("bench") / "tiny.gguf"))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    """The engine that `bench` opens, whichever it asks for."""
    backend = FakeBackend()

    @contextmanager
    def opened(*_: object, **__: object) -> Iterator[FakeBackend]:
        yield backend

    monkeypatch.setattr("emlocal.cli.bench.open_backend", opened)
    return backend


def run(*arguments: str) -> Result:
    return CliRunner().invoke(build(["bench"]), ["bench", "--tokens", "3", "--rounds", "2", *arguments])


def measured(*arguments: str) -> dict[str, Any]:
    result = run("--json", *arguments)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_json_has_every_figure(model: str) -> None:
    said = measured("-m", model)
    assert said["settings"] == {
        "tokens": 3,
        "rounds": 2,
        "seed": 0,
        "em": {"step": "EMInf"} | vars(EMInf()) | {"temperature": 0.5},  # the model's own
    }
    decode = said["decode"]
    for side in ("bare", "off", "on"):
        assert decode[f"{side}_tokens_per_second"] > 0
    for ratio in ("on_over_off", "off_over_bare", "on_over_bare"):
        found = decode[ratio]
        assert (found["n"], found["bounds"]) == (2, "range")
        assert 0 < found["low"] <= found["median"] <= found["high"]
    assert 0 <= decode["touched"] <= 1
    assert said["sampler"]["rows"] == sum(path["rows"] for path in said["sampler"]["paths"])
    assert all(said["sampler"][f"{way}_microseconds"] > 0 for way in ("off", "on", "numpy"))
    assert said["prompt"]["tokens"] == 128
    assert set(said["first_token"]) == {"prompt_tokens", "prefill_seconds", "rest_seconds", "load_seconds"}
    assert said["memory"]["engine_bytes"] > 0
    assert said["machine"]["cpu"]


def test_a_table_for_people(model: str) -> None:
    result = run("-m", model)
    assert result.exit_code == 0
    for name in ("decode, EM off", "decode, EM on", "bare llama.cpp", "EM on / off", "plain numpy", "memory"):
        assert name in result.stdout
    assert re.search(r"^EM on / off +\d+\.\d{3}  \(2 rounds: \d+\.\d{3} to \d+\.\d{3}\)", result.stdout, re.M)
    assert "95 %" not in result.stdout
    assert "loading the model" in result.stderr
    assert "\x1b" not in result.stdout


def test_a_long_run_says_so_before_its_rounds(fake: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "may take up to" not in run().stderr
    monkeypatch.setattr("emlocal.text.LONG", 0.0)
    assert re.search(r"^this run may take up to .*: 2 rounds of 3 tokens on each side$", run().stderr, re.M)
    assert "to shorten it, lower --rounds or --tokens" in run().stderr


def test_an_engine_without_a_bare_loop(fake: FakeBackend) -> None:
    said = measured()
    assert said["decode"]["bare_tokens_per_second"] is None
    assert said["decode"]["off_over_bare"] is None
    assert said["decode"]["on_over_off"]["n"] == 2
    assert "not measured" in run().stdout


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (("--adaptive-temp",), {"step": "AdaptiveTemperature", "ratio": 0.5, "threshold": 0.1}),
        (("--em-preset", "em-pt"), {"optimizer": "adam", "temperature": 0.1}),
        (("--em-steps", "3"), {"step": "EMInf", "steps": 3}),
    ],
)
def test_em_settings(fake: FakeBackend, flags: tuple[str, ...], settings: dict[str, Any]) -> None:
    em = measured(*flags)["settings"]["em"]
    assert {name: em[name] for name in settings} == settings


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--no-em-inf",), "--no-em-inf"),
        (("--tokens", "0"), "--tokens"),
        (("--rounds", "0"), "--rounds"),
        (("--tokens", "5000"), "exceed the context"),
    ],
)
def test_what_cannot_be_meant(fake: FakeBackend, flags: tuple[str, ...], says: str) -> None:
    result = run(*flags)
    assert isinstance(result.exception, UsageError)
    assert says in result.exception.message


def test_all_sides_decode_the_same_positions_past_end_tokens() -> None:
    """The engine sees equal work from both sides, although every token of this model ends an answer."""

    def always_ends(tokens: Any) -> Any:
        row = np.zeros(257, dtype=np.float32)
        row[END] = 30.0
        return row

    backend = FakeBackend(always_ends)
    runner = Scheduler(backend, 1)
    found = measure.measure_decoding(runner, SamplingParams(em=EMInf()), tokens=5, rounds=4, seed=0)
    assert [len(found.seconds[side]) for side in ("bare", "off", "on")] == [0, 4, 4]
    assert backend.info.end_tokens == {END}  # as before

    prompts = [len(measure.question_tokens(backend, text)) for text in measure.PROMPTS]
    expected = prompts[4] + 2 * (1 + 4) + sum(n + 2 * (1 + 5) for n in prompts[:4])
    assert backend.fed == expected


def test_the_bare_loop_leaves_the_sequence_as_it_was(model: str) -> None:
    from emlocal.backends.base import Feed, LoadOptions
    from emlocal.backends.llama_cpp import LlamaCppBackend
    from emlocal.backends.llama_cpp.backend import bare_decode
    from emlocal.models.resolve import resolve

    backend = LlamaCppBackend(resolve(model), LoadOptions(sequences=1))
    try:
        sequence = backend.open()
        tokens = backend.encode("the other", add_special=True, parse_special=False)
        backend.forward([Feed(sequence, tokens)])
        before = backend.logits(sequence)
        assert len(bare_decode(backend, sequence, tokens[-1], 7)) == 7
        assert backend.length(sequence) == len(tokens)
        backend.trim(sequence, len(tokens) - 1)
        backend.forward([Feed(sequence, tokens[-1:])])
        np.testing.assert_allclose(backend.logits(sequence), before, atol=1e-5)
    finally:
        backend.close()


def test_recorded_rows_are_those_that_were_drawn_from() -> None:
    backend = FakeBackend()
    rows = measure.recorded_rows(Scheduler(backend, 1), SamplingParams(), rows=20, seed=0)
    assert len(rows) == 20
    assert len({row.tobytes() for row in rows}) == 20


def test_plain_sampling_draws_from_the_softmax() -> None:
    row = np.log(np.array([0.1, 0.2, 0.3, 0.4], dtype=np.float32))
    assert [measure.plain_sample(row, 1.0, u) for u in (0.05, 0.25, 0.5, 0.95)] == [0, 1, 2, 3]


def test_the_interval_of_a_median() -> None:
    assert measure.ratio([1.0, 2.0, 4.0]) == measure.Ratio(2.0, 1.0, 4.0, 3, "range")
    # n = 10: the 2nd and 9th values have coverage 97.9 %, the 3rd and 8th only 89.1 %
    ten = measure.ratio([float(i) for i in range(1, 11)])
    assert ten == measure.Ratio(5.5, 2.0, 9.0, 10, "95% interval")
    assert measure.speed_ratio([1.0], [2.0]).median == 2.0


def test_too_few_rounds_for_an_interval_show_their_range() -> None:
    assert str(measure.ratio([0.991, 0.971])) == "0.981  (2 rounds: 0.971 to 0.991)"
    assert str(measure.ratio([0.97])) == "0.970  (1 round: 0.970 to 0.970)"
    six = measure.ratio([0.97, 0.98, 0.98, 0.98, 0.98, 0.99])
    assert str(six) == "0.980  (95 %: 0.970 to 0.990, 6 rounds)"


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 20, 101])
def test_the_interval_covers_what_it_says(n: int) -> None:
    found = measure.ratio([float(i) for i in range(n)])
    skipped = int(found.low)  # number of values below the interval, and above it

    def coverage(skip: int) -> float:
        return 1 - 2 * sum(math.comb(n, k) for k in range(skip)) / 2**n

    if found.bounds == "range":
        assert (found.low, found.high) == (0.0, float(n - 1))
        assert coverage(1) < measure.CONFIDENCE  # no interval could have covered enough
        return
    # P(the median lies outside) is P(at most skipped - 1 … values below it), on either side
    assert coverage(skipped + 1) >= measure.CONFIDENCE
    assert coverage(skipped + 2) < measure.CONFIDENCE


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_wait_briefly_unless_the_user_has_chosen(
    chosen: dict[str, str], expected: str | None
) -> None:
    """Runs in a separate process: OpenMP reads the variables when the library is loaded."""
    code = (
        "from emlocal.backends.llama_cpp.loading import load_library; load_library()\n"
        "import os; print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean | chosen | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(expected)
