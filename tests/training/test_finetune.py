"""The loop: entropy falls, killed runs resume bit for bit, and failures are reported."""

from dataclasses import replace
from pathlib import Path

import pytest

from emlocal.backends.learner import OutOfMemoryError
from emlocal.errors import CancelledError, EmlocalError, UsageError
from emlocal.models.adapters import read_adapter
from emlocal.models.gguf import read_header
from emlocal.training.loop import Plan, prompts_of_step
from tests.metrics import metrics
from tests.tiny_pair import ModelPair
from tests.training.runs import (
    PROMPTS,
    SETTINGS,
    Watched,
    assert_equal,
    assert_same,
    kill_and_resume,
    prepared,
    run,
)


@pytest.fixture(scope="module")
def whole(pair: ModelPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    outcome = run(pair, out, Watched())
    assert outcome.reason == "finished"
    return out


def test_the_answers_entropy_falls(pair: ModelPair, out: Path) -> None:
    settings = replace(SETTINGS, steps=12, prompts_per_step=10, learning_rate=1e-2, kl_beta=0.0)
    watcher = Watched()
    outcome = run(pair, out, watcher, settings)
    assert outcome.first is not None
    assert outcome.last is not None
    assert outcome.last.entropy < 0.9 * outcome.first.entropy
    assert [row["step"] for row in metrics(out)] == list(range(13))
    assert metrics(out) == watcher.rows


def test_the_folder_is_the_adapter(pair: ModelPair, whole: Path) -> None:
    adapter = read_adapter(whole, read_header(pair.gguf))
    assert len(adapter.pairs) == 14
    assert any(pair.b.any() for pair in adapter.pairs.values())


def test_a_second_run_is_the_same(pair: ModelPair, whole: Path, out: Path) -> None:
    run(pair, out, Watched())
    assert_equal(read_adapter(out), read_adapter(whole))


def test_micro_batches_do_not_depend_on_checkpoints(pair: ModelPair, whole: Path, out: Path) -> None:
    run(pair, out, Watched(), plan=Plan(token_budget=40, save_every=100))
    assert_equal(read_adapter(out), read_adapter(whole))


def test_killed_anywhere_and_resumed_the_weights_are_the_same(
    pair: ModelPair, whole: Path, out: Path
) -> None:
    assert kill_and_resume(pair, out, SETTINGS, events=25) >= 3
    assert_same(out, whole)
    assert not list(out.rglob(".*.tmp"))


def test_ctrl_c_writes_a_checkpoint(pair: ModelPair, whole: Path, out: Path) -> None:
    asked = False

    def ask() -> None:
        nonlocal asked
        asked = True

    with pytest.raises(CancelledError):
        run(pair, out, Watched(20, ask), cancelled=lambda: asked)
    assert [p.name for p in sorted((out / "checkpoints").glob("step-*"))][-1] != "step-000000"
    run(pair, out, Watched(), resume=True)
    assert_equal(read_adapter(out), read_adapter(whole))


def test_a_finished_run_resumed_ends_at_once_with_the_same(pair: ModelPair, whole: Path) -> None:
    before = read_adapter(whole)
    watcher = Watched()
    assert run(pair, whole, watcher, resume=True).reason == "finished"
    assert len(watcher.rows) == 1
    assert_equal(read_adapter(whole), before)


def test_changed_settings_are_refused_with_their_differences(pair: ModelPair, whole: Path) -> None:
    changed = replace(SETTINGS, learning_rate=1e-3, steps=7)
    with pytest.raises(UsageError, match=r"steps: 6 -> 7; learning_rate: 0.003 -> 0.001"):
        run(pair, whole, Watched(), changed, resume=True)


def test_a_folder_that_holds_a_run_needs_resume(pair: ModelPair, whole: Path) -> None:
    with pytest.raises(UsageError, match="has a run already"):
        run(pair, whole, Watched())


def test_a_folder_of_something_else_is_left_alone(pair: ModelPair, out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"has other files: thesis.tex"):
        run(pair, out, Watched())
    assert [p.name for p in out.iterdir() if p.name != ".lock"] == ["thesis.tex"]


def test_two_at_once_are_refused(pair: ModelPair, out: Path) -> None:
    with prepared(pair, out, Watched()), pytest.raises(EmlocalError, match="another run of emlocal"):
        run(pair, out, Watched())


def test_a_damaged_checkpoint_falls_back_to_the_one_before(pair: ModelPair, whole: Path, out: Path) -> None:
    with pytest.raises(RuntimeError, match="enough"):
        run(pair, out, Watched(45, lambda: (_ for _ in ()).throw(RuntimeError("enough"))))  # type: ignore[arg-type]
    newest, before = sorted((out / "checkpoints").glob("step-*"), reverse=True)[:2]
    weights = newest / "learner.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-5] ^= 1
    weights.write_bytes(raw)
    with prepared(pair, out, Watched(), resume=True) as (work, start):
        assert start.step == int(before.name.removeprefix("step-"))
        (warning,) = work.folder.warnings
        assert newest.name in warning
        work.run(start)
    assert_equal(read_adapter(out), read_adapter(whole))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"entropy_floor": 4.5, "learning_rate": 3e-2}, "--entropy-floor"),
        ({"max_kl": 0.3, "learning_rate": 3e-2}, "--max-kl"),
    ],
)
def test_a_collapse_stops_and_keeps_the_last_good_adapter(
    pair: ModelPair, out: Path, changes: dict[str, float], why: str
) -> None:
    settings = replace(SETTINGS, steps=60, kl_beta=0.01, **changes)  # type: ignore[arg-type]
    watcher = Watched()
    outcome = run(pair, out, watcher, settings)
    assert outcome.reason == "collapsed"
    assert why in outcome.message
    assert f"step {outcome.steps} was kept" in outcome.message
    assert 0 < outcome.steps < len(watcher.rows) - 1
    assert outcome.last is not None
    kept = watcher.rows[outcome.steps]
    assert kept["entropy"] == outcome.last.entropy >= settings.entropy_floor
    assert kept["kl"] <= settings.max_kl
    assert any(p.b.any() for p in read_adapter(out).pairs.values())


def test_without_memory_it_goes_on_in_smaller_batches(
    pair: ModelPair, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emlocal.backends.torch.learner import TorchEntropyLearner

    real = TorchEntropyLearner.accumulate

    def cramped(self, batch, weights):  # type: ignore[no-untyped-def]
        if len(batch) > 1:
            raise OutOfMemoryError
        return real(self, batch, weights)

    monkeypatch.setattr(TorchEntropyLearner, "accumulate", cramped)
    watcher = Watched()
    assert run(pair, out, watcher).reason == "finished"
    assert watcher.warnings == ["out of memory: continuing with micro-batches of 20 tokens"]
    assert watcher.rows[0]["token_budget"] == 20


def test_an_answer_that_never_fits_is_said(
    pair: ModelPair, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self, batch, weights):  # type: ignore[no-untyped-def]
        raise OutOfMemoryError

    monkeypatch.setattr("emlocal.backends.torch.learner.TorchEntropyLearner.accumulate", full)
    with pytest.raises(EmlocalError, match="does not fit in memory"):
        run(pair, out, Watched())


def test_gradients_that_are_not_finite_are_skipped_then_stop_the_run(
    pair: ModelPair, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "emlocal.training.rl.token_weights", lambda rollouts, how: [float("nan")] * len(rollouts)
    )
    watcher = Watched()
    outcome = run(pair, out, watcher)
    assert outcome.reason == "not finite"
    assert len(watcher.warnings) == 3
    assert not any(p.b.any() for p in read_adapter(out).pairs.values())


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(
    pair: ModelPair, whole: Path, out: Path
) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Filling(Watched):
        def finished_step(self, row: dict[str, object]) -> None:
            super().finished_step(row)
            if (out / "checkpoints" / "step-000002").exists():  # room for an adapter, not for an optimizer
                resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))

    try:
        with pytest.raises(EmlocalError, match=r"cannot write .*step-000004: .*File too large") as caught:
            run(pair, out, Filling())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "--resume" in caught.value.hint
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-000002"]
    run(pair, out, Watched(), resume=True)
    assert_equal(read_adapter(out), read_adapter(whole))


def test_prompts_come_in_a_random_order_each_once_an_epoch() -> None:
    settings = replace(SETTINGS, prompts_per_step=4)
    drawn = [i for step in range(5) for i in prompts_of_step(10, step, settings)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:] != list(range(10))
    assert prompts_of_step(1, 3, settings) == [0, 0, 0, 0]
    assert len(PROMPTS) == 10
