"""What `emlocal finetune` and `emlocal rl` do alike: open the engines, train, leave the adapter."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic

import typer

from emlocal import __version__, console
from emlocal.backends.learner import Processes
from emlocal.cli.training_engines import Engines, L, MakeLearner, choose_trainer, open_engines
from emlocal.cli.training_options import AnswerOptions, MachineOptions, RunOptions
from emlocal.cli.training_validation import Validation, check_answers
from emlocal.cli.training_view import Column, View
from emlocal.errors import BackendError, CancelledError, UsageError
from emlocal.generation import interruptible
from emlocal.training.folder import OthersFolder, RunFolder, Verb
from emlocal.training.folder import check as check_folder
from emlocal.training.loop import Method, Outcome, Plan, Run
from emlocal.training.prompts import Prompt, read_prompts
from emlocal.training.reporting import Reporter, check_package
from emlocal.training.settings import TrainingSettings
from emlocal.words import counted


@dataclass(frozen=True)
class Asked:
    """What was typed, but for the settings."""

    data: str
    output: Path
    model: str | None
    run: RunOptions
    answers: AnswerOptions
    machine: MachineOptions


@dataclass(frozen=True)
class Work(Generic[L]):
    """What is to be done, and how it is told."""

    verb: Verb
    settings: TrainingSettings
    check: Callable[[Sequence[Prompt]], None]
    """Raises UsageError for prompts that the method cannot be used with."""
    make_learner: MakeLearner[L]
    make_method: Callable[[L, Sequence[Prompt]], Method]
    """Takes the prompts that fit."""
    told: Callable[[int], Sequence[str]]
    """Of the settings, before it begins; takes how many prompts there are."""
    columns: tuple[Column, ...]
    engines: tuple[str, ...] = ("torch",)
    """That can be trained."""


def carry_out(work: Work[L], asked: Asked) -> None:
    """Train, or with `--dry-run` tell what would be done.

    Raises what any part of it raises, and Exit(1) for a run that stopped by itself.
    """
    trainer = choose_trainer(asked.machine.backend, work.engines)
    processes = _processes(asked.machine.device, trainer)
    if processes.rank > 0:
        console.hush()
    run, answers, machine = asked.run, asked.answers, asked.machine
    if processes.count > 1 and machine.device == "auto":
        machine = replace(machine, device=processes.device)
    if not run.dry_run:
        check_folder(asked.output, work.verb, resume=run.resume)
    if run.report_to:
        check_package(run.report_to)
    prompts = read_prompts(asked.data, limit=answers.limit)
    work.check(prompts)
    validation = read_prompts(run.validate) if run.validate else []
    check_answers(validation, "--validate")
    opening = open_engines(
        asked.model, work.settings, answers, machine, work.make_learner, trainer, quiet=run.quiet
    )
    with opening as engines:
        engines.learner.processes = processes
        examples = engines.encoded(prompts, answers.system)
        method = work.make_method(engines.learner, [prompt for prompt, _ in examples])
        tokens = [tokens for _, tokens in examples]
        if run.dry_run and processes.rank == 0:
            from emlocal.cli.training_dry_run import show

            show(engines, method, tokens, len(prompts), machine)
        if run.dry_run:
            return
        outcome = _train(work, asked, engines, method, tokens, validation)
    if not run.quiet:
        _say(outcome, engines.model_name, asked.output)
    elif outcome.reason != "finished":
        console.warn(f"stopped: {outcome.message}")
    if outcome.reason != "finished":
        raise typer.Exit(1)


def _processes(device: str, trainer: str) -> Processes:
    """Those that `accelerate launch` started, or this one alone."""
    count = os.environ.get("WORLD_SIZE", "1")  # as all launchers set it
    if not count.isdecimal():
        raise UsageError(f"WORLD_SIZE is {count!r}, and no number of processes", "unset WORLD_SIZE")
    if int(count) < 2:
        return Processes()
    if trainer != "torch":
        raise UsageError(f"several processes cannot train on {trainer}", "use --backend torch")
    try:
        from emlocal.backends.torch.processes import AcceleratedProcesses
    except ImportError as why:
        raise BackendError(
            "training with several processes needs the package accelerate", "pip install accelerate"
        ) from why
    return AcceleratedProcesses(cpu=device == "cpu")


def _train(
    work: Work[L],
    asked: Asked,
    engines: Engines[L],
    method: Method,
    tokens: Sequence[Sequence[int]],
    validation: Sequence[Prompt],
) -> Outcome:
    """Open the run's folder, train, and leave the adapter there."""
    run, output = asked.run, asked.output
    exam = Validation(engines, validation, asked.answers.system, output)
    identity = _identity(engines, method, tokens)
    processes = engines.learner.processes
    with ExitStack() as opened:
        folder: RunFolder | OthersFolder = OthersFolder()
        start = None
        if processes.rank == 0:
            folder, start = RunFolder.open(output, work.verb, identity, resume=run.resume)
            opened.callback(folder.close)
            for text in folder.warnings:
                console.warn(text)
        start = processes.gather(start)[0]
        cancelled = opened.enter_context(interruptible())
        view = opened.enter_context(View(work.settings.steps, work.columns, run.quiet))
        if run.report_to and processes.rank == 0:
            view.reporter = opened.enter_context(Reporter(run.report_to, output, identity["settings"]))
        view.begin([*engines.describe(), *work.told(len(tokens))], start.step if start else None)
        plan = Plan(asked.machine.token_budget, run.save_every)
        loop = Run(
            work.settings,
            plan,
            tokens,
            method,
            engines.learner,
            engines.answerer,
            folder,
            view,
            cancelled,
            processes,
        )
        try:
            before = exam.before(cancelled, view.validating)
            outcome = loop.run(start)
            if before is not None:
                engines.use(loop.kept)
                view.validated(before, exam.after(before, cancelled, view.validating))
        except CancelledError:
            view.stopped(output)
            raise
    return outcome


def _identity(engines: Engines[L], method: Method, tokens: Sequence[Sequence[int]]) -> dict[str, Any]:
    """All that decides the outcome, bit for bit."""
    digest = hashlib.sha256()
    for prompt in tokens:
        digest.update(len(prompt).to_bytes(8, "little") + b"".join(t.to_bytes(4, "little") for t in prompt))
    return {
        "settings": json.loads(json.dumps(asdict(engines.settings))),
        "prompts": {"count": len(tokens), "sha256": digest.hexdigest(), **method.identity()},
        **engines.identity(),
        **({"processes": count} if (count := engines.learner.processes.count) > 1 else {}),
        "versions": {"emlocal": __version__, **engines.versions()},
    }


def _say(outcome: Outcome, model: str, output: Path) -> None:
    """How it ended, and what to do next."""
    console.note(f"{'finished' if outcome.reason == 'finished' else 'stopped'}: {outcome.message}")
    first, last = outcome.first, outcome.last
    if first and last:
        console.note(
            f"entropy {first.entropy:.3f} → {last.entropy:.3f} nats a token,"
            f" length {first.length:.0f} → {last.length:.0f},"
            f" repetition {first.repetition:.1%} → {last.repetition:.1%}"
        )
    if outcome.steps == 0:
        console.note(f"no step was taken that could be kept: the adapter in {output} changes nothing")
        return
    console.note(f"the adapter of {counted(outcome.steps, 'step')} is in {output}; try it:")
    console.command(["emlocal", "chat", "-m", model, "--adapter", str(output)])
