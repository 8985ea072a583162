"""`emlocal finetune`: a LoRA adapter from the model's own, unlabelled answers (EM-FT)."""

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
    from emlocal.cli.training_view import FINETUNE_COLUMNS, carry_out
    from emlocal.training.rl import em_ft

    settings = settings_of_run(FineTuneSettings, given, run.config, RECIPES[recipe].values)
    setup = Setup(data, output, model, run, answers, machine, run.validate)
    carry_out(em_ft(settings, recipe), setup, FINETUNE_COLUMNS)
