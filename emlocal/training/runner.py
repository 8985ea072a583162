"""Training, from prompts to an adapter in a folder: `emlocal.finetune` and `emlocal.rl`, and the verbs.

    train(objective, setup, view)   prompts → engines → the loop (emlocal.training.loop) → OUT

An `Objective` says what is trained and by which method (`em_ft`, `em_rl`), a `Setup` with what and where,
a `View` is told how it goes.

`--dry-run`: what would happen, tried out on a small part of it.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
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
from emlocal.training.engines import Engines, L, Objective, choose_trainer, open_engines, trainer_of
from emlocal.training.folder import OthersFolder, Reporter, RunFolder, View, check_package
from emlocal.training.folder import check as check_folder
from emlocal.training.loop import Method, Outcome, Plan, Run, prompts_of_step
from emlocal.training.prompts import Prompt, Source, Validation, check_answers, read_prompts
from emlocal.training.rl import em_ft, em_rl
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
    """How a run ended. The adapter is in its folder."""

    outcome: Outcome
    adapter: Path
    """The folder: give it to `emlocal.load(model, adapters=[(result.adapter, 1.0)])`."""
    model: str
    """As it was named."""
    accuracy: tuple[float, float] | None
    """On the prompts of `validate`, before and after; None where there are none."""

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A row a step, as in metrics.jsonl."""
        lines = (self.adapter / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def finetune(
    data: Source, output: str | Path, *, recipe: str = "default", view: View | None = None, **given: Any
) -> TrainingResult:
    """Fine-tune a LoRA adapter on the entropy of the model's own answers (EM-FT), as `emlocal finetune`.

    Args:
        data: a file of prompts (.jsonl, or text with one a line), a dataset of the hub, or the prompts
            themselves: texts, or mappings as in a line of a .jsonl file.
        output: the folder for the adapter, the metrics and the checkpoints.
        recipe: settings that others are changes to: default, paper, one-shot.
        view: is told how it goes; None: warnings are Python's, and nothing else is said.
        given: settings by the names of their flags, with underscores; `model`; `validate`, like `data`.
    Raises:
        UsageError: unknown or bad settings, bad prompts, a folder that holds something else.
        ModelError: a model that cannot be trained.
        CancelledError: Ctrl-C; the run can be resumed.
    """
    if recipe not in RECIPES:
        raise UsageError(f"there is no recipe {recipe}", f"take one of these: {', '.join(RECIPES)}")
    values, setup = _split(FineTuneSettings, data, output, given)
    settings = settings_of_run(FineTuneSettings, values, recipe=RECIPES[recipe].values)
    return train(em_ft(settings, recipe), setup, view)


def rl(
    data: Source,
    output: str | Path,
    *,
    recipe: str | Path | None = None,
    view: View | None = None,
    **given: Any,
) -> TrainingResult:
    """Train a LoRA adapter with negative entropy as the only reward (EM-RL), as `emlocal rl`.

    `recipe` is a name or a TOML file; `reward` is a name, or {name: weight}. The other arguments are those of
    `finetune`. Raises as that does.
    """
    values, setup = _split(RLSettings, data, output, given)
    named = NOTHING if recipe is None else read_recipe(recipe)
    settings = settings_of_run(RLSettings, values, recipe=named)
    return train(em_rl(settings, None if recipe is None else str(recipe)), setup, view)


def _split(
    kind: type[TrainingSettings], data: Source, output: str | Path, given: Mapping[str, Any]
) -> tuple[Given, Setup]:
    """Keywords as settings and a setup. Raises UsageError for one that is neither, and for bad values."""
    given = dict(given)
    model, validation = given.pop("model", None), given.pop("validate", None)
    options = Table.of(RunOptions, AnswerOptions, MachineOptions).without(*_OF_THE_VERBS)
    values = (Table.of(kind) | options).read(given, NAMES)
    keywords = ("keyword", values)
    setup = Setup(
        data,
        Path(output),
        None if model is None else str(model),
        options_of(RunOptions, keywords),
        options_of(AnswerOptions, keywords),
        options_of(MachineOptions, keywords),
        validation,
    )
    return {name: value for name, value in values.items() if name in Table.of(kind).settings}, setup


def train(objective: Objective[L], setup: Setup, view: View | None = None) -> TrainingResult:
    """Carry a run to its end, or on to its end, and leave the adapter in its folder.

    Raises what any part of it raises; CancelledError once a checkpoint of what was reached is written.
    """
    with prepared(objective, setup, view or View()) as run:
        outcome, accuracy = run.carry_out()
        result = TrainingResult(outcome, setup.output, run.engines.model_name, accuracy)
    run.view.ended(result)
    return result


@dataclass(frozen=True)
class Prepared(Generic[L]):
    """A run whose model is loaded and whose prompts are tokens."""

    objective: Objective[L]
    setup: Setup
    view: View
    engines: Engines[L]
    method: Method
    tokens: Sequence[Sequence[int]]
    """Of the prompts that fit …"""
    prompts: int
    """… out of so many."""
    validation: Sequence[Prompt]

    def carry_out(self) -> tuple[Outcome, tuple[float, float] | None]:
        """Open the run's folder, train, leave the adapter there. The outcome, and accuracies before and
        after where they are asked for."""
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
            told = self.objective.told(len(self.tokens))
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
                outcome = loop.run(start)
                if before is not None:
                    engines.use(loop.kept)
                    after = exam.after(before, cancelled, view.validating)
                    view.validated(before, after)
            except CancelledError:
                view.stopped(setup.output)
                raise
        return outcome, None if before is None else (before, after)


@contextmanager
def prepared(
    objective: Objective[L], setup: Setup, view: View, *, dry: bool = False
) -> Iterator[Prepared[L]]:
    """Check all that can be checked, then load. `dry`: nothing will be written."""
    trainer = choose_trainer(setup.machine.backend, objective.training)
    processes = _processes(setup.machine.device, trainer)
    if processes.rank > 0:  # one of them speaks for all
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
    """Those that `accelerate launch` started, or this one alone."""
    count = os.environ.get("WORLD_SIZE", "1")  # as all launchers set it
    if not count.isdecimal():
        raise UsageError(f"WORLD_SIZE is {count!r}, and no number of processes", "unset WORLD_SIZE")
    if int(count) < 2:
        return Processes()
    processes = trainer_of(trainer).processes
    if processes is None:
        raise UsageError(f"several processes cannot train on {trainer}", "use --backend torch")
    return processes(device == "cpu")


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


_TOKENS = 48
"""Of the answers that are tried out."""


@dataclass(frozen=True)
class Trial:
    """What a run would be, and what it would take if every answer were as long as it may get."""

    settings: TrainingSettings
    context: int
    token_budget: int
    fitting: int
    """Prompts that leave room for an answer …"""
    prompts: int
    """… out of so many."""
    described: tuple[str, str, str]
    """Model, adapter and engine, in words."""
    example: tuple[tuple[str, int], tuple[str, int]]
    """Prompt and answer: text, and tokens."""
    answering_speed: float
    """Tokens a second."""
    training_speed: float
    """Tokens a second, prompts included."""
    step_seconds: float
    run_seconds: float
    peak_memory: int
    """Bytes, with one whole micro-batch."""


def try_out(objective: Objective[L], setup: Setup, view: View | None = None) -> Trial | None:
    """Try a run; None in a process that leaves that to another one.

    Raises what loading raises, and UsageError for settings, prompts or a model that cannot be used.
    """
    with prepared(objective, setup, view or View(), dry=True) as run:
        return _try(run) if run.engines.learner.processes.rank == 0 else None


def _try(run: Prepared[Any]) -> Trial:
    engines, method, settings = run.engines, run.method, run.objective.settings
    chosen = prompts_of_step(len(run.tokens), 0, settings)
    chosen = chosen[: max(1, engines.answerer.parallel // method.samples)]
    short = replace(settings, max_tokens=min(_TOKENS, settings.max_tokens))
    run.view.loading("trying out a step", 0, None)
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
    answers, gradient = n * settings.max_tokens * answering / answered, n * longest * training / trained
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
        answers + gradient,
        settings.steps * (answers + gradient) + answers,  # the last adapter's answers are looked at too
        engines.learner.peak_memory(),
    )


def _seconds_of_training(run: Prepared[Any], prompts: Sequence[int], batch: Sequence[Rollout]) -> float:
    """Of the gradients of one micro-batch."""
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
    """As many answers as a micro-batch takes, each stretched to the longest by saying it again: whole
    groups, and so one at least."""
    length = settings.max_tokens
    long = [replace(r, answer=(r.answer * length)[:length]) for r in rollouts]
    groups = min(len(chosen), max(1, budget // max(map(len, long)) // samples))
    return list(chosen[:groups]), long[: groups * samples]


def _text(backend: Backend, tokens: Sequence[int]) -> str:
    return b"".join(backend.token_bytes(t) or f"<{t}>".encode() for t in tokens).decode(errors="replace")
