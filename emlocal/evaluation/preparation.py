"""The way into an evaluation: checks all that needs no model, then loads one and carries the evaluation out.

prepare(task, methods, …) → Prepared.carry_out(loaded, progress) → Evaluation
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from emlocal.errors import EmlocalError, UsageError
from emlocal.evaluation.calibration import check_target
from emlocal.evaluation.contenders import Contender, EvalOptions, read_contenders
from emlocal.evaluation.report.document import check_folder
from emlocal.evaluation.runner import Evaluation, Prepared, Progress
from emlocal.evaluation.tasks import open_task
from emlocal.evaluation.tasks.task import Task
from emlocal.loading import Adapters, Warn, load_for_batch, warn_in_python
from emlocal.methods.confidence import read_calibration
from emlocal.sandbox.run import check_containment
from emlocal.settings import Resolved, resolve_settings
from emlocal.settings.confidence import CALIBRATION, ConfidenceOptions
from emlocal.settings.options import EngineOptions
from emlocal.settings.resolve import SAMPLING
from emlocal.settings.table import NAMES, Table, options_of

_PACKAGES = {"math_verify": "math-verify", "matplotlib": "matplotlib", "scipy": "scipy"}


def evaluate(
    task: str,
    methods: str = "greedy,sample,em-inf",
    *,
    progress: Progress = lambda what, done, total: None,
    warn: Warn = warn_in_python,
    **given: Any,
) -> Evaluation:
    """Compares methods of answering on problems with known answers, like `emlocal eval`.

    Args:
        task: gsm8k, math500, …; "questions" for any file of questions and answers.
        methods: as on the command line; the others are compared with the first.
        progress: receives what is being done, the number done, and the total.
        given: settings by the names of their flags, with underscores: of the evaluation (data, limit,
            samples, output, calibrate, …), of loading (model, backend, context, …), of sampling, and
            calibration; `adapters` as in `emlocal.load`.
    Raises:
        UsageError: unknown or bad settings, methods or data; a folder with other settings.
        ModelError: a model or adapter that cannot be used.
        CancelledError: Ctrl-C; the same call resumes the run.
    """
    given = {name: str(v) if isinstance(v, Path) and name == "model" else v for name, v in given.items()}
    adapters: Adapters = given.pop("adapters", ())
    tables = (
        Table.of(EvalOptions).without("quiet"),
        Table.of(EngineOptions).without("adapter", "speculate"),
        SAMPLING,
    )
    values = (tables[0] | tables[1] | tables[2] | CALIBRATION).read(given, NAMES)
    keywords = ("keyword", values)
    calibration = options_of(ConfidenceOptions, keywords).calibration
    options, settings = options_of(EvalOptions, keywords), resolve_settings(keywords)
    prepared = prepare(task, methods, options, settings, calibration)
    wanted = options_of(EngineOptions, keywords)
    loaded = load_for_batch(wanted, prepared.asked.parallel, adapters, warn=warn)
    try:
        found = prepared.carry_out(loaded, progress)
    finally:
        loaded.backend.close()
    for text in found.warnings:
        warn(text)
    return found


def prepare(
    task: str, methods: str, asked: EvalOptions, settings: Resolved, calibration: Path | None = None
) -> Prepared:
    """Checks everything that can be checked before a model is loaded.

    Raises UsageError for arguments that cannot be used, and EmlocalError for anything that would fail at the
    end.
    """
    contenders = read_contenders(methods, asked.allow_code)
    for contender in contenders:  # contradictory settings must fail before a model is loaded
        contender.plan(settings.plan, settings.chosen)
    found = open_task(task, asked.data, asked.limit, asked.code_seconds, asked.targets)
    _check(found, contenders, asked)
    check_folder(asked.output)
    check_target(asked.calibrate, len(contenders))
    known = None if calibration is None else read_calibration(calibration)
    return Prepared(asked, found, contenders, settings, known)


def _check(task: Task, contenders: Sequence[Contender], asked: EvalOptions) -> None:
    for module, package in _PACKAGES.items():
        if find_spec(module) is None:
            raise EmlocalError(f"emlocal eval needs the package {package}", "pip install 'emlocal[eval]'")
    if task.runs_code:
        if not asked.allow_code:
            raise UsageError(
                f"--task {task.name} runs code that the model writes",
                "add --allow-code; docs/evaluation.md says how it is contained",
            )
        check_containment()
    voting = [c.name for c in contenders if c.method.collecting.votes]
    if voting and not task.votes:
        raise UsageError(
            f"{voting[0]} votes on answers, but the answers to {task.name} are programs",
            "leave it out of --methods",
        )
    running = [c.name for c in contenders if c.method.collecting.runs_code]
    if running and not task.runs_code:
        raise UsageError(
            f"{running[0]} runs programs, but the answers to {task.name} are not programs",
            "leave it out of --methods",
        )
