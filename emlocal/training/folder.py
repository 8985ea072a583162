"""The folder of a run: the adapter that it leaves, its settings, its metrics and its checkpoints.

    OUT/adapter_config.json, adapter_model.safetensors   the last good adapter, in PEFT's layout, from the
                                                         first checkpoint on
    OUT/run.json                                         what the run is: settings, model, prompts, versions
    OUT/metrics.jsonl                                    a line a step
    OUT/checkpoints/                                     see emlocal.training.checkpoint

So the folder itself is the adapter: `emlocal chat -m MODEL --adapter OUT`.
"""

import json
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from emlocal.errors import EmlocalError, UsageError
from emlocal.files import atomic_writer, sync_folder
from emlocal.models.adapters.adapter import Adapter
from emlocal.models.adapters.peft import write_peft
from emlocal.training import checkpoint
from emlocal.training.checkpoint import Checkpoint

FORMAT = "emlocal-finetune-1"
_RUN, _METRICS = "run.json", "metrics.jsonl"


class RunFolder:
    """An output folder that this process alone writes to. `warnings` is what was found wrong and mended."""

    def __init__(self, path: Path) -> None:
        """For `RunFolder.open`."""
        self.path = path
        self.warnings: list[str] = []
        self._lock = ExitStack()

    @classmethod
    def open(cls, path: Path, identity: Mapping[str, Any], *, resume: bool) -> tuple[Self, Checkpoint | None]:
        """Begin a run in a new or empty folder or, with `resume`, go on with the same run.

        `identity`: what decides the outcome, as JSON; a run that differs in any of it is not gone on with.

        Raises UsageError for a folder that holds something else, EmlocalError where it is in use or cannot
        be written.
        """
        folder = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            folder._acquire()
        except OSError as why:
            raise EmlocalError(f"cannot write {path}: {why.strerror or why}") from why
        try:
            return folder, folder._begin(identity, resume)
        except BaseException:
            folder.close()
            raise

    def _acquire(self) -> None:
        from filelock import FileLock, Timeout

        try:
            self._lock.enter_context(FileLock(self.path / ".lock", timeout=0))
        except Timeout:
            raise EmlocalError(
                f"{self.path} is being written by another emlocal finetune",
                "wait for it to end, or use another -o",
            ) from None

    def _begin(self, identity: Mapping[str, Any], resume: bool) -> Checkpoint | None:
        described = self._read_run()
        if described is None:
            others = [
                p.name for p in self.path.iterdir() if p.name != ".lock" and not p.name.endswith(".tmp")
            ]
            if others:
                raise UsageError(
                    f"{self.path} holds something else: {', '.join(sorted(others)[:3])}",
                    "give a new folder: -o",
                )
            with atomic_writer(self.path / _RUN) as file:
                json.dump({"format": FORMAT, **identity}, file, indent=1)
            return None
        if not resume:
            raise UsageError(
                f"{self.path} holds a run already", "go on with it: --resume; or give a new folder: -o"
            )
        _compare(self.path, described, {"format": FORMAT, **identity})
        found, damaged = checkpoint.latest(self.path / "checkpoints")
        fallback = f"going on from step {found.step}" if found else "beginning anew"
        self.warnings += [f"a damaged checkpoint, {what}; {fallback}" for what in damaged]
        self._keep_metrics(found.step if found else 0)
        return found

    def _read_run(self) -> Mapping[str, Any] | None:
        try:
            described = json.loads((self.path / _RUN).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as why:
            raise UsageError(f"{self.path / _RUN} cannot be read: {why}", "give a new folder: -o") from why
        if not isinstance(described, dict) or described.get("format") != FORMAT:
            raise UsageError(f"{self.path} holds a run of another kind", "give a new folder: -o")
        return described

    def _keep_metrics(self, step: int) -> None:
        """Drop the lines of steps that will be made again, and a torn last one."""
        path = self.path / _METRICS
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if isinstance(row, dict) and row.get("step", step) < step:
                kept.append(line + "\n")
        with atomic_writer(path) as file:
            file.writelines(kept)

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Append a line of metrics."""
        with (self.path / _METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def put_adapter(self, adapter: Adapter) -> None:
        """Make this the adapter that the folder is. Each of its two files is replaced whole; the
        config is the same throughout a run."""
        with tempfile.TemporaryDirectory(dir=self.path, suffix=".tmp") as temporary:
            made = Path(temporary) / "adapter"
            write_peft(adapter, made)
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                (made / name).replace(self.path / name)
        sync_folder(self.path)

    def save(self, state: Checkpoint) -> None:
        """Write a checkpoint."""
        checkpoint.save(self.path / "checkpoints", state)

    def close(self) -> None:
        """Let others have the folder."""
        self._lock.close()


def _compare(path: Path, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise UsageError with every difference."""
    old, new = _flat(held), _flat(json.loads(json.dumps(wanted)))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if names:
        said = "; ".join(f"{n} was {_said(old.get(n))}, is {_said(new.get(n))}" for n in names)
        raise UsageError(
            f"the run in {path} has other settings: {said}",
            "resume it with its own, or give a new folder: -o",
        )


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat


def _said(value: Any) -> str:
    return "not there" if value is None else json.dumps(value, ensure_ascii=False)
