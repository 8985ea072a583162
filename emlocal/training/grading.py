"""What an answer comes to, whether it is right, and the share of right ones before and after a run.

Accuracy is for information only: nothing is decided by it.
"""

import hashlib
import json
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emlocal.errors import UsageError
from emlocal.files import atomic_writer
from emlocal.methods.extraction import canonical, extract, find_answer
from emlocal.text import parse_json
from emlocal.training.prompts import Prompt
from emlocal.training.rollouts import draw_rollouts

if TYPE_CHECKING:
    from emlocal.training.engines import Engines

Counted = Callable[[int, int], None]
"""Takes how many are done, and of how many."""
_STEP = 2**31  # of no training step: the draws are the validation's own


def answer_of(text: str) -> Hashable | None:
    """A key that texts with equivalent answers share; None where there is none (`find_answer`)."""
    found = find_answer(text)
    return None if found is None else canonical(found[0])


def label_of(text: str) -> Hashable | None:
    """The same of a label: of a sentence, such as GSM8K's, as of an answer; else it is one by itself."""
    text = text.strip()
    found = extract(text, "boxed")
    if found is None:  # a sentence ends with its number; \\frac{1}{2} is one by itself
        found = extract(text, "last-number") if " " in text or "\n" in text else None
    return canonical(found or text)


def is_right(text: str, label: str) -> bool:
    """Whether the answer in a text is the label's."""
    found = answer_of(text)
    return found is not None and found == label_of(label)


def check_answers(prompts: Sequence[Prompt], asked_by: str) -> None:
    """Raise UsageError for a prompt without an answer to compare with."""
    for prompt in prompts:
        if prompt.answer is None or not prompt.answer.strip():
            raise UsageError(
                f"{prompt.where}: no answer to compare with", f'{asked_by} needs "answer" in each line'
            )


class Validation:
    """Accuracy before and after a run, kept in OUT/validation.json: a run that is resumed knows both."""

    def __init__(
        self, engines: "Engines[Any]", prompts: Sequence[Prompt], system: str | None, folder: Path
    ) -> None:
        """Raises ContextFullError where no prompt leaves room for an answer."""
        self._engines = engines
        self._examples = engines.encoded(prompts, system) if prompts else []
        self._path = folder / "validation.json"
        asked = json.dumps([[tokens, prompt.answer] for prompt, tokens in self._examples])
        self._digest = hashlib.sha256(asked.encode()).hexdigest()

    def before(self, cancelled: Callable[[], bool], progress: Counted) -> float | None:
        """Of the model as it is before the first step; measured unless it is known. None: not asked for."""
        if not self._examples:
            return None
        known = self._read()
        if known is None:
            known = self._accuracy(cancelled, progress)
            self._write({"before": known})
        return known

    def after(self, before: float, cancelled: Callable[[], bool], progress: Counted) -> float:
        """Of the adapter that the engines have now."""
        accuracy = self._accuracy(cancelled, progress)
        self._write({"before": before, "after": accuracy})
        return accuracy

    def _accuracy(self, cancelled: Callable[[], bool], progress: Counted) -> float:
        """The share of prompts answered rightly, one answer each at the rollouts' temperature.

        The answer is what the last \\boxed holds, else the last number; before and after share their draws.
        """
        engines = self._engines
        tokens = [tokens for _, tokens in self._examples]
        progress(0, len(tokens))
        rollouts = draw_rollouts(
            engines.answerer.backend,
            tokens,
            engines.settings,
            _STEP,
            engines.answerer.parallel,
            cancelled=cancelled,
            progress=lambda done: progress(done, len(tokens)),
        )
        pairs = zip(self._examples, rollouts, strict=True)
        return sum(is_right(rollout.text, prompt.answer or "") for (prompt, _), rollout in pairs) / len(
            tokens
        )

    def _read(self) -> float | None:
        """What was measured before, of these very prompts."""
        try:
            held = parse_json(self._path.read_text(encoding="utf-8"))
            return float(held["before"]) if held["sha256"] == self._digest else None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # to be measured, then

    def _write(self, accuracies: dict[str, float]) -> None:
        with atomic_writer(self._path) as file:
            json.dump({**accuracies, "prompts": len(self._examples), "sha256": self._digest}, file)
