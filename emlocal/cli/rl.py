"""`emlocal rl`: a LoRA adapter by reinforcement, with negative entropy as the only reward (EM-RL)."""

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
            help=f"Settings that others are changes to: {', '.join(recipes())}, or a TOML file.",
            metavar="NAME",
        ),
    ] = None,
    run: RunOptions = RunOptions(),
    given: Annotated[Given, Table.of(RLSettings)] = NOTHING,
    answers: AnswerOptions = AnswerOptions(),
    machine: MachineOptions = MachineOptions(),
) -> None:
    """Train a LoRA adapter by reinforcement, with negative entropy as the only reward (EM-RL).

    No labels are needed, but for the reward verifier. Each step draws several answers to some prompts, and
    makes those likelier that are worth more than the others to the same prompt. Afterwards:
    emlocal chat -m MODEL --adapter FOLDER.
    """
    machine.go_offline_if_asked()
    values = read_recipe(recipe) if recipe is not None else NOTHING
    settings = settings_of_run(RLSettings, given, run.config, values)
    from emlocal.cli.training_view import RL_COLUMNS, carry_out
    from emlocal.training.rl import em_rl

    setup = Setup(data, output, model, run, answers, machine, run.validate)
    carry_out(em_rl(settings, recipe), setup, RL_COLUMNS)
