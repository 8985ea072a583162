"""Training from prompts to an adapter in a folder, for `emlocal.finetune`, `emlocal.rl` and the commands.

    train(objective, setup, view)   prompts → engines → the loop (emlocal.training.loop) → OUT

An `Objective` holds the settings and the method (`em_ft`, `em_rl`, `distillation`). A `Setup` names the
model, the data and the machine. A `View` receives reports.

`try_out` implements `--dry-run`: it runs a small part and estimates the rest.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic

from emlocal import __version__
from emlocal.backends.base import Backend
from emlocal.backends.learner import Processes
from emlocal.errors import CancelledError, UsageError
from emlocal.generation import interruptible
from emlocal.settings.table import NAMES, NOTHING, Given, Table, options_of
from emlocal.training.checkpoint import Checkpoint
from emlocal.training.engines import Engines, L, Objective, choose_trainer, open_engines, trainer_of
from emlocal.training.folder import OthersFolder, Reporter, RunFolder, View, check_package
from emlocal.training.folder import check as check_folder
from emlocal.training.forecast import forecast
from emlocal.training.loop import Method, Outcome, Plan, Run, prompts_of_step
from emlocal.training.prompts import Prompt, Source, Validation, check_answers, read_prompts
from emlocal.training.rl import em_rl, fine_tuning
from emlocal.training.rl_settings import RLSettings, read_recipe
from emlocal.training.rollouts import MicroBatches, Rollout, draw_rollouts
from emlocal.training.settings import (
    RECIPES,
    AnswerOptions,
    FineTuneSettings,
    MachineOptions,
    RunOptions,
    Setup,
    TrainingSettings,
    settings_of_run,
)

_OF_THE_VERBS = ("validate", "dry_run", "config", "quiet")


@dataclass(frozen=True)
class TrainingResult:
    """The result of a run. The adapter is in its folder."""

    outcome: Outcome
    adapter: Path
    """The folder: pass it to `emlocal.load(model, adapters=[(result.adapter, 1.0)])`."""
    model: str
    """The model's name as it was given."""
    accuracy: tuple[float, float] | None
    """Accuracies before and after, on the prompts of `validate`; None without such prompts."""

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One row for each step, as in metrics.jsonl."""
        lines = (self.adapter / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def finetune(
    data: Source, output: str | Path, *, recipe: str = "default", view: View | None = None, **given: Any
) -> TrainingResult:
    """Fine-tunes a LoRA adapter on the entropy of the model's own answers (EM-FT), like `emlocal finetune`.

    Args:
        data: a file of prompts (.jsonl, or text with one a line), a dataset of the hub, or the prompts
            themselves: texts, or mappings as in a line of a .jsonl file.
        output: the folder for the adapter, the metrics and the checkpoints.
        recipe: the settings to start from: default, paper, one-shot, vote.
        view: receives reports; None: only warnings, as Python warnings.
        given: settings by the names of their flags, with underscores; `model`; `validate`, like `data`.
    Raises:
        UsageError: unknown or bad settings, bad prompts, a folder that holds something else.
        ModelError: a model that cannot be trained.
        CancelledError: Ctrl-C; the run can be resumed.
    """
    if recipe not in RECIPES:
        raise UsageError(f"there is no recipe {recipe}", f"use one of these: {', '.join(RECIPES)}")
    values, setup = _split(FineTuneSettings, data, output, given)
    settings = settings_of_run(FineTuneSettings, values, recipe=RECIPES[recipe].values)
    return train(fine_tuning(settings, recipe), setup, view)


def rl(
    data: Source,
    output: str | Path,
    *,
    recipe: str | Path | None = None,
    view: View | None = None,
    **given: Any,
) -> TrainingResult:
    """Trains a LoRA adapter with negative entropy as the only reward (EM-RL), like `emlocal rl`.

    `recipe` is a name or a TOML file; `reward` is a name, or {name: weight}. The other arguments and the
    errors are those of `finetune`.
    """
    values, setup = _split(RLSettings, data, output, given)
    named = NOTHING if recipe is None else read_recipe(recipe)
    settings = settings_of_run(RLSettings, values, recipe=named)
    return train(em_rl(settings, None if recipe is None else str(recipe)), setup, view)


def _split(
    kind: type[TrainingSettings], data: Source, output: str | Path, given: Mapping[str, Any]
) -> tuple[Given, Setup]:
    """Splits keywords into settings and a setup. Raises UsageError for unknown keywords and bad values."""
    given = dict(given)
    model, validation = given.pop("model", None), given.pop("validate", None)
    options = Table.of(RunOptions, AnswerOptions, MachineOptions).without(*_OF_THE_VERBS)
    values = (Table.of(kind) | options).read(given, NAMES)
    keywords = ("keyword", values)
    setup = Setup(
        data,
        Path(output).expanduser(),
        None if model is None else str(model),
        options_of(RunOptions, keywords),
        options_of(AnswerOptions, keywords),
        options_of(MachineOptions, keywords),
        validation,
    )
    return {name: value for name, value in values.items() if name in Table.of(kind).settings}, setup


def train(objective: Objective[L], setup: Setup, view: View | None = None) -> TrainingResult:
    """Runs or resumes a training to its end and leaves the adapter in its folder.

    Raises the errors of its parts. CancelledError comes after a checkpoint of the progress is written.
    """
    with prepared(objective, setup, view or View()) as run:
        outcome, accuracy = run.carry_out()
        result = TrainingResult(outcome, setup.output, run.engines.model_name, accuracy)
    run.view.ended(result)
    return result


@dataclass(frozen=True)
class Prepared(Generic[L]):
    """A run with its model loaded and its prompts encoded."""

    objective: Objective[L]
    setup: Setup
    view: View
    engines: Engines[L]
    method: Method
    tokens: Sequence[Sequence[int]]
    """Token ids of the prompts that fit."""
    prompts: int
    """Number of all prompts, including those that do not fit."""
    validation: Sequence[Prompt]

    def carry_out(self) -> tuple[Outcome, tuple[float, float] | None]:
        """Opens the run's folder, trains, and leaves the adapter there.

        Returns the outcome, and the accuracies before and after if they were requested.
        """
        setup, engines, view, settings = self.setup, self.engines, self.view, self.objective.settings
        exam = Validation(engines, self.validation, setup.answers.system, setup.output)
        identity = _identity(engines, self.method, self.tokens)
        processes = engines.learner.processes
        with ExitStack() as opened:
            folder: RunFolder | OthersFolder = OthersFolder()
            start = None
            if processes.rank == 0:
                folder, start = RunFolder.open(
                    setup.output, self.objective.verb, identity, resume=setup.run.resume
                )
                opened.callback(folder.close)
                for text in folder.warnings:
                    view.warn(text)
            start = processes.gather(start)[0]
            cancelled = opened.enter_context(interruptible())
            if setup.run.report_to and processes.rank == 0:
                view.reporter = opened.enter_context(
                    Reporter(setup.run.report_to, setup.output, identity["settings"])
                )
            told = [*self.objective.told(len(self.tokens)), *self._forecast(start, cancelled)]
            view.begin([*engines.describe(), *told], start.step if start else None)
            loop = Run(
                settings,
                Plan(setup.machine.token_budget, setup.run.save_every),
                self.tokens,
                self.method,
                engines.learner,
                engines.answerer,
                folder,
                view,
                cancelled,
                processes,
            )
            try:
                before, after = exam.before(cancelled, view.validating), 0.0
                came = self.method.prepare(
                    engines.answerer,
                    self.tokens,
                    setup.output,
                    cancelled,
                    lambda done, total: view.answering(0, done, total),
                )
                if came is not None:
                    view.said(came)
                outcome = loop.run(start)
                if before is not None:
                    engines.use(loop.kept)
                    after = exam.after(before, cancelled, view.validating)
                    view.validated(before, after)
            except CancelledError:
                view.stopped(setup.output)
                raise
        return outcome, None if before is None else (before, after)

    def _forecast(self, start: Checkpoint | None, cancelled: Callable[[], bool]) -> list[str]:
        """Lines on a run that will take long, from a trial of a few seconds."""
        engines = self.engines
        steps = engines.settings.steps - (start.step if start else 0)
        if engines.learner.processes.rank > 0 or steps <= 0:
            return []
        self.view.loading("estimating the time", 0, None)
        budget = self.setup.machine.token_budget
        return forecast(engines, self.method, self.tokens, steps, budget=budget, cancelled=cancelled)


@contextmanager
def prepared(
    objective: Objective[L], setup: Setup, view: View, *, dry: bool = False
) -> Iterator[Prepared[L]]:
    """Checks all that can be checked, then loads. `dry`: nothing will be written."""
    trainer = choose_trainer(setup.machine.backend, objective.training)
    processes = _processes(setup.machine.device, trainer)
    if processes.rank > 0:  # only one process reports
        view = View(warn=lambda text: None)
    if processes.count > 1 and setup.machine.device == "auto":
        setup = replace(setup, machine=replace(setup.machine, device=processes.device))
    if not dry:
        check_folder(setup.output, objective.verb, resume=setup.run.resume)
    if setup.run.report_to:
        check_package(setup.run.report_to)
    prompts = read_prompts(setup.data, limit=setup.answers.limit)
    objective.check(prompts)
    validation = read_prompts(setup.validation) if setup.validation else []
    check_answers(validation, "--validate")
    with open_engines(objective, setup, trainer, view) as engines:
        engines.learner.processes = processes
        examples = engines.encoded(prompts, setup.answers.system)
        method = objective.make_method(engines.learner, [prompt for prompt, _ in examples])
        tokens = [tokens for _, tokens in examples]
        yield Prepared(objective, setup, view, engines, method, tokens, len(prompts), validation)


def _processes(device: str, trainer: str) -> Processes:
    """Returns the processes that `accelerate launch` started, or this one alone."""
    count = os.environ.get("WORLD_SIZE", "1")  # all launchers set it
    if not count.isdecimal():
        raise UsageError(f"WORLD_SIZE is {count!r}, which is not a number of processes", "unset WORLD_SIZE")
    if int(count) < 2:
        return Processes()
    processes = trainer_of(trainer).processes
    if processes is None:
        raise UsageError(f"the {trainer} engine cannot train with several processes", "use --backend torch")
    return processes(device == "cpu")


LATER: Mapping[str, Any] = {"learn": "entropy", "samples": 8, "margin": 0.5}
"""Settings of EM-FT that earlier versions did not have, with the values that they had in effect."""


def _identity(engines: Engines[L], method: Method, tokens: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Returns all properties that determine the outcome, bit for bit."""
    given = json.loads(json.dumps(asdict(engines.settings)))
    later = LATER if isinstance(engines.settings, FineTuneSettings) else {}
    digest = hashlib.sha256()
    for prompt in tokens:
        digest.update(len(prompt).to_bytes(8, "little") + b"".join(t.to_bytes(4, "little") for t in prompt))
    return {
        "settings": {name: value for name, value in given.items() if later.get(name) != value},
        "prompts": {"count": len(tokens), "sha256": digest.hexdigest(), **method.identity()},
        **engines.identity(),
        **({"processes": count} if (count := engines.learner.processes.count) > 1 else {}),
        "versions": {"emlocal": __version__, **engines.versions()},
    }


_TOKENS = 48
"""Tokens of each answer in a trial."""


@dataclass(frozen=True)
class Trial:
    """What a run would do, and its time and memory if every answer reached its limit."""

    settings: TrainingSettings
    context: int
    token_budget: int
    fitting: int
    """Number of prompts that leave room for an answer."""
    prompts: int
    """Number of all prompts."""
    described: tuple[str, str, str]
    """Model, adapter and engine, in words."""
    example: tuple[tuple[str, int], tuple[str, int]]
    """Prompt and answer, each as text and number of tokens."""
    answering_speed: float
    """Tokens a second."""
    training_speed: float
    """Tokens a second, prompts included."""
    votes: int
    """Answers that are drawn once, before the first step; 0 if each step draws its own."""
    voting_seconds: float
    step_seconds: float
    run_seconds: float
    peak_memory: int
    """Bytes, with one whole micro-batch."""


def try_out(objective: Objective[L], setup: Setup, view: View | None = None) -> Trial | None:
    """Runs a small trial of a run; returns None in a process that leaves the trial to another one.

    Raises the errors of loading, and UsageError for settings, prompts or a model that cannot be used.
    """
    with prepared(objective, setup, view or View(), dry=True) as run:
        return _try(run) if run.engines.learner.processes.rank == 0 else None


def _try(run: Prepared[Any]) -> Trial:
    engines, method, settings = run.engines, run.method, run.objective.settings
    chosen = prompts_of_step(len(run.tokens), 0, settings)
    chosen = chosen[: max(1, engines.answerer.parallel // method.samples)]
    short = replace(settings, max_tokens=min(_TOKENS, settings.max_tokens))
    run.view.loading("trying a step", 0, None)
    started = time.perf_counter()
    rollouts = draw_rollouts(
        engines.answerer.backend,
        [run.tokens[i] for i in chosen],
        short,
        0,
        engines.answerer.parallel,
        samples=method.samples,
    )
    answering = time.perf_counter() - started
    answered = sum(len(r.answer) for r in rollouts)
    prompts, batch = _whole_batch(chosen, rollouts, method.samples, settings, run.setup.machine.token_budget)
    trained, training = sum(len(r) for r in batch), _seconds_of_training(run, prompts, batch)
    n = settings.answers_per_step
    longest = settings.max_tokens + sum(len(r.prompt) for r in rollouts) / len(rollouts)
    an_answer, gradient = settings.max_tokens * answering / answered, n * longest * training / trained
    votes = len(run.tokens) * method.samples if method.draws_once else 0
    if votes:
        step_seconds = gradient
        run_seconds = votes * an_answer + settings.steps * gradient
    else:
        step_seconds = n * an_answer + gradient
        run_seconds = (
            settings.steps * step_seconds + n * an_answer
        )  # the last adapter's answers are drawn and checked too
    first, backend = rollouts[0], engines.answerer.backend
    return Trial(
        settings,
        backend.context,
        run.setup.machine.token_budget,
        len(run.tokens),
        run.prompts,
        engines.describe(),
        (
            (_text(backend, first.prompt), len(first.prompt)),
            (_text(backend, first.answer), len(first.answer)),
        ),
        answered / answering,
        trained / training,
        votes,
        votes * an_answer,
        step_seconds,
        run_seconds,
        engines.learner.peak_memory(),
    )


def _seconds_of_training(run: Prepared[Any], prompts: Sequence[int], batch: Sequence[Rollout]) -> float:
    """Measures the time for the gradients of one micro-batch."""
    learner = run.engines.learner
    batches = MicroBatches(
        run.setup.machine.token_budget, learner.forget, lambda: False, lambda *_: None, run.view.warn
    )
    started = time.perf_counter()
    for _ in run.method.gradients(0, prompts, batch, batches):
        learner.forget()
    return time.perf_counter() - started


def _whole_batch(
    chosen: Sequence[int],
    rollouts: Sequence[Rollout],
    samples: int,
    settings: TrainingSettings,
    budget: int,
) -> tuple[list[int], list[Rollout]]:
    """Returns a micro-batch of answers, each repeated until it has the maximum length.

    It holds whole groups of answers to a prompt, and at least one group.
    """
    length = settings.max_tokens
    long = [replace(r, answer=(r.answer * length)[:length]) for r in rollouts]
    groups = min(len(chosen), max(1, budget // max(map(len, long)) // samples))
    return list(chosen[:groups]), long[: groups * samples]


def _text(backend: Backend, tokens: Sequence[int]) -> str:
    return b"".join(backend.token_bytes(t) or f"<{t}>".encode() for t in tokens).decode(errors="replace")
