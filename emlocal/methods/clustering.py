"""Clusters of free texts that give the same answer, by their normalised text or by asking the model itself.

The model judges each pair in both orders. Two texts are one answer only if it says yes twice. (Semantic
entropy, arXiv 2302.09664, asks a second model for entailment both ways.) Experimental: docs/methods.md says
how often the bench models judge such pairs rightly.
"""

import re
import string
import unicodedata
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emlocal.generation import Handle, Job
    from emlocal.methods.asking import Question

LONGEST = 600
"""Maximum number of characters of a text that the model sees."""
MOST = 16
"""Maximum number of clusters that a new text is compared with; if it joins none, it starts one of its own."""
VERDICT = 4
"""Maximum number of tokens of the model's yes or no."""
_ROUND = 1  # round 0 has the votes' own draws
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Returns a text without case, punctuation, articles and spacing, as SQuAD compares short answers."""
    plain = unicodedata.normalize("NFKC", text).casefold().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def asked_about(question: str, a: str, b: str) -> str:
    """Returns the prompt about a pair of answers."""
    return (
        f"Question: {_shortened(question)}\n\nAnswer A: {_shortened(a)}\n\nAnswer B: {_shortened(b)}\n\n"
        "Do answer A and answer B say the same thing? Reply with yes or no."
    )


def is_yes(reply: str) -> bool:
    """Whether a reply begins with yes."""
    return reply.lstrip(" \n\t*\"'").lower().startswith("yes")


@dataclass
class Clusters:
    """The clusters so far of the answers to one question."""

    question: "Question"
    _of: dict[str, int] = field(default_factory=dict)  # normalised text → cluster
    _first: list[str] = field(default_factory=list)  # the first text of each cluster

    def key(self, text: str) -> int:
        """Returns the cluster of a text that was added."""
        return self._of[normalised(text)]

    def add(self, texts: Sequence[str]) -> "Generator[Sequence[Job], Sequence[Handle], list[Handle]]":
        """Sorts texts into clusters in one round of jobs. Returns the finished jobs.

        A text joins the first cluster that the model calls the same. The model is not asked about texts that
        `normalised` makes equal.
        """
        new = list({n: text for text in reversed(texts) if (n := normalised(text)) not in self._of}.values())
        new.reverse()
        known = self._first[:MOST]
        pairs = [(text, other) for i, text in enumerate(new) for other in [*known, *new[:i][:MOST]]]
        both = [each for a, b in pairs for each in ((a, b), (b, a))]
        done: Sequence[Handle] = []
        if both:
            done = yield [self._job(a, b) for a, b in both]
        said = [is_yes(handle.completions[0].text) if handle.completions else False for handle in done]
        same = {pair for pair, ab, ba in zip(pairs, said[::2], said[1::2], strict=True) if ab and ba}
        for text in new:
            cluster = next((i for i, first in enumerate(self._first) if (text, first) in same), None)
            if cluster is None:
                cluster = len(self._first)
                self._first.append(text)
            self._of[normalised(text)] = cluster
        return list(done)

    def _job(self, a: str, b: str) -> "Job":
        question, asked = self.question, self.question.asked
        said = asked if isinstance(asked, str) else asked[-1]["content"]
        about = asked_about(said, a, b)
        pair = replace(
            question,
            asked=about + "\n\nReply:" if isinstance(asked, str) else [{"role": "user", "content": about}],
            session=None,
        )
        return pair.job(_ROUND, samples=range(1), params=question.greedy, max_tokens=VERDICT, free=True)


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"
