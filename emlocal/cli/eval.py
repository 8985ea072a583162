"""`emlocal eval`: ways of answering compared on problems with known answers."""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import typer

from emlocal import console
from emlocal.cli.options import with_options
from emlocal.cli.running import identity_of
from emlocal.errors import CancelledError, EmlocalError, UsageError
from emlocal.settings import Given, Plan, resolve_settings
from emlocal.settings.em import EM
from emlocal.settings.engine import ENGINE, EngineOptions
from emlocal.settings.resolve import SAMPLING
from emlocal.settings.table import NOTHING, options_of, setting
from emlocal.words import counted

if TYPE_CHECKING:
    from emlocal.cli.engine import Opened
    from emlocal.evaluation.contenders import Contender
    from emlocal.evaluation.judging import Judged
    from emlocal.evaluation.report.document import Document
    from emlocal.evaluation.run import Entry
    from emlocal.evaluation.tasks.task import Task

_PACKAGES = {"math_verify": "math-verify", "matplotlib": "matplotlib", "scipy": "scipy"}


@dataclass(frozen=True)
class EvalOptions:
    """What is asked, and what becomes of it."""

    data: Path | None = setting(
        None, "--data", help="Problems, .jsonl or .json; without it, from the hub.", metavar="FILE"
    )
    targets: Path | None = setting(
        None, "--targets", help="SciCode's test_data.h5, for problems without gold code.", metavar="FILE"
    )
    limit: int | None = setting(None, "--limit", 1, help="Only the first N problems.")
    samples: int = setting(
        1, "-n --samples --n --num-return-sequences", 1, 1024, "Answers to each: mean@N and pass@k."
    )
    system: str | None = setting(
        None, "--system --system-prompt", help="System message, instead of the task's.", metavar="TEXT"
    )
    output: Path | None = setting(
        None, "-o --output --output-dir", help="Folder. (default: eval-TASK-MODEL)", metavar="DIR"
    )
    allow_code: bool = setting(False, "--allow-code", help="Run code that the model writes, contained.")
    code_seconds: float | None = setting(
        None,
        "--code-seconds",
        0,
        3600,
        "For such a program. (default: 10; scicode 300)",
        low_is_open=True,
        unit="seconds",
    )
    resume: bool = setting(
        True, "--resume/--restart", help="Go on with answers that are there, or begin anew."
    )
    parallel: int | None = setting(
        None, "--parallel --max-num-seqs", 1, 256, "Sequences at once. (default: 16, or as memory allows)"
    )
    quiet: bool = setting(False, "-q --quiet", help="Only the table.")


@with_options
def eval(
    task: Annotated[
        str,
        typer.Option(
            "--task",
            help="gsm8k, math500, amc, aime, minerva, olympiadbench, humaneval, leetcode, scicode;"
            " questions: any file.",
        ),
    ],
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            help="Such as greedy,sample:1,em-inf,em-inf:paper,self-consistency:4. The others are held against"
            " the first.",
            metavar="LIST",
        ),
    ] = "greedy,sample,em-inf",
    how: EvalOptions = EvalOptions(),
    given: Annotated[Given, SAMPLING, ENGINE] = NOTHING,
) -> None:
    """Compare ways of answering on problems with known answers: accuracy, cost, and how sure that is.

    All methods have the same engine, prompts and draws. What is there is not answered again: a killed run
    goes on, and methods can be added. The folder gets results.json, results.md and report.html.
    """
    from emlocal.cli.engine import MOST_PARALLEL, open_for_batch
    from emlocal.evaluation.contenders import read_contenders
    from emlocal.evaluation.run import others_in
    from emlocal.evaluation.tasks.open import open_task
    from emlocal.generation.scheduler import SPARE_SEQUENCES
    from emlocal.settings.files import read_config

    config = {name: value for name, value in read_config().items() if name not in EM.settings}
    layers = ("flag", given), ("config", config)  # EM is for methods to say
    resolved = resolve_settings(*layers)
    contenders = read_contenders(methods)
    for contender in contenders:  # what contradicts itself fails before a model is loaded
        contender.plan(resolved.plan, resolved.chosen)
    asked = open_task(task, how.data, how.limit, how.code_seconds, how.targets)
    _check(asked, contenders, how)
    _check_folder(how.output)
    with ExitStack() as opened:
        options = options_of(EngineOptions, *layers)
        model = opened.enter_context(open_for_batch(options, how.parallel, quiet=how.quiet))
        parallel = how.parallel or min(MOST_PARALLEL, model.backend.max_sequences - SPARE_SEQUENCES)
        base = resolved.with_model(model.backend.info.sampling).plan, resolved.chosen
        entries = _entries(asked, contenders, base, model, parallel, how)
        name = f"eval-{asked.name}-{model.backend.info.name}"
        folder = how.output or Path(re.sub(r'[/\\:*?"<>|]', "-", name))  # as Windows has them, too
        folder.mkdir(parents=True, exist_ok=True)
        document = _evaluate(asked, entries, model, folder, parallel, how)
    _show(document)
    if others := others_in(folder, entries):
        console.note(f"not reported, since --methods does not name them: {', '.join(others)}")
    if not how.quiet:
        console.note(f"{folder}: results.json, results.md, report.html, and all answers")


def _check(task: "Task", contenders: "Sequence[Contender]", how: EvalOptions) -> None:
    """Raise UsageError for what cannot be meant, EmlocalError for what would fail at the end."""
    for module, package in _PACKAGES.items():
        if find_spec(module) is None:
            raise EmlocalError(f"emlocal eval needs the package {package}", "pip install 'emlocal[eval]'")
    if task.runs_code:
        if not how.allow_code:
            raise UsageError(
                f"--task {task.name} runs code that the model writes",
                "add --allow-code; docs/evaluation.md says how it is contained",
            )
        from emlocal.evaluation.sandbox.run import check_containment

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


def _entries(
    task: "Task",
    contenders: "Sequence[Contender]",
    base: "tuple[Plan, frozenset[str]]",
    model: "Opened",
    parallel: int,
    how: EvalOptions,
) -> "list[Entry]":
    """The contenders as they will run. How many run at once is part of what an answer comes from."""
    from emlocal.batch.lines import canonical
    from emlocal.batch.run import BatchSettings
    from emlocal.evaluation.contenders import describe
    from emlocal.evaluation.run import Entry

    entries = []
    for contender in contenders:
        plan = contender.plan(*base)
        settings = BatchSettings(plan, contender.collecting, base[1], entropies=True)
        identity = identity_of(settings, model) | {
            "task": task.name,
            "data": task.identity,
            "prompt": _digest(task.ask(task.problems[0], {})),
            "system": _system(task, how),
            "parallel": parallel,
        }
        repetitions = 1 if plan.params.temperature == 0 else how.samples
        settings = replace(settings, fingerprint=canonical(identity))
        described = describe(contender, plan, base[0])
        entries.append(Entry(contender.name, described, settings, identity, repetitions))
    return entries


def _digest(text: str) -> str:
    """Of the first question as it is asked: a sign of the words that this version asks with."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _system(task: "Task", how: EvalOptions) -> str | None:
    return task.system if how.system is None else how.system or None


def _evaluate(
    task: "Task", entries: "Sequence[Entry]", model: "Opened", folder: Path, parallel: int, how: EvalOptions
) -> "Document":
    """Answer, judge, and write the folder's files."""
    from emlocal.evaluation import run
    from emlocal.evaluation.provenance import provenance
    from emlocal.evaluation.report.document import write_json
    from emlocal.evaluation.report.page import write_page
    from emlocal.evaluation.report.texts import write_markdown
    from emlocal.generation import interruptible

    made_with = provenance(model.backend.name)
    try:
        with interruptible() as cancelled, _Progress(how.quiet) as progress:
            answers_of = run.answer(
                model.backend,
                task,
                entries,
                folder,
                system=_system(task, how),
                parallel=parallel,
                made_with=made_with,
                restart=not how.resume,
                cancelled=cancelled,
                progress=progress,
            )
            judged = run.judge(
                task, answers_of, folder, restart=not how.resume, cancelled=cancelled, progress=progress
            )
    except CancelledError:
        if not how.quiet:
            console.note("stopped; the same command goes on where it stopped")
        raise
    if others := _answered(folder, entries, made_with):
        made_with["answered with"] = others
    document = _document(task, entries, model, judged, parallel, how, made_with)
    write_json(document, folder / "results.json")
    write_markdown(document, folder / "results.md")
    write_page(document, folder / "report.html")
    return document


def _document(
    task: "Task",
    entries: "Sequence[Entry]",
    model: "Opened",
    judged: "dict[str, list[Judged]]",
    parallel: int,
    how: EvalOptions,
    made_with: Mapping[str, object],
) -> "Document":
    from emlocal.evaluation.provenance import sha256
    from emlocal.evaluation.report.document import Document
    from emlocal.evaluation.results import compare, summarize

    header, plan = model.model.header, entries[0].settings.plan
    multiplied = header.multiplied_parameters
    results = [
        summarize(task, entry.name, entry.described, judged[entry.name], multiplied, plan.seed)
        for entry in entries
    ]
    return Document(
        task,
        {
            "name": model.backend.info.name,
            "file": model.model.files[0].name,
            "sha256": sha256(model.model.files),
            "parameters": header.parameters,
            "multiplied_parameters": multiplied,
            "quantization": header.quantization,
            "adapters": [f"{path} × {scale:g}" for path, scale in model.adapters],
        },
        {
            "engine": model.backend.name,
            "runs": model.backend.describe(),
            "parallel": parallel,
            "seed": plan.seed,
            "samples": how.samples,
            "max_tokens": plan.max_tokens,
            "stop": list(plan.stop),
            "system": _system(task, how),
        },
        made_with,
        results,
        compare(task, results, plan.seed),
        judged,
    )


def _answered(folder: Path, entries: "Sequence[Entry]", now: Mapping[str, object]) -> dict[str, list[str]]:
    """By method, what its answers were made with where that is not what this run has: versions, commit."""
    from emlocal.evaluation.provenance import answered_with

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


class _Progress:
    """A bar for each thing that is done, or a line now and then. A context, which ends the last one."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._what = ""
        self._shown = ExitStack()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self._shown.close()
            self._what, self._show = what, self._shown.enter_context(console.counting(total, self._quiet))
        self._show(done, what)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *why: object) -> None:
        self._shown.close()


def _show(document: "Document") -> None:
    """The table, on stdout."""
    from rich.table import Table

    from emlocal.evaluation.report import texts

    table = Table(box=None, pad_edge=False)
    for i, head in enumerate(texts.columns(document)):
        table.add_column(head, justify="left" if i == 0 else "right", overflow="fold")
    for row in texts.rows(document):
        table.add_row(*row)
    console.out().print(table, markup=False)
    for method in document.methods:
        if method.errors:
            console.warn(
                f"{method.name}: {counted(method.errors, 'question')} could not be asked; a larger --context"
                " needs --restart, or another -o"
            )
