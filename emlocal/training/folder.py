"""The output folder of a training run, and the reports about it.

    OUT/adapter_config.json, adapter_model.safetensors   the last good adapter, in PEFT's layout, from the
                                                         first checkpoint on
    OUT/run.json                                         settings, model, prompts and versions of the run
    OUT/metrics.jsonl                                    one line for each step
    OUT/checkpoints/                                     see emlocal.training.checkpoint

The folder itself is the adapter: `emlocal chat -m MODEL --adapter OUT`.

A `View` reports to people; a `Reporter` sends metrics to a tracker (trackio, Weights & Biases, TensorBoard).
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from emlocal.errors import BackendError, EmlocalError, UsageError
from emlocal.files import atomic_writer, sync_folder
from emlocal.identity import differences
from emlocal.loading import Warn, warn_in_python
from emlocal.models.adapters.adapter import Adapter
from emlocal.models.adapters.folders import write_peft
from emlocal.training import checkpoint
from emlocal.training.checkpoint import Checkpoint

if TYPE_CHECKING:
    from emlocal.training.runner import TrainingResult

Verb = Literal["finetune", "rl"]
"""The kind of a run."""

GO_ON = "fix this, then rerun the same command with --resume"
_RUN, _METRICS = "run.json", "metrics.jsonl"


class RunFolder:
    """An output folder that only this process writes to.

    `warnings` lists the faults that were found and repaired.
    """

    def __init__(self, path: Path) -> None:
        """Stores the path. Use `RunFolder.open`."""
        self.path = path
        self.warnings: list[str] = []
        self._lock = ExitStack()

    @classmethod
    def open(
        cls, path: Path, verb: Verb, identity: Mapping[str, Any], *, resume: bool
    ) -> tuple[Self, Checkpoint | None]:
        """Begins a run in a new or empty folder or, with `resume`, continues the same run.

        `identity`: everything that determines the outcome, as JSON. A run that differs in any of it is not
        resumed.

        Raises UsageError for a folder that holds something else, and EmlocalError if it is in use or cannot
        be written.
        """
        check(path, verb, resume=True)  # before the lock, which writes into the folder
        folder = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            folder._acquire()
        except OSError as why:
            raise EmlocalError(f"cannot write {path}: {why.strerror or why}") from why
        try:
            return folder, folder._begin(verb, identity, resume)
        except BaseException:
            folder.close()
            raise

    def _acquire(self) -> None:
        from filelock import FileLock, Timeout

        try:
            self._lock.enter_context(FileLock(self.path / ".lock", timeout=0))
        except Timeout:
            raise EmlocalError(
                f"{self.path} is being written by another run of emlocal",
                "wait for it to end, or use another -o",
            ) from None

    def _begin(self, verb: Verb, identity: Mapping[str, Any], resume: bool) -> Checkpoint | None:
        # again, because another process may have been quicker
        described = check(self.path, verb, resume=resume)
        self._remove_leftovers()
        if described is None:
            if resume:
                self.warnings.append(f"{self.path} has no run to resume: starting a new one")
            with atomic_writer(self.path / _RUN) as file:
                json.dump({"format": _format(verb), **identity}, file, indent=1)
            return None
        _compare(self.path, described, {"format": _format(verb), **identity})
        found, damaged = checkpoint.latest(self.path / "checkpoints")
        fallback = f"resuming from step {found.step}" if found else "starting again"
        self.warnings += [f"a damaged checkpoint, {what}; {fallback}" for what in damaged]
        if found is None and not damaged:
            self.warnings.append(f"the run in {self.path} has no checkpoint yet: starting again")
        self._keep_metrics(found.step if found else 0)
        return found

    def _remove_leftovers(self) -> None:
        """Removes temporary files that killed runs left behind."""
        checkpoint.remove_leftovers(self.path / "checkpoints")
        for path in _leftovers(self.path):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _keep_metrics(self, step: int) -> None:
        """Drops the lines of steps that will run again, and a torn last line."""
        path = self.path / _METRICS
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                break
            number = row.get("step") if isinstance(row, dict) else None
            if isinstance(number, int) and number < step:
                kept.append(line + "\n")
        with atomic_writer(path) as file:
            file.writelines(kept)

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Appends a line of metrics.

        Raises EmlocalError if it cannot be written.
        """
        path = self.path / _METRICS
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        except OSError as why:
            raise EmlocalError(f"cannot write {path}: {why.strerror or why}", GO_ON) from why

    def put_adapter(self, adapter: Adapter) -> None:
        """Makes this the folder's adapter. Each of its two files is replaced whole.

        The config stays the same throughout a run.

        Raises EmlocalError if it cannot be written.
        """
        try:
            with tempfile.TemporaryDirectory(dir=self.path, prefix=".adapter.", suffix=".tmp") as temporary:
                made = Path(temporary) / "adapter"
                write_peft(adapter, made)
                for name in ("adapter_config.json", "adapter_model.safetensors"):
                    (made / name).replace(self.path / name)
            sync_folder(self.path)
        except (OSError, EmlocalError) as why:
            said = why.message if isinstance(why, EmlocalError) else f"cannot write: {why.strerror or why}"
            raise EmlocalError(
                f"the newest adapter could not be copied to {self.path}: {said}", GO_ON
            ) from why

    def save(self, state: Checkpoint) -> None:
        """Writes a checkpoint. Raises EmlocalError if it cannot be written."""
        try:
            checkpoint.save(self.path / "checkpoints", state)
        except EmlocalError as why:
            raise EmlocalError(why.message, GO_ON) from why

    def close(self) -> None:
        """Releases the folder."""
        self._lock.close()


class OthersFolder:
    """The folder of a run in a process that leaves the writing to another one."""

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Does nothing: see RunFolder."""

    def put_adapter(self, adapter: Adapter) -> None:
        """Does nothing: see RunFolder."""

    def save(self, state: Checkpoint) -> None:
        """Does nothing: see RunFolder."""


def check(path: Path, verb: Verb, *, resume: bool) -> Mapping[str, Any] | None:
    """Returns the content of the folder's run.json, or None if a run may begin there. Writes nothing.

    Raises UsageError for a folder that holds something else, or a run that must not be resumed.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is not a folder", "use a new folder with -o")
    try:
        described = json.loads((path / _RUN).read_text(encoding="utf-8"))
        names = []
    except (FileNotFoundError, NotADirectoryError):
        described = None
        names = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    except (OSError, ValueError, RecursionError) as why:
        raise UsageError(f"{path / _RUN} cannot be read: {why}", "use a new folder with -o") from why
    ours = {".lock", *(p.name for p in _leftovers(path))}
    others = [name for name in names if name not in ours]
    if others:
        raise UsageError(f"{path} has other files: {', '.join(others[:3])}", "use a new folder with -o")
    if described is None:
        return None
    if not isinstance(described, dict) or described.get("format") != _format(verb):
        raise UsageError(f"{path} has a run of another kind", "use a new folder with -o")
    if not resume:
        raise UsageError(f"{path} has a run already", "resume it with --resume, or use a new folder with -o")
    return described


def _format(verb: Verb) -> str:
    return f"emlocal-{verb}-1"


def _leftovers(path: Path) -> list[Path]:
    """Returns this module's temporary files in a folder that nobody writes to any more."""
    return [p for name in (_RUN, _METRICS, "adapter") for p in path.glob(f".{name}.*.tmp")]


def _compare(path: Path, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises UsageError that lists every difference."""
    if differing := differences(_by_name(held), _by_name(wanted)):
        raise UsageError(
            f"the run in {path} has other settings: {differing}",
            "resume it with its own settings, or use a new folder with -o",
        )


def _by_name(described: Mapping[str, Any]) -> dict[str, Any]:
    """Moves the settings to the top level, under their own names."""
    settings = described.get("settings")
    return {**described, "settings": {}, **(settings if isinstance(settings, dict) else {})}


_MODULES = {"trackio": "trackio", "wandb": "wandb", "tensorboard": "tensorboard.summary"}


def check_package(name: str) -> None:
    """Raises UsageError for an unknown tracker, and BackendError if its package is missing."""
    if name not in _MODULES:
        raise UsageError(f"--report-to is {name!r}; it must be {' or '.join(_MODULES)}")
    if find_spec(name) is None:
        raise BackendError(f"--report-to {name} needs its package", f"pip install {name}")


class Reporter:
    """Sends each step's numbers to one of the trackers. Use it in a `with` block."""

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        """Opens the tracker.

        Raises UsageError for an unknown one, and BackendError if its package is missing.
        """
        check_package(name)
        package: Any = import_module(_MODULES[name])
        if name == "tensorboard":
            writer = package.Writer(str(folder / "tensorboard"))
            self._log: Any = lambda step, row: [writer.add_scalar(key, v, step) for key, v in row.items()]
            self._finish: Any = writer.close
        else:
            package.init(project="emlocal", name=folder.name, config=dict(settings))
            self._log = lambda step, row: package.log(dict(row), step=step)
            self._finish = package.finish

    def log(self, row: Mapping[str, Any]) -> None:
        """Sends the numbers in a line of metrics, at its step."""
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        self._log(row["step"], numbers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()


class View:
    """Receives reports about a run.

    This one shows only warnings; the command line's draws bars and a table.
    """

    def __init__(self, warn: Warn = warn_in_python) -> None:
        self._warn = warn
        self.reporter: Reporter | None = None

    def loading(self, what: str, done: int, total: int | None) -> None:
        """Reports a preparation: a download, loading the model, encoding prompts. A `Progress`."""

    def begin(self, lines: Sequence[str], resumed: int | None) -> None:
        """Describes the run in lines before it begins; `resumed`: the step after which it continues."""

    def answering(self, step: int, done: int, total: int) -> None:
        """Reports how many answers of this step are drawn."""

    def training(self, step: int, done: int, total: int) -> None:
        """Reports how many answers of this step are processed."""

    def validating(self, done: int, total: int) -> None:
        """Reports how many prompts with known answers are answered."""

    def finished_step(self, row: dict[str, Any]) -> None:
        """Receives a line of metrics."""
        if self.reporter is not None:
            self.reporter.log(row)

    def warn(self, text: str) -> None:
        """Warns people."""
        self._warn(text)

    def said(self, text: str) -> None:
        """Reports the result of a part of the run."""

    def validated(self, before: float, after: float) -> None:
        """Reports the accuracies before and after the run."""

    def stopped(self, output: Path) -> None:
        """Reports that the run was stopped on request."""

    def ended(self, result: "TrainingResult") -> None:
        """Reports that the run ended by itself."""
