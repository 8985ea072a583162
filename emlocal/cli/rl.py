"""`emlocal rl`: a LoRA adapter by reinforcement, with negative entropy as the only reward (EM-RL)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

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
from emlocal.settings.table import NOTHING, Given, Table
from emlocal.training.rl_settings import RLSettings, read_recipe, recipes
from emlocal.training.settings import settings_of_run
from emlocal.words import counted, plain

if TYPE_CHECKING:
    from emlocal.backends.engine import Opened
    from emlocal.backends.learner import Descent, PolicyLearner
    from emlocal.cli.training import Work
    from emlocal.models.adapters.adapter import Adapter
    from emlocal.training.prompts import Prompt
    from emlocal.training.rl import PolicyGradient


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
    from emlocal.cli.training import Asked, carry_out

    carry_out(_work(settings, recipe), Asked(data, output, model, run, answers, machine))


def _work(settings: RLSettings, recipe: str | None) -> "Work[PolicyLearner]":
    from emlocal.cli import training_view as view
    from emlocal.cli.training import Work
    from emlocal.cli.training_validation import check_answers
    from emlocal.training.rl import PolicyGradient, objective_of

    def check(prompts: Sequence["Prompt"]) -> None:
        if settings.needs_labels:
            check_answers(prompts, "the reward verifier")

    def learner(
        opened: "Opened", adapter: "Adapter", descent: "Descent", checkpointing: bool
    ) -> "PolicyLearner":
        return opened.policy_learner(
            adapter,
            descent,
            objective_of(settings),
            temperature=settings.rollout_temperature,
            checkpointing=checkpointing,
        )

    def method(made: "PolicyLearner", prompts: Sequence["Prompt"]) -> "PolicyGradient":
        labels = [p.answer or "" for p in prompts] if settings.needs_labels else []
        return PolicyGradient(settings, made, labels)

    def told(prompts: int) -> Sequence[str]:
        s = settings
        parts = [name if w == 1 else f"{plain(w)} · {name}" for name, w in s.reward]
        worth = " + ".join(parts).replace("+ -", "- ")
        return (
            f"recipe {recipe or 'default'}: {counted(s.steps, 'step')} of {s.samples:,} answers to each of"
            f" {s.prompts_per_step:,} of {counted(prompts, 'prompt')},",
            f"reward {worth}, advantage {s.advantage}, loss {s.loss}, β {plain(s.kl_beta)},",
            f"learning rate {plain(s.learning_rate)}, rank {s.rank}, seed {s.seed}",
        )

    columns = (
        ("reward", 9, view.number("reward", 3)),
        ("same", 5, view.share("zero_variance", 0)),
        view.ENTROPY,
        view.KL,
        view.LENGTH,
        view.REPETITION,
        view.GRADIENT,
        view.SECONDS,
    )
    return Work("rl", settings, check, learner, method, told, columns)
