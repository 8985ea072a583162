"""EM-RL's loop: rewards reach their tokens, each reward raises itself, killed runs resume bit for bit."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from emlocal.backends.base import LoadOptions
from emlocal.backends.llama_cpp import LlamaCppBackend
from emlocal.errors import CancelledError
from emlocal.generation.scheduler import SPARE_SEQUENCES
from emlocal.models.adapters import read_adapter
from emlocal.models.resolve import resolve
from emlocal.training import checkpoint
from emlocal.training.loop import Plan
from emlocal.training.rl_settings import RLSettings, read_recipe, recipes
from emlocal.training.rollouts import draw_rollouts
from emlocal.training.settings import FineTuneSettings
from tests.metrics import metrics
from tests.tiny_pair import ModelPair
from tests.training.runs import (
    PROMPTS,
    Watched,
    assert_equal,
    assert_same,
    kill_and_resume,
    prepared,
    run,
)

SETTINGS = RLSettings(
    steps=6,
    prompts_per_step=3,
    samples=3,
    reward=(("token", 1.0), ("verifier", 5.0), ("vote", 1.0)),
    loss="ppo-clip",
    ppo_epochs=2,
    regularize="clip-cov",
    clip_cov_share=0.1,
    token_weights="tw-grpo",  # noqa: S106
    learning_rate=3e-3,
    rank=4,
    alpha=8,
    kl_beta=0.1,
    max_tokens=12,
    entropy_floor=0,
    max_repetition=1,
    max_length_change=1e9,
    max_kl=1e9,
)
"""A setting with everything at once."""
PASSES = 5
"""Passes of a step over its answers: scores, base scores, TW-GRPO, and two updates."""


@pytest.fixture(scope="module")
def whole(pair: ModelPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(pair, out, Watched(), SETTINGS).reason == "finished"
    return out


# ------------------------------------------------------------------------------------------ answers drawn


def drawn(
    pair: ModelPair, prompts: Sequence[Sequence[int]], samples: int, parallel: int, step: int = 2
) -> list[tuple[int, ...]]:
    options = LoadOptions(context=64, sequences=parallel + SPARE_SEQUENCES, shared=False, threads=1)
    backend = LlamaCppBackend(resolve(str(pair.gguf)), options)
    settings = FineTuneSettings(max_tokens=9)
    try:
        found = draw_rollouts(backend, prompts, settings, step, parallel, samples=samples)
    finally:
        backend.close()
    assert [list(each.prompt) for each in found] == [p for p in prompts for _ in range(samples)]
    return [each.answer for each in found]


def test_answers_to_a_prompt_differ_and_are_those_that_are_drawn_alone(pair: ModelPair) -> None:
    together = drawn(pair, PROMPTS[:3], samples=4, parallel=5)
    assert len(set(together)) == 12
    assert drawn(pair, PROMPTS[:3], samples=4, parallel=1) == together  # one answer at a time
    assert drawn(pair, PROMPTS[:1], samples=4, parallel=2) == together[:4]  # without the other prompts
    assert drawn(pair, PROMPTS[:3], samples=1, parallel=3) == together[::4]  # without the other answers
    same = drawn(pair, [PROMPTS[0]] * 3, samples=2, parallel=2)
    assert len(set(same)) == 6  # the same prompt in other places
    assert not set(drawn(pair, PROMPTS[:3], samples=4, parallel=5, step=3)) & set(together)


# ----------------------------------------------------------------------------------------- rewards go up


OFF = {"entropy_floor": 0, "max_repetition": 1, "max_length_change": 1e9, "max_kl": 0}
"""Guards that never fire."""


def small(recipe: str, **changes: object) -> RLSettings:
    """Returns a recipe scaled down to the tiny model, with its guards off."""
    held = RLSettings(**read_recipe(recipe))
    sizes = {"prompts_per_step": 10, "samples": 8, "max_tokens": 12, "rank": 4, "alpha": 8}
    return replace(held, warmup=min(held.warmup, 1), **{**sizes, **OFF, **changes})  # type: ignore[arg-type]


REWARDS_OF_NO_RECIPE = {
    "token, mean": {"reward": (("token", 1.0),), "normalize": "mean"},
    "sequence, mean": {"reward": (("sequence", 1.0),), "normalize": "mean"},
    "majority": {"reward": (("majority", 1.0),)},
}


@pytest.mark.parametrize("which", [*recipes(), *REWARDS_OF_NO_RECIPE])
def test_each_reward_moves_itself_up(pair: ModelPair, out: Path, which: str) -> None:
    changes = REWARDS_OF_NO_RECIPE.get(which)
    recipe = which if changes is None else "paper-token"
    settings = small(recipe, steps=24, learning_rate=0.03, **(changes or {}))
    assert run(pair, out, Watched(), settings).reason == "finished"
    rows = metrics(out)[:-1]
    rewards = [row["reward"] for row in rows]
    assert len(rewards) == 24
    spread = rows[0]["reward_std"]  # within groups, before anything is learned
    assert spread > 0
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + spread / 2


# ------------------------------------------------------------------------------------------ stop and go on


def test_killed_anywhere_and_resumed_it_is_the_same_run(pair: ModelPair, whole: Path, out: Path) -> None:
    assert kill_and_resume(pair, out, SETTINGS, events=60) >= 3
    assert_same(out, whole)
    assert not list(out.rglob(".*.tmp"))


def test_micro_batches_do_not_depend_on_checkpoints(pair: ModelPair, whole: Path, out: Path) -> None:
    run(pair, out, Watched(), SETTINGS, plan=Plan(token_budget=40, save_every=100))
    assert_same(out, whole)


class Counting(Watched):
    """Asks to stop after this many passes over a step's answers."""

    asked = False

    def __init__(self, step: int, passes: int) -> None:
        super().__init__()
        self._step, self._left = step, passes

    def training(self, step: int, done: int, total: int) -> None:
        super().training(step, done, total)
        if step == self._step and done == total:
            self._left -= 1
            self.asked = self._left == 0


@pytest.mark.parametrize("passes", range(1, PASSES))
def test_ctrl_c_in_a_step_leaves_the_state_before_it(
    pair: ModelPair, whole: Path, out: Path, passes: int
) -> None:
    watcher = Counting(3, passes)
    with prepared(pair, out, watcher, SETTINGS, cancelled=lambda: watcher.asked) as (work, start):
        real, updates = work.learner.update, []
        work.learner.update = lambda rate: updates.append(rate) or real(rate)  # type: ignore[func-returns-value]
        with pytest.raises(CancelledError):
            work.run(start)
    # the last case is between the two updates of a step
    assert len(updates) == 3 * SETTINGS.ppo_epochs + (passes == PASSES - 1)
    (held, damaged) = checkpoint.latest(out / "checkpoints")
    assert held is not None
    assert (held.step, held.history["good_step"], damaged) == (3, 2, [])
    until_then = out.with_name("shorter")
    run(pair, until_then, Watched(), replace(SETTINGS, steps=3))
    for name, pair_ in read_adapter(until_then).pairs.items():
        assert (held.learner[f"{name}.lora_B"] == pair_.b).all()
        assert not (held.good[f"{name}.lora_B"] == pair_.b).all()
    run(pair, out, Watched(), SETTINGS, resume=True)
    assert_same(out, whole)


# ------------------------------------------------------------------------------------------- what goes wrong


def test_thirty_times_the_learning_rate_collapses_and_the_good_adapter_stays(
    pair: ModelPair, out: Path
) -> None:
    guards = {name: vars(RLSettings())[name] for name in OFF}
    few = {"steps": 12, "prompts_per_step": 5, "learning_rate": 8e-3}
    good = small("paper-token", **few, **guards)
    fine = run(pair, out.with_name("good"), Watched(), good)
    assert (fine.reason, fine.steps) == ("finished", 12)
    watcher = Watched()
    bad = replace(good, learning_rate=30 * good.learning_rate, steps=24)  # how soon differs by processor
    outcome = run(pair, out, watcher, bad)
    assert outcome.reason == "collapsed"
    flags = {"--entropy-floor", "--max-kl", "--max-repetition", "--max-length-change"}
    assert sum(flag in outcome.message for flag in flags) == 1
    assert f"the adapter of step {outcome.steps} was kept" in outcome.message
    assert 0 < outcome.steps < len(watcher.rows) < bad.steps
    kept = watcher.rows[outcome.steps]
    assert kept["kl"] <= bad.max_kl
    assert kept["entropy"] >= bad.entropy_floor
    until_then = out.with_name("shorter")
    run(pair, until_then, Watched(), replace(bad, steps=outcome.steps))
    assert_equal(read_adapter(out), read_adapter(until_then))


def test_labels_are_told_apart_the_same_in_every_process() -> None:
    """Keys of answers are partly sets, which Python orders differently in each process."""
    code = (
        "from emlocal.training.rl import PolicyGradient;"
        "from emlocal.training.rl_settings import RLSettings;"
        "s = RLSettings(reward=(('verifier', 1.0),));"
        "print(PolicyGradient(s, None, [r'\\{a, b, c\\}', r'x=1, x=2, y=3']).identity()['labels'])"
    )
    found = {
        subprocess.check_output(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, text=True
        )
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1
