"""`emlocal rl`: a LoRA adapter by reinforcement, with negative entropy as the only reward (EM-RL)."""

from pathlib import Path
from typing import Annotated, Any

import typer

from emlocal.cli.options import with_options
from emlocal.cli.rl_options import RLOptions
from emlocal.cli.training_options import (
    AnswerOptions,
    Data,
    MachineOptions,
    ModelName,
    Output,
    RunOptions,
)
from emlocal.errors import UsageError
from emlocal.training.rl_settings import RLSettings, read_recipe, recipes


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
    training: RLOptions = RLOptions(),
    answers: AnswerOptions = AnswerOptions(),
    machine: MachineOptions = MachineOptions(),
) -> None:
    """Train a LoRA adapter by reinforcement, with negative entropy as the only reward (EM-RL).

    No labels are needed, but for the reward verifier. Each step draws several answers to some prompts, and
    makes those likelier that are worth more than the others to the same prompt. Afterwards:
    emlocal chat -m MODEL --adapter FOLDER.
    """
    machine.go_offline_if_asked()
    settings = settings_of_run(training, recipe, run.config)
    from emlocal.cli.training_view import RL_COLUMNS, carry_out, setup_of
    from emlocal.training.rl import em_rl

    setup = setup_of(data, output, model, run, answers, machine)
    carry_out(em_rl(settings, recipe), setup, RL_COLUMNS, run)


def settings_of_run(flags: RLOptions, recipe: str | None, config: Path | None) -> RLSettings:
    """Flag > --config > recipe > default. Raises UsageError for values that cannot be meant."""
    given: dict[str, Any] = {name: value for name, value in vars(flags).items() if value is not None}
    if flags.reward is not None:
        given["reward"] = _rewards(flags.reward)
    if flags.target_modules is not None:
        given["target_modules"] = tuple(filter(None, map(str.strip, flags.target_modules.split(","))))
    values = read_recipe(recipe) if recipe is not None else {}
    if config is not None:
        values |= read_recipe(config)
    values |= {name: str(value) if isinstance(value, str) else value for name, value in given.items()}
    return RLSettings(**values)


def _rewards(text: str) -> tuple[tuple[str, float], ...]:
    """`token`, or `verifier=1,token=0.01`. Raises UsageError."""
    found = []
    for part in text.split(","):
        name, separator, weight = part.partition("=")
        try:
            found.append((name.strip(), float(weight) if separator else 1.0))
        except ValueError:
            raise UsageError(
                f"--reward has the weight {weight.strip()!r}, which is no number", "say verifier=1,token=0.01"
            ) from None
    return tuple(found)
