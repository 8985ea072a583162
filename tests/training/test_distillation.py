"""Vote distillation: which votes teach, in which order, and what the model learns."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import emlocal
from emlocal.backends.fake import FakeBackend, saying
from emlocal.backends.learner import Descent
from emlocal.backends.torch.learner import TorchPolicyLearner
from emlocal.em.losses import PolicyObjective
from emlocal.errors import CancelledError, EmlocalError, UsageError
from emlocal.generation.scheduler import SPARE_SEQUENCES
from emlocal.training.distillation import VOTES, Distillation, Lesson, clear, lesson_of
from emlocal.training.engines import SameModel
from emlocal.training.rollouts import MicroBatches, Rollout
from emlocal.training.settings import FineTuneSettings
from tests.metrics import metrics, timeless
from tests.tiny_pair import ModelPair, random_adapter

SETTINGS = FineTuneSettings(learn="vote", samples=4, margin=0.5, prompts_per_step=2, max_tokens=9)
PROMPTS = [list(b"[user]%d[assistant]" % i) for i in range(20)]


def said(text: str, *, ended: bool = True, seed: int = 0) -> Rollout:
    return Rollout((1, 2), (*text.encode(), seed), ended, text, 1.0)


def lesson(place: int, margin: float, *texts: str) -> Lesson:
    return Lesson(place, margin, [said(text) for text in texts])


@pytest.mark.parametrize(
    ("texts", "margin", "won"),
    [
        (["so 7", "so 7", "it is 7.0", "so 8"], 0.5, [0, 1, 2]),
        (["so 7", "so 8", "so 8", "so 7"], 0.0, [0, 3]),  # a tie goes to the first sample's answer
        (["no", "none", "nothing", "so 5"], 0.25, [3]),  # samples without an answer count against it
        (["no", "none", "nothing", "nil"], 0.0, []),
    ],
)
def test_margins_by_hand(texts: list[str], margin: float, won: list[int]) -> None:
    rollouts = [said(text, seed=i) for i, text in enumerate(texts)]
    found = lesson_of(3, rollouts)
    assert (found.place, found.margin) == (3, margin)
    assert list(found.texts) == [rollouts[i] for i in won]


def test_a_text_that_was_cut_off_has_no_vote_and_teaches_nothing() -> None:
    rollouts = [said("so 7", ended=False), said("so 8"), said(r"\boxed{8}", ended=False)]
    found = lesson_of(0, rollouts)
    assert found.margin == pytest.approx(2 / 3)  # the box came before the cut
    assert list(found.texts) == [rollouts[1]]


def test_clear_votes_come_first_and_unclear_ones_not_at_all() -> None:
    lessons = [
        lesson(0, 0.5, "a"),
        lesson(1, 1.0, "b"),
        lesson(2, 0.4, "c"),
        lesson(3, 1.0, "d"),
        Lesson(4, 1, ()),
    ]
    assert [each.place for each in clear(lessons, 0.5)] == [1, 3, 0]


def test_steps_go_round_the_lessons_with_another_text_each_time() -> None:
    method = Distillation(replace(SETTINGS, prompts_per_step=3), None)  # type: ignore[arg-type]
    method._lessons = [lesson(0, 1.0, "a", "b"), lesson(1, 1.0, "c")]
    assert [[r.text for r in method.taught(step)] for step in range(3)] == [
        ["a", "c", "b"],
        ["c", "a", "c"],
        ["b", "c", "a"],
    ]


class Alone:
    """A learner that is never called."""

    class processes:  # noqa: N801
        count = 1


def prepare(
    folder: Path, settings: FineTuneSettings = SETTINGS, text: str = "7", **more: Any
) -> Distillation:
    backend = FakeBackend(sequences=16 + SPARE_SEQUENCES, shared=False, script=saying(text, sharpness=60))
    method = Distillation(SETTINGS, Alone())  # type: ignore[arg-type]
    heard: list[tuple[int, int]] = []
    given = {"cancelled": lambda: False, "progress": lambda *now: heard.append(now), **more}
    method.prepare(SameModel(backend, 16), PROMPTS, folder, **given)
    if heard:
        assert heard == sorted(heard)
        assert heard[-1] == (80, 80)
    return method


def test_votes_are_collected_once_and_a_killed_run_goes_on(tmp_path: Path) -> None:
    whole = prepare(tmp_path)
    written = (tmp_path / VOTES).read_bytes()
    assert len(whole._lessons) == len(PROMPTS)
    assert [list(r.prompt) for r in whole.taught(0)] == PROMPTS[:2]
    for end in (len(written) - 5, len(written) // 2, 10, 0):
        (tmp_path / VOTES).write_bytes(written[:end])  # as after kill -9
        assert prepare(tmp_path)._lessons == whole._lessons
        assert (tmp_path / VOTES).read_bytes() == written


def test_a_cancelled_collection_keeps_whole_blocks(tmp_path: Path) -> None:
    progress: list[int] = []
    with pytest.raises(CancelledError):
        prepare(
            tmp_path,
            cancelled=lambda: bool(progress) and progress[-1] >= 64,
            progress=lambda done, total: progress.append(done),
        )
    assert len((tmp_path / VOTES).read_text().splitlines()) == 16


def test_no_clear_vote_is_one_line_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(EmlocalError, match=r"none of 20 votes has a margin of 0.5 .* clearest has 0.00"):
        prepare(tmp_path, text="no")


@pytest.mark.parametrize("content", ["{}\n", "[\n", '{"prompt": 3, "margin": 1, "texts": []}\n', "\xff\n"])
def test_a_file_of_other_votes_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / VOTES).write_bytes(content.encode("latin-1"))
    with pytest.raises(UsageError, match=VOTES):
        prepare(tmp_path)


def nll(model: Any, rollouts: Sequence[Rollout]) -> float:
    """Returns the mean of −log π over all tokens, one prefix after the other."""
    total, count = 0.0, 0
    with torch.no_grad():
        for each in rollouts:
            for i, token in enumerate(each.answer):
                prefix = torch.tensor([[*each.prompt, *each.answer[:i]]])
                total -= float(model(prefix).logits[0, -1].double().log_softmax(-1)[token])
                count += 1
    return total / count


def test_the_loss_is_the_texts_negative_log_probability(pair: ModelPair) -> None:
    random = np.random.default_rng(5)
    rollouts = [
        Rollout((5, 9, 11), tuple(random.integers(3, 200, n).tolist()), True, "", 0.0) for n in (3, 8, 1, 5)
    ]
    model = AutoModelForCausalLM.from_pretrained(pair.folder, dtype=torch.float32)
    learner = TorchPolicyLearner(
        model, random_adapter(), Descent(), PolicyObjective("reinforce"), temperature=1.0
    )
    settings = replace(SETTINGS, kl_beta=0.0)
    batches = MicroBatches(14, learner.forget, lambda: False, lambda *_: None, lambda text: None)
    before = nll(learner.model, rollouts)
    [gradient] = Distillation(settings, learner).gradients(0, [], rollouts, batches)
    assert gradient.row["loss"] == pytest.approx(before, rel=1e-4)
    assert gradient.kl is not None  # for the guard, and for the loss too if β is not 0
    assert gradient.kl > 0
    learner.update(1e-3)
    assert nll(learner.model, rollouts) < before


def test_a_run_ends_with_an_adapter_and_resumes_with_its_votes(pair: ModelPair, tmp_path: Path) -> None:
    data = [{"question": f"say {i}"} for i in range(12)]
    given: dict[str, Any] = {
        "recipe": "vote",
        "model": str(pair.gguf),
        "prompts_per_step": 2,
        "max_tokens": 40,
        "rank": 4,
        "threads": 1,
        "dtype": "float32",
        "margin": 0.0,
        "rollout_temperature": 1.5,
        "steps": 3,
    }
    result = emlocal.finetune(data, tmp_path / "whole", **given)
    assert (result.outcome.reason, result.outcome.steps) == ("finished", 3)
    rows = metrics(tmp_path / "whole")
    assert [row["kl"] for row in rows[:1]] == [0.0]
    assert all(row["loss"] > 0 for row in rows[:3])
    again = emlocal.finetune(data, tmp_path / "whole", **given, resume=True)
    assert timeless(metrics(again.adapter)) == timeless(rows)


@pytest.mark.parametrize(
    "given",
    [{"samples": 4}, {"margin": 0.2}, {"learn": "vote", "temperature": 0.5}, {"learn": "vote", "margin": 2}],
)
def test_settings_that_do_nothing_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        FineTuneSettings(**given)
