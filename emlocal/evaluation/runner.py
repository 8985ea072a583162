"""Evaluations: each contender answers a task's questions, then the answers are judged and reported.

    Prepared.carry_out(loaded, progress) → Evaluation

Each contender writes its own batch output in OUT/answers. So a run can be resumed, and contenders can be
added to a finished one.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from emlocal.backends.base import Backend
from emlocal.batch.journal import Journal
from emlocal.batch.lines import canonical, is_error, key_of
from emlocal.batch.run import BatchSettings
from emlocal.cancel import interruptible
from emlocal.errors import CancelledError
from emlocal.evaluation.answering import Answer, Answering, Judge, Judged
from emlocal.evaluation.calibration import FOLDS, fit
from emlocal.evaluation.confidence import Cases, score_results
from emlocal.evaluation.contenders import Contender, EvalOptions, describe
from emlocal.evaluation.forecast import Forecast, rows_in
from emlocal.evaluation.remarks import remarks
from emlocal.evaluation.report.document import (
    Document,
    answered_otherwise,
    note_answering,
    provenance,
    write_json,
)
from emlocal.evaluation.report.page import write_page
from emlocal.evaluation.report.texts import write_markdown
from emlocal.evaluation.results import Comparison, MethodResult, compare, summarize
from emlocal.evaluation.tasks.task import Task
from emlocal.generation.prompt import sent_as_it_is
from emlocal.identity import batch_identity, sha256
from emlocal.loading import MOST_PARALLEL, Loaded
from emlocal.methods.confidence import Calibration, subject_of
from emlocal.methods.hints import without_effect
from emlocal.settings import Resolved

Progress = Callable[[str, int, int], None]
"""Receives what is being done, the number done, and the total."""


@dataclass(frozen=True)
class Entry:
    """A contender of an evaluation with its settings."""

    name: str
    described: str
    """The settings in words."""
    settings: BatchSettings
    identity: Mapping[str, object]
    """Everything that must be equal for a run to be resumed."""
    repetitions: int


def answers_path(folder: Path, name: str) -> Path:
    """Returns the file of a contender's answers."""
    return folder / "answers" / (re.sub(r"[^\w.+=-]", "_", name) + ".jsonl")


def others_in(folder: Path, entries: Sequence[Entry]) -> list[str]:
    """Returns the names, without suffix, of the files with other contenders' answers."""
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
    """Returns every contender's answers to every question, by the contender's name.

    `made_with` is recorded for the contenders that answer now.

    Raises CancelledError, UsageError for existing answers that were made with other settings, and the errors
    of the engine and the journal.
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
    """Returns the verdicts on all answers; with `restart`, all are judged again.

    Raises CancelledError and the errors of the task's judging.
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
    """Results of an evaluation. The folder holds results.json, results.md, report.html and all answers."""

    document: Document
    folder: Path
    others: Sequence[str]
    """Methods whose answers are in the folder but not in this report."""
    warnings: Sequence[str]
    calibration: Calibration | None = None
    """The calibration that `calibrate` asked for."""

    @property
    def methods(self) -> Sequence[MethodResult]:
        """Results of each method."""
        return self.document.methods

    @property
    def comparisons(self) -> Sequence[Comparison]:
        """Comparisons of the other methods with the first."""
        return self.document.comparisons


@dataclass(frozen=True)
class Prepared:
    """An evaluation that passed all checks that need no model."""

    asked: EvalOptions
    task: Task
    contenders: Sequence[Contender]
    settings: Resolved
    """Settings that all methods start from. Only methods set EM."""
    calibration: Calibration | None = None
    """Calibration under which confidence is reported too."""

    @property
    def system(self) -> str | None:
        """System message of each question."""
        said = self.asked.system
        return self.task.system if said is None else said or None

    def carry_out(
        self,
        loaded: Loaded,
        progress: Progress = lambda what, done, total: None,
        note: Callable[[str], None] = lambda text: None,
    ) -> Evaluation:
        """Answers, judges, and writes the folder's files. `note` is told if that will take long.

        Raises CancelledError if Ctrl-C stopped it; the same evaluation then resumes there.
        """
        asked, task, backend = self.asked, self.task, loaded.backend
        parallel = asked.parallel or min(MOST_PARALLEL, loaded.parallel)
        entries = self._entries(loaded, parallel)
        name = f"eval-{task.name}-{backend.info.name}"
        # Windows forbids these characters in names
        folder = asked.output or Path(re.sub(r'[/\\:*?"<>|]', "-", name))
        folder.mkdir(parents=True, exist_ok=True)
        made_with = provenance(backend.name)
        restart = not asked.resume
        progress = Forecast(self._missing(folder, entries), progress, note, at_once=parallel)
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
        warnings = remarks(document.methods, judged, self.settings.plan.max_tokens)
        if loaded.backend.info.chat_template is None:
            warnings.append(sent_as_it_is(loaded.backend.info.name))
        warnings += self._mismatches(entries, backend.info.name)
        warnings += [
            f"{entry.name}: {text}"
            for entry in entries
            for text in without_effect(entry.settings.plan, backend.info)
        ]
        return Evaluation(document, folder, others_in(folder, entries), warnings, calibration)

    def _missing(self, folder: Path, entries: Sequence[Entry]) -> list[tuple[str, int, int]]:
        """Returns each method's name, its number of missing answers, and its samples of an answer."""
        n, keep = len(self.task.problems), self.asked.resume
        return [
            (
                entry.name,
                n * entry.repetitions - (rows_in(answers_path(folder, entry.name)) if keep else 0),
                entry.settings.plan.samples,
            )
            for entry in entries
        ]

    def _mismatches(self, entries: Sequence[Entry], model: str) -> list[str]:
        """Returns a warning for each method that the calibration was not made for."""
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
        """Fits and writes the only contender's calibration. Raises EmlocalError if nothing can be fitted."""
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
        """Returns the contenders as they will run. Answers also depend on how many sequences run at once."""
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


def _digest(text: str) -> str:
    """Returns a hash of the first question as asked.

    It changes when a version words questions differently.
    """
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
