"""Checkpoints on disk: which stay, which are read, and the faults of the others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from emlocal.training import checkpoint
from emlocal.training.checkpoint import Checkpoint, latest, save


def state(step: int) -> Checkpoint:
    random = np.random.default_rng(step)
    learner = {"w": random.normal(size=(3, 4)).astype(np.float32), "w.steps": np.float32(step)}
    good = {"w": random.normal(size=(4, 3)).astype(np.float32).T}  # not in its order in memory
    return Checkpoint(step, learner, good, {"kl": 0.1 + step, "guards": [{"entropy": 1 / 3}], "first": None})


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def step_of(folder: Path) -> int | None:
    found, _ = latest(folder)
    return found and found.step


def test_it_reads_back_as_it_was(tmp_path: Path) -> None:
    save(tmp_path, state(7))
    found, damaged = latest(tmp_path)
    assert damaged == []
    assert found is not None
    wanted = state(7)
    assert (found.step, found.history) == (7, wanted.history)
    for mine, theirs in ((found.learner, wanted.learner), (found.good, wanted.good)):
        assert mine.keys() == theirs.keys()
        for name, array in mine.items():
            assert (array.dtype, array.shape) == (theirs[name].dtype, theirs[name].shape)
            assert np.array_equal(array, theirs[name])


def test_the_newest_two_stay(tmp_path: Path) -> None:
    for step in (2, 4, 9, 10, 1_000_001):
        save(tmp_path, state(step))
    assert names(tmp_path) == ["step-000010", "step-1000001"]
    assert step_of(tmp_path) == 1_000_001


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, state(4))
    save(tmp_path, state(4))
    assert names(tmp_path) == ["step-000004"]


def test_no_folder_no_checkpoint(tmp_path: Path) -> None:
    assert latest(tmp_path / "none") == (None, [])


def cut(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


def changed(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda at: (at / "learner.safetensors").unlink(), "No such file"),
        (lambda at: (at / "good.safetensors").unlink(), "No such file"),
        (lambda at: (at / "state.json").unlink(), "No such file"),
        (lambda at: (at / "learner.safetensors").write_bytes(b""), "learner.safetensors is damaged"),
        (lambda at: cut(at / "learner.safetensors"), "learner.safetensors is damaged"),
        (lambda at: cut(at / "good.safetensors"), "good.safetensors is damaged"),
        (lambda at: flip(at / "good.safetensors"), "good.safetensors is damaged"),
        (lambda at: cut(at / "state.json"), ""),
        (lambda at: (at / "state.json").write_text("[]"), "state.json is not a table"),
        (lambda at: (at / "state.json").write_text("[" * 100_000), ""),
        (lambda at: changed(at / "state.json", step=3), "state.json is damaged"),
        (lambda at: changed(at / "state.json", history={}), "state.json is damaged"),
        (lambda at: changed(at / "state.json", sha256=[]), "is damaged"),
        (lambda at: changed(at / "state.json", sha256={}), "is damaged"),
        (lambda at: changed(at / "state.json", format="emlocal-checkpoint-9"), "'emlocal-checkpoint-9'"),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_is_read(
    tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    save(tmp_path, state(5))
    save(tmp_path, state(10))
    damage(tmp_path / "step-000010")
    found, (what,) = latest(tmp_path)
    assert found is not None
    assert found.step == 5
    assert what.startswith("step-000010: ")
    assert says in what
    assert str(tmp_path) not in what


def test_folders_of_others_are_not_looked_at(tmp_path: Path) -> None:
    save(tmp_path, state(5))
    for name in ("step-x", "step-²", "step-", "notes", ".step-000009.abc.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000099").touch()
    found, damaged = latest(tmp_path)
    assert found is not None
    assert (found.step, damaged) == (5, [])
    save(tmp_path, state(6))
    assert {"step-x", "notes", "step-000005", "step-000006", "step-000099"} <= set(names(tmp_path))


def test_a_run_that_went_back_behind_damaged_ones_keeps_what_it_writes(tmp_path: Path) -> None:
    for step in (15, 20):
        save(tmp_path, state(step))
        cut(tmp_path / f"step-{step:06d}" / "learner.safetensors")
    save(tmp_path, state(3))  # a new run that was stopped
    assert names(tmp_path) == ["step-000003"]
    assert step_of(tmp_path) == 3


def test_leftovers_go_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, state(5))
    shutil.copytree(tmp_path / "step-000005", tmp_path / ".step-000006.x1.tmp")
    shutil.copytree(tmp_path / "step-000005", tmp_path / ".step-000005.x2.old")
    (tmp_path / ".other.tmp").mkdir()
    checkpoint.remove_leftovers(tmp_path)
    assert names(tmp_path) == [".other.tmp", "step-000005"]
