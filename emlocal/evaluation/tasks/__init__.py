"""Tasks: the questions for the models, and how their answers are judged.

`open_task` makes a task from its name and a file.

- `task`: what a task is, and rows from JSONL, JSON, gzip or the hub
- `mathematics`: questions with one answer: GSM8K, MATH-500, and similar files
- `programs`: HumanEval and its kind: write a function that passes tests
- `scicode`: problems in steps, each built on the code of earlier steps; `scicode_h5` reads official targets,
  and `scicode_targets` (computed targets) and `scicode_official` run in the sandbox
"""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from emlocal.errors import EmlocalError, UsageError
from emlocal.evaluation.tasks.mathematics import MathTask
from emlocal.evaluation.tasks.programs import ProgramTask
from emlocal.evaluation.tasks.scicode import LIMITS as SCICODE_LIMITS
from emlocal.evaluation.tasks.scicode import SciCodeTask, given_code
from emlocal.evaluation.tasks.scicode_h5 import TargetFile
from emlocal.evaluation.tasks.task import Rows, Task, hub, read_rows
from emlocal.sandbox.run import Limits

TaskName = Literal[
    "gsm8k",
    "math500",
    "amc",
    "aime",
    "minerva",
    "olympiadbench",
    "humaneval",
    "leetcode",
    "scicode",
    "questions",
]
NAMES: tuple[TaskName, ...] = get_args(TaskName)
_ON_THE_HUB = {
    "gsm8k": ("openai/gsm8k", "test", "main"),
    "math500": ("HuggingFaceH4/MATH-500", "test", None),
    "amc": ("AI-MO/aimo-validation-amc", "train", None),
    "aime": ("AI-MO/aimo-validation-aime", "train", None),
    "olympiadbench": ("Hothan/OlympiadBench", "train", "OE_TO_maths_en_COMP"),
    "humaneval": ("openai/openai_humaneval", "test", None),
}


def open_task(
    name: str,
    data: Path | None,
    limit: int | None = None,
    code_seconds: float | None = None,
    targets: Path | None = None,
) -> Task:
    """Opens a task with its first `limit` problems, from a file or from the hub.

    `questions` is any file of questions with answers. `targets` is SciCode's file of targets, for problems
    without gold code.

    Raises UsageError for an unknown name, an unsuitable file, or a missing file if the hub has none. Raises
    EmlocalError if the hub cannot be reached, or if h5py is missing for the targets.
    """
    if name not in NAMES:
        raise UsageError(f"--task is {name!r}; it must be one of {', '.join(NAMES)}")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit is {limit}; it must be at least 1")
    if targets is not None and name != "scicode":
        raise UsageError(f"--targets works with --task scicode only; --task is {name}", "leave it out")
    chosen = _rows(name, data, limit).first(limit)
    if name == "scicode":
        beside = given_code(path.expanduser().parent for path in (data, targets) if path is not None)
        file = None if targets is None else TargetFile(targets)
        return SciCodeTask(chosen, _limits(SCICODE_LIMITS, code_seconds), file, beside)
    if name in ("humaneval", "leetcode"):
        return ProgramTask(name, chosen, _limits(Limits(), code_seconds))
    return MathTask(name if name != "questions" or data is None else data.stem, chosen)


def _limits(usual: Limits, seconds: float | None) -> Limits:
    if seconds is None:
        return usual
    if not 0 < seconds <= 3600:
        raise UsageError(f"--code-seconds is {seconds:g}; it must be more than 0 and at most 3600")
    return replace(usual, seconds=seconds)


def _rows(name: str, data: Path | None, limit: int | None) -> Rows:
    if data is not None:
        return read_rows(data)
    if name not in _ON_THE_HUB:
        raise UsageError(f"--task {name} needs its file", "name it with --data FILE")
    if find_spec("datasets") is None:
        raise EmlocalError(
            f"--task {name} without --data reads the hub, which needs the package datasets",
            "name its file with --data, or pip install datasets",
        )
    dataset, split, config = _ON_THE_HUB[name]
    return hub(dataset, split, limit, config)
