"""Vote distillation: learn the answers that most of the model's own samples agree on.

    collect   answer each prompt N times, once, and let the answers vote     OUT/votes.jsonl
    learn     −log π of winning texts + β·k3 to the base, clear votes first

A vote of N answers costs N times as much as one answer. A model that learned the winning texts gives part of
the vote's gain in one greedy answer, and at most the vote's accuracy. Votes without a clear winner teach
nothing. All labels come from the base model, so a wrong majority cannot reinforce itself. It can where each
step votes again (recipe ttrl of `emlocal rl`, arXiv 2504.16084).
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from emlocal.backends.learner import PolicyLearner, TokenLosses
from emlocal.errors import EmlocalError, UsageError
from emlocal.methods.vote import DRAWN_WITH, Vote
from emlocal.methods.voting import Rules, decide, repeated
from emlocal.sampling import SamplingParams
from emlocal.text import counted, parse_json
from emlocal.training.loop import Answerer, Gradient
from emlocal.training.rollouts import AnswerTokens, MicroBatches, Rollout, draw_rollouts, token_weights
from emlocal.training.settings import FineTuneSettings

VOTES = "votes.jsonl"
BLOCK = 16
"""Prompts that are answered together. Their votes are on disk before the next ones begin."""
_STEP = 2**31 + 1  # no training step has this number, so the votes have their own draws


@dataclass(frozen=True)
class Lesson:
    """The vote on one prompt."""

    place: int
    """The prompt's place in the data, from 0."""
    margin: float
    """Share of samples for the first answer minus the share for the second."""
    texts: Sequence[Rollout]
    """The samples that gave the first answer and ended by themselves; empty without a winner."""


def lesson_of(place: int, rollouts: Sequence[Rollout]) -> Lesson:
    """Lets the samples of one prompt vote with equal weight, as the method `vote` does without a score."""
    vote = Vote()
    ballots = [
        vote.ballot_of(i, each.text, "stop" if each.ended else "length", repeated(each.answer), None)
        for i, each in enumerate(rollouts)
    ]
    cast = [ballot for ballot in ballots if ballot is not None]
    decision = decide(cast, Rules())
    if decision.winner is None:
        return Lesson(place, 0.0, ())
    won = [ballot for ballot in cast if ballot.key == decision.winner.key]
    return Lesson(place, decision.margin, [rollouts[ballot.sample] for ballot in won if ballot.whole])


def clear(lessons: Sequence[Lesson], margin: float) -> list[Lesson]:
    """Returns the lessons with at least this margin, the clearest first; equal ones in the data's order."""
    kept = [lesson for lesson in lessons if lesson.texts and lesson.margin >= margin]
    return sorted(kept, key=lambda lesson: (-lesson.margin, lesson.place))


@dataclass
class Distillation:
    """Trains on texts that won a vote, one update a step. A `loop.Method`."""

    settings: FineTuneSettings
    learner: PolicyLearner
    draws_once: bool = True
    _lessons: list[Lesson] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """Number of answers to each prompt."""
        return self.settings.samples

    def identity(self) -> dict[str, Any]:
        """Returns an empty table: only the prompts matter."""
        return {}

    def prepare(
        self,
        answerer: Answerer,
        prompts: Sequence[Sequence[int]],
        folder: Path,
        cancelled: Callable[[], bool],
        progress: Callable[[int, int], None],
    ) -> str:
        """Collects the votes in `folder`, or resumes collecting them. Returns a summary in words.

        Raises EmlocalError if no vote is clear enough, CancelledError, and the engine's errors.
        """
        if self.learner.processes.count > 1:
            raise UsageError("--learn vote runs in one process", "start it without accelerate")
        s, path = self.settings, folder / VOTES
        lessons = _read(path, prompts)
        params = SamplingParams(temperature=s.rollout_temperature, min_p=DRAWN_WITH["min_p"])
        with path.open("a", encoding="utf-8") as file:
            for start in range(len(lessons), len(prompts), BLOCK):
                block = range(start, min(start + BLOCK, len(prompts)))
                rollouts = draw_rollouts(
                    answerer.backend,
                    [prompts[place] for place in block],
                    s,
                    _STEP,
                    answerer.parallel,
                    places=block,
                    samples=s.samples,
                    params=params,
                    cancelled=cancelled,
                    progress=lambda done, start=start: progress(  # type: ignore[misc]
                        start * s.samples + done, len(prompts) * s.samples
                    ),
                )
                found = [
                    lesson_of(place, rollouts[i * s.samples : (i + 1) * s.samples])
                    for i, place in enumerate(block)
                ]
                file.write("".join(_line(lesson) for lesson in found))
                file.flush()
                os.fsync(file.fileno())
                lessons += found
        self._lessons = clear(lessons, s.margin)
        if not self._lessons:
            best = max((lesson.margin for lesson in lessons), default=0.0)
            raise EmlocalError(
                f"none of {counted(len(prompts), 'vote')} has a margin of {s.margin:g} or more;"
                f" the clearest has {best:.2f}",
                "use more prompts, or a smaller --margin",
            )
        return f"{len(self._lessons):,} of {counted(len(prompts), 'vote')} have a margin of {s.margin:g}"

    def taught(self, step: int) -> list[Rollout]:
        """Returns a step's texts.

        It cycles through the votes, clearest first; each cycle takes another winning text.
        """
        p, n = self.settings.prompts_per_step, len(self._lessons)
        places = range(step * p, (step + 1) * p)
        chosen = [(self._lessons[place % n].texts, place // n) for place in places]
        return [texts[turn % len(texts)] for texts, turn in chosen]

    def gradients(
        self, step: int, chosen: Sequence[int], rollouts: Sequence[Rollout], batches: MicroBatches
    ) -> Iterator[Gradient]:
        """See `loop.Method`. The gradient of −log π is the policy gradient of answers with advantage 1."""
        s = self.settings
        places = AnswerTokens(rollouts)
        weights = np.repeat(np.array(token_weights(rollouts, s.normalize), np.float32), places.lengths)

        def work(part: list[int]) -> tuple[int, float, float]:
            batch = [rollouts[i] for i in part]
            base = self.learner.score(batch, base=True) if s.measures_kl else None
            of_part = places.of(part)
            worth = np.ones(len(of_part), np.float32)
            reference = None if base is None else base.log_probs
            losses = TokenLosses(worth, weights[of_part], reference=reference)
            terms = self.learner.accumulate(batch, losses)
            return terms.tokens, terms.loss, terms.kl

        parts = [terms for _, terms in batches.run(step, rollouts, work)]
        tokens = sum(count for count, _, _ in parts)
        kl = sum(kl for _, _, kl in parts) / tokens
        yield Gradient(kl if s.measures_kl else None, {"loss": sum(loss for _, loss, _ in parts)})


def _line(lesson: Lesson) -> str:
    row = {
        "prompt": lesson.place,
        "margin": lesson.margin,
        "texts": [asdict(text) | {"prompt": None} for text in lesson.texts],
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def _read(path: Path, prompts: Sequence[Sequence[int]]) -> list[Lesson]:
    """Reads the stored votes; removes a torn last line from the file."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    if len(whole) < len(lines):
        path.write_bytes(b"".join(whole))
    try:
        rows = [parse_json(line.decode()) for line in whole]
        if [row["prompt"] for row in rows] != list(range(len(rows))) or len(rows) > len(prompts):
            raise ValueError("its prompts are not those of this run")
        return [
            Lesson(row["prompt"], row["margin"], [_rollout(text, prompts[i]) for text in row["texts"]])
            for i, row in enumerate(rows)
        ]
    except (KeyError, TypeError, ValueError) as why:
        raise UsageError(f"{path} cannot be read: {why}", "delete it, then resume again") from why


def _rollout(text: dict[str, Any], prompt: Sequence[int]) -> Rollout:
    return Rollout(**{**text, "prompt": tuple(prompt), "answer": tuple(text["answer"])})
