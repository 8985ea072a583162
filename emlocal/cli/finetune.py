"""`emlocal finetune`: a LoRA adapter from the model's own, unlabelled answers (EM-FT)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from emlocal.cli.options import with_options
from emlocal.cli.training_options import (
    AnswerOptions,
    Data,
    MachineOptions,
    ModelName,
    Output,
    RunOptions,
)
from emlocal.errors import UsageError
from emlocal.settings.table import NOTHING, Given, Table
from emlocal.training.settings import RECIPES, FineTuneSettings, settings_of_run
from emlocal.words import counted, plain

if TYPE_CHECKING:
    from emlocal.backends.engine import Opened
    from emlocal.backends.learner import Descent, EntropyLearner
    from emlocal.cli.training import Work
    from emlocal.models.adapters.adapter import Adapter
    from emlocal.training.prompts import Prompt

Recipe = Literal["default", "paper", "one-shot"]


@with_options
def finetune(
    data: Data,
    output: Output,
    model: ModelName = None,
    recipe: Annotated[Recipe, typer.Option("--recipe", help="Settings that others are changes to.")] = (
        "default"
    ),
    run: RunOptions = RunOptions(),
    given: Annotated[Given, Table.of(FineTuneSettings)] = NOTHING,
    answers: AnswerOptions = AnswerOptions(),
    machine: MachineOptions = MachineOptions(),
) -> None:
    """Fine-tune a LoRA adapter on the entropy of the model's own answers (EM-FT).

    No labels are needed. Each step answers some prompts with the model as it is, and lowers the entropy
    of the distributions that its tokens were drawn from. Afterwards: emlocal chat -m MODEL --adapter FOLDER.
    """
    machine.go_offline_if_asked()
    from emlocal.cli.training import Asked, carry_out

    settings = settings_of_run(FineTuneSettings, given, run.config, RECIPES[recipe].values)
    carry_out(_work(settings, recipe), Asked(data, output, model, run, answers, machine))


def _work(settings: FineTuneSettings, recipe: Recipe) -> "Work[EntropyLearner]":
    from emlocal.backends.learner import EntropyObjective
    from emlocal.cli import training_view as view
    from emlocal.cli.training import Work
    from emlocal.training.finetune import FineTune

    def check(prompts: Sequence["Prompt"]) -> None:
        if recipe == "one-shot" and len(prompts) > 1:
            raise UsageError(
                f"--recipe one-shot trains on one prompt; there are {len(prompts):,}", "choose one: --limit 1"
            )

    def learner(
        opened: "Opened", adapter: "Adapter", descent: "Descent", checkpointing: bool
    ) -> "EntropyLearner":
        objective = EntropyObjective(settings.kl_beta, settings.measures_kl, settings.temperature)
        return opened.entropy_learner(adapter, descent, objective, checkpointing=checkpointing)

    def told(prompts: int) -> Sequence[str]:
        s = settings
        return (
            f"recipe {recipe}: {counted(s.steps, 'step')} of {counted(s.prompts_per_step, 'answer')}"
            f" to {counted(prompts, 'prompt')},",
            f"learning rate {plain(s.learning_rate)}, β {plain(s.kl_beta)}, rank {s.rank}, seed {s.seed}",
        )

    columns = (view.ENTROPY, view.KL, view.LENGTH, view.ENDED, view.REPETITION, view.GRADIENT, view.SECONDS)
    return Work(
        "finetune",
        settings,
        check,
        learner,
        lambda made, _: FineTune(settings, made),
        told,
        columns,
        ("torch", "mlx"),
    )
