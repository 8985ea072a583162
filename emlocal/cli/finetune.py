"""`emlocal finetune`: a LoRA adapter from the model's own, unlabelled answers (EM-FT)."""

from typing import Annotated

import typer

from emlocal.cli.finetune_options import Recipe, TrainingOptions
from emlocal.cli.options import with_options
from emlocal.cli.training_options import (
    AnswerOptions,
    Data,
    MachineOptions,
    ModelName,
    Output,
    RunOptions,
)


@with_options
def finetune(
    data: Data,
    output: Output,
    model: ModelName = None,
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
    machine.go_offline_if_asked()
    from emlocal.cli.finetune_settings import settings_of_run
    from emlocal.cli.training_view import FINETUNE_COLUMNS, carry_out, setup_of
    from emlocal.training.finetune import em_ft

    objective = em_ft(settings_of_run(training, recipe, run.config), str(recipe))
    carry_out(objective, setup_of(data, output, model, run, answers, machine), FINETUNE_COLUMNS, run)
