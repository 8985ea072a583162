"""The command `emlocal finetune`: trains a LoRA adapter on the model's own, unlabelled answers (EM-FT)."""

from typing import Annotated, Literal

import typer

from emlocal.cli.options import Data, ModelName, Output, with_options
from emlocal.settings.table import NOTHING, Given, Table
from emlocal.training.settings import (
    RECIPES,
    AnswerOptions,
    FineTuneSettings,
    MachineOptions,
    RunOptions,
    Setup,
    settings_of_run,
)

Recipe = Literal["default", "paper", "one-shot", "vote"]


@with_options
def finetune(
    data: Data,
    output: Output,
    model: ModelName = None,
    recipe: Annotated[Recipe, typer.Option("--recipe", help="Start from the settings of this recipe.")] = (
        "default"
    ),
    run: RunOptions = RunOptions(),
    given: Annotated[Given, Table.of(FineTuneSettings)] = NOTHING,
    answers: AnswerOptions = AnswerOptions(),
    machine: MachineOptions = MachineOptions(),
) -> None:
    """Fine-tune a LoRA adapter on the model's own answers (EM-FT).

    The prompts need no labels. Each step answers some prompts with the current model, then lowers the
    entropy of the distributions that the tokens were drawn from. Use the adapter with
    emlocal chat -m MODEL --adapter FOLDER.
    """
    machine.go_offline_if_asked()
    from emlocal.cli.training_view import FINETUNE_COLUMNS, carry_out
    from emlocal.training.rl import fine_tuning

    settings = settings_of_run(FineTuneSettings, given, run.config, RECIPES[recipe].values)
    setup = Setup(data, output, model, run, answers, machine, run.validate)
    carry_out(fine_tuning(settings, recipe), setup, FINETUNE_COLUMNS)
