"""Training, from prompts to an adapter in a folder: `emlocal.finetune` and `emlocal.rl`, and the verbs.

    train(objective, setup, view)   prompts → engines → the loop (emlocal.training.loop) → OUT

An `Objective` says what is trained and by which method (`em_ft`, `em_rl`), a `Setup` with what and where,
a `View` is told how it goes.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Generic

from emlocal import __version__
from emlocal.backends.processes import Processes
from emlocal.errors import BackendError, CancelledError, UsageError
from emlocal.generation import interruptible
from emlocal.training.engines import Engines, L, Objective, choose_trainer, open_engines
from emlocal.training.finetune import em_ft
from emlocal.training.folder import OthersFolder, RunFolder
from emlocal.training.folder import check as check_folder
from emlocal.training.grading import Validation, check_answers
from emlocal.training.loop import Method, Outcome, Plan, Run
from emlocal.training.prompts import Prompt, Source, read_prompts
from emlocal.training.rl import em_rl
from emlocal.training.rl_settings import RLSettings, read_recipe
from emlocal.training.settings import RECIPES, FineTuneSettings
from emlocal.training.watching import Reporter, View, check_package


@dataclass(frozen=True)
class Setup:
    """What a run is besides its settings: with what, and where. Raises UsageError for bad numbers."""

    data: Source
    output: Path
    """Folder for the adapter, the metrics and the checkpoints."""
    model: str | None = None
    system: str | None = None
    """System message of prompts without one."""
    limit: int | None = None
    """Use the first prompts only."""
    rollouts: str = "auto"
    """The engine that answers: the one that is trained, or llama.cpp."""
    parallel: int | None = None
    """Answers at once; None: 16."""
    backend: str = "auto"
    """The engine that is trained: torch or mlx."""
    device: str = "auto"
    dtype: str = "auto"
    """Number format of the frozen weights."""
    threads: int | None = None
    context: int | None = None
    """Tokens of a prompt and its answer; None: max_tokens + 1,024."""
    tokens_per_batch: int = 2048
    """Most tokens trained on at a time: memory, not outcome."""
    gradient_checkpointing: bool = False
    offline: bool = False
    resume: bool = False
    """Go on with the run that the folder holds."""
    save_every: int = 5
    """Steps between checkpoints."""
    validate: Source | None = None
    """Prompts with answers: accuracy before and after."""
    report_to: str | None = None
    """trackio, wandb or tensorboard."""

    def __post_init__(self) -> None:
        cores = os.cpu_count() or 1
        for name, low, high in (
            ("save_every", 1, 10**9),
            ("limit", 1, 10**12),
            ("parallel", 1, 256),
            ("threads", 1, 4 * cores),
            ("context", 16, 10**9),
            ("tokens_per_batch", 1, 10**9),
        ):
            value = vars(self)[name]
            if value is not None and not low <= value <= high:
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} is {value}; it must be between {low:,} and {high:,}")


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
        given: fields of FineTuneSettings (steps, learning_rate, …) and of Setup (model, threads, …).
    Raises:
        UsageError: unknown or bad settings, bad prompts, a folder that holds something else.
        ModelError: a model that cannot be trained.
        CancelledError: Ctrl-C; the run can be resumed.
    """
    if recipe not in RECIPES:
        raise UsageError(f"there is no recipe {recipe}", f"take one of these: {', '.join(RECIPES)}")
    values, setup = _split(FineTuneSettings, data, output, given)
    settings = FineTuneSettings(**{**RECIPES[recipe].values, **values})
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
    `finetune`, with RLSettings' fields. Raises as that does.
    """
    values, setup = _split(RLSettings, data, output, given)
    reward = values.get("reward")
    if isinstance(reward, str | Mapping):
        weights = {reward: 1.0} if isinstance(reward, str) else reward
        values["reward"] = tuple((name, float(weight)) for name, weight in weights.items())
    settings = RLSettings(**{**(read_recipe(recipe) if recipe else {}), **values})
    return train(em_rl(settings, None if recipe is None else str(recipe)), setup, view)


def _split(
    kind: type[FineTuneSettings] | type[RLSettings],
    data: Source,
    output: str | Path,
    given: Mapping[str, Any],
) -> tuple[dict[str, Any], Setup]:
    """Keywords as settings and a setup. Raises UsageError for one that is neither."""
    settings, setup = ({f.name for f in fields(each)} for each in (kind, Setup))
    for name in given:
        if name not in settings | setup:
            near = get_close_matches(name, settings | setup, n=1)
            raise UsageError(f"there is no setting {name}", f"you may mean {near[0]}" if near else "")
    values = {name: value for name, value in given.items() if name in settings}
    if isinstance(values.get("target_modules"), Iterable):
        values["target_modules"] = tuple(values["target_modules"])
    rest = {name: value for name, value in given.items() if name in setup}
    return values, Setup(data, Path(output), **rest)


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
        exam = Validation(engines, self.validation, setup.system, setup.output)
        identity = _identity(engines, self.method, self.tokens)
        processes = engines.learner.processes
        with ExitStack() as opened:
            folder: RunFolder | OthersFolder = OthersFolder()
            start = None
            if processes.rank == 0:
                folder, start = RunFolder.open(
                    setup.output, self.objective.verb, identity, resume=setup.resume
                )
                opened.callback(folder.close)
                for text in folder.warnings:
                    view.warn(text)
            start = processes.gather(start)[0]
            cancelled = opened.enter_context(interruptible())
            if setup.report_to and processes.rank == 0:
                view.reporter = opened.enter_context(
                    Reporter(setup.report_to, setup.output, identity["settings"])
                )
            told = self.objective.told(len(self.tokens))
            view.begin([*engines.describe(), *told], start.step if start else None)
            loop = Run(
                settings,
                Plan(setup.tokens_per_batch, setup.save_every),
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
    trainer = choose_trainer(setup.backend, objective.engines)
    processes = _processes(setup.device, trainer)
    if processes.rank > 0:  # one of them speaks for all
        view = View(warn=lambda text: None)
    if processes.count > 1 and setup.device == "auto":
        setup = replace(setup, device=processes.device)
    if not dry:
        check_folder(setup.output, objective.verb, resume=setup.resume)
    if setup.report_to:
        check_package(setup.report_to)
    prompts = read_prompts(setup.data, limit=setup.limit)
    objective.check(prompts)
    validation = read_prompts(setup.validate) if setup.validate else []
    check_answers(validation, "--validate")
    with open_engines(objective, setup, trainer, view) as engines:
        engines.learner.processes = processes
        examples = engines.encoded(prompts, setup.system)
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
    if trainer != "torch":
        raise UsageError(f"several processes cannot train on {trainer}", "use --backend torch")
    try:
        from emlocal.backends.torch.processes import AcceleratedProcesses
    except ImportError as why:
        raise BackendError(
            "training with several processes needs the package accelerate", "pip install accelerate"
        ) from why
    return AcceleratedProcesses(cpu=device == "cpu")


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
