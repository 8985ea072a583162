"""The folder of a run: its owner, and its content after failures."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from emlocal.errors import EmlocalError, UsageError
from emlocal.models.adapters import read_adapter
from emlocal.training.folder import RunFolder
from tests.tiny_pair import random_adapter
from tests.training.test_checkpoint import cut, state

IDENTITY = {"settings": {"steps": 3}, "prompts": {"count": 2, "sha256": "p"}, "model": {"sha256": "m"}}


@contextmanager
def opened(
    path: Path, identity: dict[str, object] = IDENTITY, *, resume: bool = False
) -> Iterator[tuple[RunFolder, int | None]]:
    folder, start = RunFolder.open(path, "finetune", identity, resume=resume)
    try:
        yield folder, start and start.step
    finally:
        folder.close()


def begun(path: Path, *steps: int) -> None:
    with opened(path) as (folder, _):
        for step in range(max(steps, default=-1) + 1):
            if step in steps:
                folder.save(state(step))
            folder.add_metrics({"step": step, "entropy": 1.0})


def rows(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_new_run_and_the_same_again(out: Path) -> None:
    begun(out, 2)
    with opened(out, resume=True) as (folder, step):
        assert step == 2
        assert folder.warnings == []
    assert rows(out) == [0, 1]  # step 2 will run again


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"settings": {"steps": 4}}, "steps: 3 -> 4"),
        ({"settings": {"steps": 3, "new": 1}}, "new: not set -> 1"),
        ({"prompts": {"count": 2, "sha256": "q"}}, 'prompts.sha256: "p" -> "q"'),
        ({"model": {"sha256": "n"}}, 'model.sha256: "m" -> "n"'),
    ],
)
def test_every_part_of_the_identity_counts(out: Path, change: dict[str, object], says: str) -> None:
    begun(out, 1)
    with pytest.raises(UsageError) as caught, opened(out, IDENTITY | change, resume=True):
        pass
    assert caught.value.message.endswith(f"has other settings: {says}")
    with opened(out, resume=True) as (_, step):  # released, and unharmed
        assert step == 1


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '"x"', "[" * 100_000, "{}", '{"format": "emlocal-finetune-9"}', "\udcff"]
)
def test_a_run_json_of_somebody_else(out: Path, text: str) -> None:
    out.mkdir()
    (out / "run.json").write_bytes(text.encode(errors="surrogateescape"))
    for resume in (False, True):
        with pytest.raises(UsageError, match=r"cannot be read|of another kind") as caught:
            RunFolder.open(out, "finetune", IDENTITY, resume=resume)
        assert "-o" in caught.value.hint
    assert [p.name for p in out.iterdir()] == ["run.json"]


@pytest.mark.parametrize("name", ["adapter_config.json", "x.tmp", ".hidden", "checkpoints"])
def test_a_folder_with_something_in_it_is_not_touched(out: Path, name: str) -> None:
    (out / name).mkdir(parents=True)
    with pytest.raises(UsageError, match=f"has other files: {name}"):
        RunFolder.open(out, "finetune", IDENTITY, resume=True)
    assert [p.name for p in out.iterdir()] == [name]


def test_what_killed_runs_left_behind_goes(out: Path) -> None:
    out.mkdir()
    (out / ".run.json.abc.tmp").write_text("{")  # killed at the very beginning
    (out / ".lock").touch()
    begun(out, 1)
    left = [out / ".adapter.x.tmp", out / "checkpoints" / ".step-000002.x.tmp"]
    for path in left:
        path.mkdir()
        (path / "big.safetensors").write_bytes(b"0" * 1000)
    (out / ".metrics.jsonl.x.tmp").touch()
    with opened(out, resume=True):
        pass
    everything = {str(p.relative_to(out)) for p in out.rglob("*")}
    assert not [name for name in everything if name.endswith(".tmp")]
    assert "checkpoints/step-000001" in everything


def test_one_at_a_time(out: Path) -> None:
    with opened(out):
        for resume in (False, True):
            with pytest.raises(EmlocalError, match=r"another run of emlocal"):
                RunFolder.open(out, "finetune", IDENTITY, resume=resume)
    with opened(out, resume=True) as (folder, step):
        assert step is None
        assert "has no checkpoint yet: starting again" in folder.warnings[0]


def test_resume_without_a_run_begins_and_says_so(out: Path) -> None:
    with opened(out, resume=True) as (folder, step):
        assert step is None
        assert "has no run to resume" in folder.warnings[0]


def test_both_checkpoints_damaged_is_a_beginning_with_two_warnings(out: Path) -> None:
    begun(out, 1, 2)
    for step in (1, 2):
        cut(out / "checkpoints" / f"step-{step:06d}" / "good.safetensors")
    with opened(out, resume=True) as (folder, step):
        assert step is None
        assert len(folder.warnings) == 2
        assert all("starting again" in text for text in folder.warnings)
    assert rows(out) == []


@pytest.mark.parametrize("end", ['{"step": 2, "ent', '{"step": null}', "[1]", "\x00\x00", '{"step": "2"}'])
def test_a_torn_or_foreign_line_of_metrics_goes(out: Path, end: str) -> None:
    begun(out, 2)
    with (out / "metrics.jsonl").open("a") as file:
        file.write(end)
    with opened(out, resume=True):
        pass
    assert rows(out) == [0, 1]


def test_the_adapter_is_replaced_whole(out: Path) -> None:
    first, second = random_adapter(seed=1), random_adapter(seed=2)
    with opened(out) as (folder, _):
        folder.put_adapter(first)
        folder.put_adapter(second)
    name = next(iter(second.pairs))
    assert (read_adapter(out).pairs[name].a == second.pairs[name].a).all()
    assert not list(out.glob("*.tmp"))
    assert not list(out.glob(".*.tmp"))


def test_a_full_disk_is_one_line_wherever_it_strikes(out: Path) -> None:
    """A limit on file sizes produces the same system error as a full disk."""
    import resource

    begun(out, 1)
    whole = (out / "metrics.jsonl").read_text()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(out, resume=True) as (folder, _):
        folder.add_metrics({"step": 1, "entropy": 1.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, before[1]))
        try:
            with pytest.raises(
                EmlocalError, match=r"cannot write .*metrics\.jsonl: File too large"
            ) as metric:
                folder.add_metrics({"step": 2, "entropy": 1.0})
            with pytest.raises(EmlocalError, match=r"cannot write .*step-000002: .*File too large") as saved:
                folder.save(state(2))
            with pytest.raises(
                EmlocalError, match=r"the newest adapter could not be copied to .*File too large"
            ) as adapter:
                folder.put_adapter(random_adapter())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert all("--resume" in caught.value.hint for caught in (metric, saved, adapter))
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000001"]
    with opened(out, resume=True) as (_, step):
        assert step == 1
    assert rows(out) == [0]


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UsageError, match="is not a folder"):
        RunFolder.open(file, "finetune", IDENTITY, resume=False)
    with pytest.raises(EmlocalError, match="cannot write"):
        RunFolder.open(file / "below", "finetune", IDENTITY, resume=False)
    if os.path.isdir("/proc/self"):  # noqa: PTH112
        with pytest.raises(EmlocalError, match="cannot write"):
            RunFolder.open(Path("/proc/self/out"), "finetune", IDENTITY, resume=False)
    if os.geteuid():
        tmp_path.chmod(0o500)
        with pytest.raises(EmlocalError, match="cannot write"):
            RunFolder.open(tmp_path / "out", "finetune", IDENTITY, resume=False)
        tmp_path.chmod(0o700)
