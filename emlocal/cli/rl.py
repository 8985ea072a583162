"""The command `emlocal rl`: trains a LoRA adapter with negative entropy as the reward (EM-RL)."""

from typing import Annotated

import typer

from emlocal.cli.options import Data, ModelName, Output, with_options
from emlocal.settings.table import NOTHING, Given, Table
from emlocal.training.rl_settings import RLSettings, read_recipe, recipes
from emlocal.training.settings import AnswerOptions, MachineOptions, RunOptions, Setup, settings_of_run


@with_options
def rl(
    data: Data,
    output: Output,
    model: ModelName = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help=f"Start from these settings: {', '.join(recipes())}, or a TOML file.",
            metavar="NAME",
        ),
    ] = None,
    run: RunOptions = RunOptions(),
    given: Annotated[Given, Table.of(RLSettings)] = NOTHING,
    answers: AnswerOptions = AnswerOptions(),
    machine: MachineOptions = MachineOptions(),
) -> None:
    """Train a LoRA adapter with negative entropy as the reward (EM-RL).

    Only the reward verifier needs labels. Each step draws several answers to some prompts. It makes the
    answers with a higher reward than the others to the same prompt more likely. Use the adapter with
    emlocal chat -m MODEL --adapter FOLDER.
    """
    machine.go_offline_if_asked()
    values = read_recipe(recipe) if recipe is not None else NOTHING
    settings = settings_of_run(RLSettings, given, run.config, values)
    from emlocal.cli.training_view import RL_COLUMNS, carry_out
    from emlocal.training.rl import em_rl

    setup = Setup(data, output, model, run, answers, machine, run.validate)
    carry_out(em_rl(settings, recipe), setup, RL_COLUMNS)
