"""The numbers of a run, the learning rate of each step, and the recipes."""

import pytest

from emlocal.em.losses import tempered_by
from emlocal.errors import UsageError
from emlocal.training.settings import RECIPES, FineTuneSettings


def rates(**values: object) -> list[float]:
    settings = FineTuneSettings(learning_rate=0.1, **values)  # type: ignore[arg-type]
    return [settings.learning_rate_at(step) for step in range(settings.steps)]


def test_schedules_by_hand() -> None:
    assert rates(steps=3) == [0.1] * 3
    assert rates(steps=4, schedule="linear") == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert rates(steps=4, schedule="cosine") == pytest.approx([0.1, 0.08535534, 0.05, 0.01464466])
    assert rates(steps=5, warmup=2) == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.1])
    assert rates(steps=4, warmup=2, schedule="linear") == pytest.approx([0.05, 0.1, 0.1, 0.05])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3, 12, 50])
def test_no_step_has_no_learning_rate(schedule: str, warmup: int) -> None:
    assert all(0 < rate < 0.1 + 1e-12 for rate in rates(steps=12, warmup=warmup, schedule=schedule))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"normalize": "sum"}, '--normalize is "sum"; it must be token or sequence'),
        ({"schedule": "step"}, '--schedule is "step"; it must be one of constant, linear, cosine'),
        ({"target_modules": ()}, "--target-modules is empty"),
        ({"target_modules": ("q_proj", "")}, "--target-modules is empty"),
        ({"steps": 1.5}, "--steps is 1.5; it must be a whole number"),
        ({"steps": True}, "--steps is true"),
        ({"alpha": float("inf")}, "--alpha is inf; it must be more than 0"),
        ({"max_kl": float("nan")}, "--max-kl is nan"),
        ({"seed": 2**63}, "--seed is"),
    ],
)
def test_values_that_cannot_be_meant(values: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        FineTuneSettings(**values)  # type: ignore[arg-type]
    assert says in caught.value.message


def test_recipes_are_settings() -> None:
    built = {name: FineTuneSettings(**recipe.values) for name, recipe in RECIPES.items()}
    assert built["default"] == FineTuneSettings()
    assert (built["paper"].kl_beta, built["paper"].normalize) == (0, "sequence")
    assert (built["one-shot"].temperature, built["one-shot"].rollout_temperature) == (0.5, 0.5)
    assert tempered_by(built["default"].kl_beta) == pytest.approx(1 / 3)
    assert tempered_by(built["paper"].kl_beta) == 0
