"""An evaluation: contenders one after the other over a task's questions, then the verdicts, then the report.

    prepare(task, methods, …) → Prepared.carry_out(loaded, progress) → Evaluation

A contender's answers are a batch output of its own in OUT/answers, so that a run goes on where it stopped,
and contenders can be added to one that is finished.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from emlocal.backends.base import Backend
from emlocal.batch.journal import Journal
from emlocal.batch.lines import canonical, is_error, key_of
from emlocal.batch.run import BatchSettings
from emlocal.cancel import interruptible
from emlocal.errors import CancelledError, EmlocalError, UsageError
from emlocal.evaluation.answering import Answer, Answering, Judge, Judged
from emlocal.evaluation.calibration import FOLDS, check_target, fit
from emlocal.evaluation.confidence import Cases, score_results
from emlocal.evaluation.contenders import Contender, EvalOptions, describe, read_contenders
from emlocal.evaluation.report.document import (
    Document,
    answered_otherwise,
    check_folder,
    note_answering,
    provenance,
    write_json,
)
from emlocal.evaluation.report.page import write_page
from emlocal.evaluation.report.texts import write_markdown
from emlocal.evaluation.results import Comparison, MethodResult, compare, summarize
from emlocal.evaluation.tasks import open_task
from emlocal.evaluation.tasks.task import Task
from emlocal.generation.prompt import sent_as_it_is
from emlocal.identity import batch_identity, sha256
from emlocal.loading import MOST_PARALLEL, Adapters, Loaded, Warn, load_for_batch, warn_in_python
from emlocal.methods.confidence import Calibration, read_calibration, subject_of
from emlocal.sandbox.run import check_containment
from emlocal.settings import Resolved, resolve_settings
from emlocal.settings.confidence import CALIBRATION, ConfidenceOptions
from emlocal.settings.options import EngineOptions
from emlocal.settings.resolve import SAMPLING
from emlocal.settings.table import NAMES, Table, options_of
from emlocal.text import counted

_PACKAGES = {"math_verify": "math-verify", "matplotlib": "matplotlib", "scipy": "scipy"}

Progress = Callable[[str, int, int], None]
"""Takes what is being done, how many are done, and of how many."""


@dataclass(frozen=True)
class Entry:
    """A contender in an evaluation."""

    name: str
    described: str
    """Its settings in words."""
    settings: BatchSettings
    identity: Mapping[str, object]
    """What a run that goes on must have the same."""
    repetitions: int


def answers_path(folder: Path, name: str) -> Path:
    """Where a contender's answers are."""
    return folder / "answers" / (re.sub(r"[^\w.+=-]", "_", name) + ".jsonl")


def others_in(folder: Path, entries: Sequence[Entry]) -> list[str]:
    """The files of other contenders' answers, by their names without the ending."""
    own = {answers_path(folder, entry.name) for entry in entries}
    return sorted(path.stem for path in (folder / "answers").glob("*.jsonl") if path not in own)


def answer(
    backend: Backend,
    task: Task,
    entries: Sequence[Entry],
    folder: Path,
    *,
    system: str | None,
    parallel: int,
    made_with: Mapping[str, object],
    restart: bool = False,
    cancelled: Callable[[], bool] = lambda: False,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, list[Answer]]:
    """Every contender's answers to every question, by the contender's name.

    `made_with` is remembered for those that are answered now.

    Raises CancelledError, UsageError for answers that are there and were made otherwise, and what the engine
    and the journal raise.
    """
    answers_path(folder, "").parent.mkdir(parents=True, exist_ok=True)
    found = {}
    for entry in entries:
        with Journal.open(
            answers_path(folder, entry.name),
            entry.identity,
            key_of=key_of,
            is_error=is_error,
            restart=restart,
        ) as journal:
            running = Answering(
                backend, task, entry.settings, entry.repetitions, journal, parallel, system=system
            )
            there = len(running.answers())
            progress(entry.name, there, running.total)
            if there < running.total:
                note_answering(folder, entry.name, made_with)
            for done, _ in enumerate(running.run(cancelled), there + 1):
                progress(entry.name, done, running.total)
            found[entry.name] = running.answers()
    return found


def judge(
    task: Task,
    answers: Mapping[str, Sequence[Answer]],
    folder: Path,
    *,
    restart: bool = False,
    cancelled: Callable[[], bool] = lambda: False,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, list[Judged]]:
    """The verdicts on all answers, with `restart` all made anew.

    Raises CancelledError, and what the task's judging raises.
    """
    verdicts = folder / "verdicts.jsonl"
    if restart:
        verdicts.unlink(missing_ok=True)
    total, done = sum(map(len, answers.values())), 0
    found: dict[str, list[Judged]] = {}
    with Judge(task, verdicts) as judge:
        for name, given in answers.items():
            found[name] = []
            for judged in judge.judge(given, cancelled):
                found[name].append(judged)
                done += 1
                progress("judging", done, total)
            if cancelled():
                raise CancelledError
    return found


@dataclass(frozen=True)
class Evaluation:
    """What came of it. The folder has results.json, results.md, report.html, and all answers."""

    document: Document
    folder: Path
    others: Sequence[str]
    """Methods whose answers are in the folder, and that this run does not report."""
    warnings: Sequence[str]
    calibration: Calibration | None = None
    """What `calibrate` was fitted to."""

    @property
    def methods(self) -> Sequence[MethodResult]:
        """How each method did."""
        return self.document.methods

    @property
    def comparisons(self) -> Sequence[Comparison]:
        """The others against the first."""
        return self.document.comparisons


def evaluate(
    task: str,
    methods: str = "greedy,sample,em-inf",
    *,
    progress: Progress = lambda what, done, total: None,
    warn: Warn = warn_in_python,
    **given: Any,
) -> Evaluation:
    """Compare ways of answering on problems with known answers, as `emlocal eval`.

    Args:
        task: gsm8k, math500, …; "questions" for any file of questions and answers.
        methods: as on the command line; the others are held against the first.
        progress: takes what is being done, how many are done, and of how many.
        given: settings by the names of their flags, with underscores: of the evaluation (data, limit,
            samples, output, calibrate, …), of loading (model, backend, context, …) and of sampling, and
            calibration; `adapters` as `emlocal.load` has them.
    Raises:
        UsageError: unknown or bad settings, methods or data; a folder with other settings.
        ModelError: a model or adapter that cannot be used.
        CancelledError: Ctrl-C; the same call goes on where it stopped.
    """
    given = {name: str(v) if isinstance(v, Path) and name == "model" else v for name, v in given.items()}
    adapters: Adapters = given.pop("adapters", ())
    tables = Table.of(EvalOptions).without("quiet"), Table.of(EngineOptions).without("adapter"), SAMPLING
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


@dataclass(frozen=True)
class Prepared:
    """An evaluation that was checked as far as it can be without a model."""

    asked: EvalOptions
    task: Task
    contenders: Sequence[Contender]
    settings: Resolved
    """What all methods begin with. EM is for methods to say."""
    calibration: Calibration | None = None
    """Confidence is reported as this has it, too."""

    @property
    def system(self) -> str | None:
        """Said before each question."""
        said = self.asked.system
        return self.task.system if said is None else said or None

    def carry_out(self, loaded: Loaded, progress: Progress = lambda what, done, total: None) -> Evaluation:
        """Answer, judge, and write the folder's files.

        Raises CancelledError where Ctrl-C stopped it: the same evaluation goes on from there.
        """
        asked, task, backend = self.asked, self.task, loaded.backend
        parallel = asked.parallel or min(MOST_PARALLEL, loaded.parallel)
        entries = self._entries(loaded, parallel)
        name = f"eval-{task.name}-{backend.info.name}"
        folder = asked.output or Path(re.sub(r'[/\\:*?"<>|]', "-", name))  # as Windows has them, too
        folder.mkdir(parents=True, exist_ok=True)
        made_with = provenance(backend.name)
        restart = not asked.resume
        with interruptible() as cancelled:
            answers = answer(
                backend,
                task,
                entries,
                folder,
                system=self.system,
                parallel=parallel,
                made_with=made_with,
                restart=restart,
                cancelled=cancelled,
                progress=progress,
            )
            judged = judge(task, answers, folder, restart=restart, cancelled=cancelled, progress=progress)
        if others := answered_otherwise(folder, [entry.name for entry in entries], made_with):
            made_with["answered with"] = others
        document = self._document(entries, loaded, judged, parallel, made_with)
        write_json(document, folder / "results.json")
        write_markdown(document, folder / "results.md")
        write_page(document, folder / "report.html")
        calibration = self._calibrate(entries[0], loaded, judged)
        warnings = [
            f"{method.name}: {counted(method.errors, 'question')} could not be asked; a larger --context"
            " needs --restart, or another -o"
            for method in document.methods
            if method.errors
        ]
        if loaded.backend.info.chat_template is None:
            warnings.append(sent_as_it_is(loaded.backend.info.name))
        warnings += self._mismatches(entries, backend.info.name)
        return Evaluation(document, folder, others_in(folder, entries), warnings, calibration)

    def _mismatches(self, entries: Sequence[Entry], model: str) -> list[str]:
        """Warnings of methods that the calibration was not made for."""
        if self.calibration is None:
            return []
        found = (
            self.calibration.mismatch(subject_of(model, contender.method, entry.settings.plan))
            for contender, entry in zip(self.contenders, entries, strict=True)
        )
        return [text for text in found if text is not None]

    def _calibrate(
        self, entry: Entry, loaded: Loaded, judged: Mapping[str, Sequence[Judged]]
    ) -> Calibration | None:
        """The calibration of the only contender, written. Raises EmlocalError where nothing can be fitted."""
        path, task = self.asked.calibrate, self.task
        if path is None:
            return None
        cases = self._cases(judged[entry.name])
        fitted = fit(cases, entry.settings.plan.seed)
        found = Calibration(
            subject_of(loaded.backend.info.name, self.contenders[0].method, entry.settings.plan),
            fitted.score,
            fitted.curve,
            {
                "task": task.name,
                "data": task.source,
                "method": entry.name,
                "answers": len(cases.right),
                "right": sum(cases.right),
                "adapters": [f"{adapter} × {scale:g}" for adapter, scale in loaded.adapters],
                "date": date.today().isoformat(),
            },
            {
                "folds": FOLDS,
                **({} if fitted.auroc is None else {"auroc": round(fitted.auroc, 4)}),
                "calibration_error": round(fitted.calibration_error, 4),
                "brier": round(fitted.brier, 4),
            },
            str(path),
        )
        found.write(path)
        return found

    def _cases(self, judged: Sequence[Judged]) -> Cases:
        return Cases.of(judged, [self.task.whole(one.answer.problem) for one in judged])

    def _entries(self, loaded: Loaded, parallel: int) -> list[Entry]:
        """The contenders as they will run. How many run at once is part of what an answer comes from."""
        task, chosen = self.task, self.settings.chosen
        base = self.settings.with_model(loaded.backend.info.sampling).plan
        entries = []
        for contender in self.contenders:
            plan = contender.plan(base, chosen)
            settings = BatchSettings(plan, contender.method.collected(), chosen, entropies=True)
            identity = batch_identity(settings, loaded) | {
                "task": task.name,
                "data": task.identity,
                "prompt": _digest(task.ask(task.problems[0], {})),
                "system": self.system,
                "parallel": parallel,
            }
            repetitions = 1 if plan.params.temperature == 0 else self.asked.samples
            settings = replace(settings, fingerprint=canonical(identity))
            described = describe(contender, plan, base)
            entries.append(Entry(contender.name, described, settings, identity, repetitions))
        return entries

    def _document(
        self,
        entries: Sequence[Entry],
        loaded: Loaded,
        judged: dict[str, list[Judged]],
        parallel: int,
        made_with: Mapping[str, object],
    ) -> Document:
        task, backend = self.task, loaded.backend
        header, plan = loaded.model.header, entries[0].settings.plan
        multiplied = header.multiplied_parameters
        results = [
            summarize(task, entry.name, entry.described, judged[entry.name], multiplied, plan.seed)
            for entry in entries
        ]
        scored = {
            entry.name: score_results(self._cases(judged[entry.name]), plan.seed, self.calibration)
            for entry in entries
        }
        return Document(
            task,
            {
                "name": backend.info.name,
                "file": loaded.model.files[0].name,
                "sha256": sha256(loaded.model.files),
                "parameters": header.parameters,
                "multiplied_parameters": multiplied,
                "quantization": header.quantization,
                "adapters": [f"{path} × {scale:g}" for path, scale in loaded.adapters],
            },
            {
                "engine": backend.name,
                "runs": backend.describe(),
                "parallel": parallel,
                "seed": plan.seed,
                "samples": self.asked.samples,
                "max_tokens": plan.max_tokens,
                "stop": list(plan.stop),
                "system": self.system,
            },
            made_with,
            results,
            compare(task, results, plan.seed),
            judged,
            {name: found for name, found in scored.items() if found},
        )


def prepare(
    task: str, methods: str, asked: EvalOptions, settings: Resolved, calibration: Path | None = None
) -> Prepared:
    """Check everything that can be checked before a model is loaded.

    Raises UsageError for what cannot be used, EmlocalError for what would fail at the end.
    """
    contenders = read_contenders(methods, asked.allow_code)
    for contender in contenders:  # what contradicts itself fails before a model is loaded
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
            f"{voting[0]} votes on answers; those of {task.name} are programs", "leave it out of --methods"
        )
    running = [c.name for c in contenders if c.method.collecting.runs_code]
    if running and not task.runs_code:
        raise UsageError(
            f"{running[0]} runs programs; the answers of {task.name} are none", "leave it out of --methods"
        )


def _digest(text: str) -> str:
    """Of the first question as it is asked: a sign of the words that this version asks with."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
