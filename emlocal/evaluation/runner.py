"""An evaluation: contenders one after the other over a task's questions, then the verdicts, then the report.

    prepare(setup, base) → Prepared.carry_out(loaded, progress) → Evaluation

A contender's answers are a batch output of its own in OUT/answers, so that a run goes on where it stopped,
and contenders can be added to one that is finished.
"""

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from emlocal.backends.base import Backend
from emlocal.batch.journal import Journal
from emlocal.batch.lines import canonical
from emlocal.batch.overrides import Plan
from emlocal.batch.rows import is_error, key_of
from emlocal.batch.run import BatchSettings
from emlocal.cancel import interruptible
from emlocal.errors import CancelledError, EmlocalError, UsageError
from emlocal.evaluation.answering import Answer, Answering
from emlocal.evaluation.contenders import Contender, describe, read_contenders
from emlocal.evaluation.judging import Judge, Judged
from emlocal.evaluation.provenance import answered_with, note_answering, provenance
from emlocal.evaluation.report.document import Document, write_json
from emlocal.evaluation.report.page import write_page
from emlocal.evaluation.report.texts import write_markdown
from emlocal.evaluation.results import Comparison, MethodResult, compare, summarize
from emlocal.evaluation.sandbox.run import check_containment
from emlocal.evaluation.tasks.open import open_task
from emlocal.evaluation.tasks.task import Task
from emlocal.formatting import counted
from emlocal.identity import batch_identity, sha256
from emlocal.loading import MOST_PARALLEL, Loaded, Wanted, Warn, load_for_batch, warn_in_python
from emlocal.settings import DEFAULT_MAX_TOKENS, SamplingParams, settings_of

_MOST_SAMPLES = 1024
_PACKAGES = {"math_verify": "math-verify", "matplotlib": "matplotlib", "scipy": "scipy"}

Base = tuple[Plan, frozenset[str]]
"""What all methods begin with, and which of its settings were set on purpose. EM is for methods to say."""

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
class Setup:
    """What is asked, and what becomes of it."""

    task: str
    methods: str = "greedy,sample,em-inf"
    """The others are held against the first."""
    data: Path | None = None
    """A file of problems; None: from the hub."""
    targets: Path | None = None
    """SciCode's test_data.h5, for problems without gold code."""
    limit: int | None = None
    """Only the first problems."""
    samples: int = 1
    """Answers to each problem: mean@N and pass@k."""
    system: str | None = None
    """System message, instead of the task's."""
    output: Path | None = None
    """The folder; None: eval-TASK-MODEL."""
    allow_code: bool = False
    """Run code that the model writes, contained."""
    code_seconds: float | None = None
    resume: bool = True
    """Go on with answers that are there, rather than begin again."""
    parallel: int | None = None
    """Sequences at once; None: 16, or as memory allows."""


@dataclass(frozen=True)
class Evaluation:
    """What came of it. The folder has results.json, results.md, report.html, and all answers."""

    document: Document
    folder: Path
    others: Sequence[str]
    """Methods whose answers are in the folder, and that this run does not report."""
    warnings: Sequence[str]

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
        given: fields of Setup (data, limit, samples, output, …), of Wanted (model, backend, adapters, …),
            numbers of SamplingParams, and seed, max_tokens, stop.
    Raises:
        UsageError: unknown or bad settings, methods or data; a folder with other settings.
        ModelError: a model or adapter that cannot be used.
        CancelledError: Ctrl-C; the same call goes on where it stopped.
    """
    kinds = {kind: {f.name for f in fields(kind)} for kind in (Setup, Wanted)}
    numbers = set(settings_of(SamplingParams))
    known = set.union(*kinds.values(), numbers, {"seed", "max_tokens", "stop"})
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise UsageError(f"there is no setting {name}", f"you may mean {near[0]}" if near else "")
    of_setup, of_wanted = ({n: v for n, v in given.items() if n in names} for names in kinds.values())
    for name in ("data", "targets", "output"):
        if of_setup.get(name) is not None:
            of_setup[name] = Path(of_setup[name])
    if of_wanted.get("model") is not None:
        of_wanted["model"] = str(of_wanted["model"])
    chosen = {name: value for name, value in given.items() if name in numbers}
    stop = given.get("stop", ())

    def base(own: Mapping[str, float]) -> Base:
        params = SamplingParams(**{**{n: v for n, v in own.items() if n in numbers}, **chosen})
        limits = (
            given.get("max_tokens", DEFAULT_MAX_TOKENS),
            (stop,) if isinstance(stop, str) else tuple(stop),
        )
        return Plan(params, *limits, given.get("seed", 0), 1), frozenset(chosen)

    prepared = prepare(Setup(task, methods, **of_setup), base)
    loaded = load_for_batch(Wanted(**of_wanted), prepared.setup.parallel, warn=warn)
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

    setup: Setup
    task: Task
    contenders: Sequence[Contender]
    base: Callable[[Mapping[str, float]], Base]

    @property
    def system(self) -> str | None:
        """Said before each question."""
        said = self.setup.system
        return self.task.system if said is None else said or None

    def carry_out(self, loaded: Loaded, progress: Progress = lambda what, done, total: None) -> Evaluation:
        """Answer, judge, and write the folder's files.

        Raises CancelledError where Ctrl-C stopped it: the same evaluation goes on from there.
        """
        setup, task, backend = self.setup, self.task, loaded.backend
        parallel = setup.parallel or min(MOST_PARALLEL, loaded.parallel)
        entries = self._entries(loaded, parallel)
        name = f"eval-{task.name}-{backend.info.name}"
        folder = setup.output or Path(re.sub(r'[/\\:*?"<>|]', "-", name))  # as Windows has them, too
        folder.mkdir(parents=True, exist_ok=True)
        made_with = provenance(backend.name)
        restart = not setup.resume
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
        if others := _answered(folder, entries, made_with):
            made_with["answered with"] = others
        document = self._document(entries, loaded, judged, parallel, made_with)
        write_json(document, folder / "results.json")
        write_markdown(document, folder / "results.md")
        write_page(document, folder / "report.html")
        warnings = [
            f"{method.name}: {counted(method.errors, 'question')} could not be asked; a larger --context"
            " needs --restart, or another -o"
            for method in document.methods
            if method.errors
        ]
        return Evaluation(document, folder, others_in(folder, entries), warnings)

    def _entries(self, loaded: Loaded, parallel: int) -> list[Entry]:
        """The contenders as they will run. How many run at once is part of what an answer comes from."""
        base, task = self.base(loaded.backend.info.sampling), self.task
        entries = []
        for contender in self.contenders:
            plan = contender.plan(*base)
            settings = BatchSettings(plan, contender.collecting, base[1], entropies=True)
            identity = batch_identity(settings, loaded) | {
                "task": task.name,
                "data": task.identity,
                "prompt": _digest(task.ask(task.problems[0], {})),
                "system": self.system,
                "parallel": parallel,
            }
            repetitions = 1 if plan.params.temperature == 0 else self.setup.samples
            settings = replace(settings, fingerprint=canonical(identity))
            described = describe(contender, plan, base[0])
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
                "samples": self.setup.samples,
                "max_tokens": plan.max_tokens,
                "stop": list(plan.stop),
                "system": self.system,
            },
            made_with,
            results,
            compare(task, results, plan.seed),
            judged,
        )


def prepare(setup: Setup, base: Callable[[Mapping[str, float]], Base]) -> Prepared:
    """Check everything that can be checked before a model is loaded.

    `base` takes the model's own sampling settings. Raises UsageError for what cannot be used, EmlocalError
    for what would fail at the end.
    """
    contenders = read_contenders(setup.methods)
    for contender in contenders:  # what contradicts itself fails before a model is loaded
        contender.plan(*base({}))
    task = open_task(setup.task, setup.data, setup.limit, setup.code_seconds, setup.targets)
    _check(task, contenders, setup)
    _check_folder(setup.output)
    return Prepared(setup, task, contenders, base)


def _check(task: Task, contenders: Sequence[Contender], setup: Setup) -> None:
    for module, package in _PACKAGES.items():
        if find_spec(module) is None:
            raise EmlocalError(f"emlocal eval needs the package {package}", "pip install 'emlocal[eval]'")
    if not 1 <= setup.samples <= _MOST_SAMPLES:
        raise UsageError(f"--samples is {setup.samples}; it must be between 1 and {_MOST_SAMPLES:,}")
    if task.runs_code:
        if not setup.allow_code:
            raise UsageError(
                f"--task {task.name} runs code that the model writes",
                "add --allow-code; docs/evaluation.md says how it is contained",
            )
        check_containment()
    voting = [c.name for c in contenders if c.collecting.name == "self-consistency"]
    if voting and not task.votes:
        raise UsageError(
            f"{voting[0]} votes on answers; those of {task.name} are programs", "leave it out of --methods"
        )


def _check_folder(output: Path | None) -> None:
    """Raise UsageError where no folder can be: before a model is loaded."""
    if output is None:
        return
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"{there} is a file, and -o names a folder", "use another -o")
    if not os.access(there, os.W_OK):
        raise UsageError(f"nothing can be written into {there}", "use another -o")


def _digest(text: str) -> str:
    """Of the first question as it is asked: a sign of the words that this version asks with."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _answered(folder: Path, entries: Sequence[Entry], now: Mapping[str, object]) -> dict[str, list[str]]:
    """By method, what its answers were made with where that is not what this run has: versions, commit."""
    before = answered_with(folder)
    found = {}
    for entry in entries:
        others = [made for made in before.get(entry.name, []) if made != now]
        if others:
            found[entry.name] = [
                ", ".join(f"{name} {value}" for name, value in made.items() if value != now.get(name))
                for made in others
            ]
    return found
