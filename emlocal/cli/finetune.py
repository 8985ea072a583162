"""`emlocal finetune`: a LoRA adapter from the model's own, unlabelled answers (EM-FT)."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emlocal import __version__, console
from emlocal.cli.finetune_options import (
    AnswerOptions,
    MachineOptions,
    Recipe,
    RunOptions,
    TrainingOptions,
)
from emlocal.cli.options import with_options
from emlocal.errors import CancelledError, UsageError
from emlocal.words import counted

if TYPE_CHECKING:
    from emlocal.cli.finetune_engines import Engines
    from emlocal.training.finetune import Outcome
    from emlocal.training.prompts import Prompt
    from emlocal.training.settings import FineTuneSettings


@with_options
def finetune(
    data: Annotated[
        str,
        typer.Option(
            "--data", help="Prompts: .jsonl, text (one a line), or a dataset of the hub.", metavar="FILE"
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="Folder for the adapter, the metrics and the checkpoints.",
            metavar="FOLDER",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "-m", "--model", help="Short name, .gguf file, folder, or org/name of the hub.", metavar="MODEL"
        ),
    ] = None,
    recipe: Annotated[Recipe, typer.Option("--recipe", help="Settings that others are changes to.")] = (
        Recipe.default
    ),
    run: RunOptions = RunOptions(),
    training: TrainingOptions = TrainingOptions(),
    answers: AnswerOptions = AnswerOptions(),
    machine: MachineOptions = MachineOptions(),
) -> None:
    """Fine-tune a LoRA adapter on the entropy of the model's own answers (EM-FT).

    No labels are needed. Each step answers some prompts with the model as it is, and lowers the entropy
    of the distributions that its tokens were drawn from. Afterwards: emlocal chat -m MODEL --adapter FOLDER.
    """
    from emlocal.cli.finetune_engines import open_engines
    from emlocal.cli.finetune_settings import settings_of_run
    from emlocal.cli.finetune_validation import check_answers
    from emlocal.training.folder import check as check_folder
    from emlocal.training.prompts import read_prompts
    from emlocal.training.reporting import check_package

    if machine.offline:  # before anything that may ask the hub is imported
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    settings = settings_of_run(training, recipe, run.config)
    _check(run, answers, machine)
    if not run.dry_run:
        check_folder(output, resume=run.resume)
    if run.report_to:
        check_package(str(run.report_to))
    prompts = read_prompts(data, limit=answers.limit)
    validation = read_prompts(run.validate) if run.validate else []
    check_answers(validation)
    if recipe is Recipe.one_shot and len(prompts) > 1:
        raise UsageError(
            f"--recipe one-shot trains on one prompt; {data} holds {len(prompts):,}", "choose one: --limit 1"
        )
    with ExitStack() as opened:
        engines = opened.enter_context(open_engines(model, settings, answers, machine, quiet=run.quiet))
        if run.dry_run:
            from emlocal.cli.finetune_dry_run import show

            show(engines, prompts, settings, answers, machine)
            return
        outcome = _train(engines, prompts, validation, (output, recipe, run, answers, machine))
    if not run.quiet:
        _say(outcome, engines.model_name, output)
    if outcome.reason != "finished":
        raise typer.Exit(1)


def _check(run: RunOptions, answers: AnswerOptions, machine: MachineOptions) -> None:
    """Raise UsageError for numbers that cannot be meant."""
    cores = os.cpu_count() or 1
    for flag, value, low, high in (
        ("--save-every", run.save_every, 1, 10**9),
        ("--limit", answers.limit, 1, 10**12),
        ("--parallel", answers.parallel, 1, 256),
        ("--threads", machine.threads, 1, 4 * cores),
        ("--context", machine.context, 16, 10**9),
        ("--tokens-per-batch", machine.token_budget, 1, 10**9),
    ):
        if value is not None and not low <= value <= high:
            raise UsageError(f"{flag} is {value}; it must be between {low:,} and {high:,}")


def _train(
    engines: "Engines",
    prompts: Sequence["Prompt"],
    validation: Sequence["Prompt"],
    asked: tuple[Path, Recipe, RunOptions, AnswerOptions, MachineOptions],
) -> "Outcome":
    """Open the run's folder, train, and leave the adapter there."""
    from emlocal.cli.finetune_validation import Validation
    from emlocal.cli.finetune_view import View
    from emlocal.generation import interruptible
    from emlocal.training.finetune import FineTune, Plan
    from emlocal.training.folder import RunFolder

    output, recipe, run, answers, machine = asked
    settings = engines.settings
    tokens = [tokens for _, tokens in engines.encoded(prompts, answers.system)]
    exam = Validation(engines, validation, answers.system, output)
    identity = _identity(engines, settings, tokens, answers)
    folder, start = RunFolder.open(output, identity, resume=run.resume)
    with ExitStack() as opened:
        opened.callback(folder.close)
        for text in folder.warnings:
            console.warn(text)
        cancelled = opened.enter_context(interruptible())
        view = opened.enter_context(View(settings, run.quiet))
        if run.report_to:
            from emlocal.training.reporting import Reporter

            view.reporter = opened.enter_context(Reporter(str(run.report_to), output, identity["settings"]))
        view.begin(engines.describe(), len(tokens), str(recipe), start.step if start else None)
        work = FineTune(
            settings,
            Plan(machine.token_budget, run.save_every),
            tokens,
            engines.learner,
            engines.answerer,
            folder,
            view,
            cancelled,
        )
        try:
            before = exam.before(cancelled, view.validating)
            outcome = work.run(start)
            if before is not None:
                engines.use(work.kept)
                view.validated(before, exam.after(before, cancelled, view.validating))
        except CancelledError:
            view.stopped(output)
            raise
    return outcome


def _identity(
    engines: "Engines", settings: "FineTuneSettings", tokens: Sequence[Sequence[int]], answers: AnswerOptions
) -> dict[str, Any]:
    """All that decides the outcome, bit for bit."""
    import hashlib

    digest = hashlib.sha256()
    for prompt in tokens:
        digest.update(len(prompt).to_bytes(8, "little") + b"".join(t.to_bytes(4, "little") for t in prompt))
    return {
        "settings": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(settings).items()},
        "prompts": {"count": len(tokens), "sha256": digest.hexdigest()},
        **engines.identity(),
        "versions": {"emlocal": __version__, **engines.versions()},
    }


def _say(outcome: "Outcome", model: str, output: Path) -> None:
    """How it ended, and what to do next."""
    console.note(f"{'finished' if outcome.reason == 'finished' else 'stopped'}: {outcome.message}")
    first, last = outcome.first, outcome.last
    if first and last:
        console.note(
            f"entropy {first.entropy:.3f} → {last.entropy:.3f} nats a token,"
            f" length {first.length:.0f} → {last.length:.0f},"
            f" repetition {first.repetition:.1%} → {last.repetition:.1%}"
        )
    console.note(f"the adapter of {counted(outcome.steps, 'step')} is in {output}; try it:")
    console.command(["emlocal", "chat", "-m", model, "--adapter", str(output)])
