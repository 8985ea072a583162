"""Settings of EM-RL, and the recipes that come with emlocal."""

from pathlib import Path
from typing import Any

import pytest

from emlocal.errors import UsageError
from emlocal.settings import records_of
from emlocal.training import rl_settings
from emlocal.training.rl_settings import RLSettings, read_recipe, recipes


def settings(recipe: str) -> RLSettings:
    return RLSettings(**read_recipe(recipe))


def test_the_recipes_of_the_issue_are_there() -> None:
    assert recipes() == ["grpo", "intuitor", "paper-sequence", "paper-token", "rloo", "ttrl"]


@pytest.mark.parametrize(
    ("recipe", "reward", "advantage", "loss", "labels"),
    [
        ("paper-token", "token", "rloo", "reinforce", False),
        ("paper-sequence", "sequence", "rloo", "reinforce", False),
        ("rloo", "verifier", "rloo", "reinforce", True),
        ("grpo", "verifier", "grpo", "ppo-clip", True),
        ("intuitor", "self-certainty", "grpo", "ppo-clip", False),
        ("ttrl", "vote", "grpo", "ppo-clip", False),
    ],
)
def test_what_a_recipe_is(recipe: str, reward: str, advantage: str, loss: str, labels: bool) -> None:
    found = settings(recipe)
    assert found.reward == ((reward, 1.0),)
    assert (found.advantage, found.loss, found.needs_labels) == (advantage, loss, labels)
    assert found.steps >= 58  # every recipe sets its steps


def test_the_papers_settings_are_the_papers() -> None:
    paper = settings("paper-token")
    assert (paper.samples, paper.prompts_per_step, paper.steps) == (4, 512, 100)
    assert (paper.learning_rate, paper.kl_beta, paper.normalize) == (1e-6, 0.001, "sum")
    for baseline in ("paper-sequence", "rloo"):  # the compared recipes differ only in the reward
        other = settings(baseline)
        differences = {n for n, v in vars(paper).items() if vars(other)[n] != v}
        assert differences == {"reward"}


@pytest.mark.parametrize("recipe", recipes())
def test_each_value_of_a_recipe_has_a_comment(recipe: str) -> None:
    path = Path(rl_settings.__file__).with_name("recipes") / f"{recipe}.toml"
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    assert lines[0].startswith("# ")
    assert [line for line in lines if "#" not in line] == []


def test_a_recipe_that_was_copied_and_changed(tmp_path: Path) -> None:
    copy = tmp_path / "mine.toml"
    copy.write_text(
        'reward = { verifier = 1, token = 0.01 }\nlearning-rate = 1\ntarget-modules = ["q_proj"]\n'
    )
    found = settings(str(copy))
    assert found.reward == (("verifier", 1.0), ("token", 0.01))
    assert found.needs_labels
    assert found.learning_rate == 1.0
    assert found.target_modules == ("q_proj",)
    assert found.samples == RLSettings().samples


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning-rat = 1e-6", "there is no setting 'learning-rat'"),
        ("steps = 1.5", "steps is 1.5; it must be a whole number between 1 and"),
        ("steps = true", "steps is true; it must be a whole number between 1 and"),
        ('steps = "ten"', 'steps is "ten"; it must be a whole number between 1 and'),
        ("loss = 1", "loss is 1; it must be reinforce or ppo-clip"),
        ("reward = 3", "name, or a table"),
        ('reward = { token = "much" }', "name, or a table"),
        ("target-modules = 3", "list of names"),
        ("steps = ", "cannot be read"),
    ],
)
def test_what_is_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_recipe(str(path))


@pytest.mark.parametrize("name", ["paper", "", "../recipes/grpo", "nowhere.toml"])
def test_recipes_that_are_not_there(name: str) -> None:
    with pytest.raises(UsageError, match=r"no recipe|no file"):
        read_recipe(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 1}, "--samples is 1; it must be between 2 and"),
        ({"loss": "ppo"}, '--loss is "ppo"; it must be reinforce or ppo-clip'),
        ({"token_weights": "tw"}, '--token-weights is "tw"'),
        ({"schedule": "flat"}, '--schedule is "flat"'),
        ({"reward": (("entropy", 1.0),)}, "--reward is 'entropy'"),
        ({"reward": ()}, "no reward"),
        ({"reward": (("token", 1.0), ("token", 2.0))}, "twice"),
        ({"reward": (("token", 0.0),)}, "not 0"),
        ({"reward": (("token", float("nan")),)}, "not 0"),
        ({"reward": (("majority", 1.0),), "samples": 2}, "--reward majority needs"),
        ({"regularize": "kl-cov", "loss": "ppo-clip"}, "--ppo-epochs is 1"),
        ({"regularize": "kl-cov", "ppo_epochs": 2}, "--loss ppo-clip|ratio of ppo-clip"),
        ({"target_modules": ()}, "--target-modules is empty"),
        ({"kl_beta": -0.1}, "--kl-beta is -0.1"),
        ({"ppo_epochs": 1.5}, "whole number"),
        ({"ppo_epochs": 2}, "--ppo-epochs is 2; .* the ratio of ppo-clip"),
        ({"clip_low": 0.5}, "--clip-low is 0.5, which has no effect without --loss ppo-clip"),
        ({"clip_cov_share": 0.5}, "no effect without --regularize clip-cov"),
        ({"kl_cov_pull": 2.0}, "no effect without --regularize kl-cov"),
        ({"tw_alpha": 2.0}, "no effect without --token-weights tw-grpo"),
        ({"normalize": "mean", "reward": (("vote", 1.0),)}, "no effect without --reward token or sequence"),
    ],
)
def test_settings_that_cannot_be_meant(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RLSettings(**changes)


def test_every_setting_has_a_name_of_its_own() -> None:
    known = records_of(RLSettings)
    assert known.keys() == vars(RLSettings()).keys()
    assert len({each.flag for each in known.values()}) == len(known)
