"""The method vote: the greedy answer first, then samples in waves until it is clear which answer wins."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from emlocal.errors import CancelledError, UsageError
from emlocal.methods.clustering import Clusters, normalised
from emlocal.methods.method import Answering, Outcome
from emlocal.methods.self_consistency import SelfConsistency, shortened, without_answers
from emlocal.methods.voting import (
    Ballot,
    Decision,
    Rules,
    Score,
    Stopped,
    decide,
    is_whole,
    over,
    repeated,
    waves,
)
from emlocal.settings import SamplingParams, check_settings, setting
from emlocal.text import counted

if TYPE_CHECKING:
    from emlocal.em.scores import Scores
    from emlocal.generation import Completion, Handle
    from emlocal.methods.asking import Question

DRAWN_WITH: Mapping[str, float] = {"temperature": 0.7, "min_p": 0.05}
"""Default sampling settings of the samples beside the greedy one."""
Cluster = Literal["meaning", "text", "model"]
SCORE: Score = "tail-entropy"
BETA = 0.5
SCORE_HELP = (
    "Rank samples by this score (vote, em-best). (default: tail-entropy for vote, mean-entropy for em-best)"
)
_SAMPLES = 8  # default number of samples


@dataclass(frozen=True)
class Vote(SelfConsistency):
    """`vote:N` lets up to N answers vote: the greedy one, and samples while they can change the result."""

    name: ClassVar[str] = "vote"
    sampling: ClassVar[Mapping[str, float]] = DRAWN_WITH

    cluster: Cluster = setting(
        "meaning",
        "--cluster",
        help="Count answers as the same by meaning (numbers, formulas), by text (free text), or by asking the"
        " model (experimental).",
    )
    score: Score | None = setting(None, "--score", help=SCORE_HELP)
    beta: float | None = setting(
        None,
        "--vote-beta",
        0,
        100,
        "Weigh the most certain samples of a vote by up to e^X (0 = equally). (default: 0.5)",
    )
    alpha: float | None = setting(
        None,
        "--vote-alpha",
        1,
        100,
        "Weigh the samples of a vote by their probability to the power X - 1 (1 = equally).",
    )
    wave: int = setting(4, "--wave", 1, 1024, "Draw a vote's samples in waves of this size.")
    sure: float = setting(
        0.95,
        "--vote-sure",
        0.5,
        1,
        "Stop a vote once its leader is this likely to win (1 = certain).",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self)
        if self.alpha is not None and self.beta is not None:
            raise UsageError(
                "--vote-alpha and --vote-beta contradict each other: both set the weights",
                "leave one of them out",
            )

    def params(self, given: SamplingParams, chosen: frozenset[str] = frozenset()) -> SamplingParams:
        params = super().params(given, chosen)
        self.check(params)
        return params

    def samples(self, asked: int | None) -> int:
        if asked == 1:
            raise UsageError("--samples is 1; vote needs at least 2", "set a larger --samples")
        return asked or _SAMPLES

    @property
    def rules(self) -> Rules:
        """The rules for counting and stopping."""
        beta = BETA if self.beta is None else self.beta
        return Rules(self.score or SCORE, beta, self.alpha, self.wave, self.sure)

    def answer(self, question: "Question") -> Answering:
        rules, n = self.rules, question.plan.samples
        jobs: list[Handle] = []
        completions: list[Completion] = []
        ballots: list[Ballot] = []
        clusters = Clusters(question)
        for wave in waves(n, rules.wave):
            try:
                # A single job, with greedy decoding as sample 0 of the first one, reads the prompt only once.
                first = question.greedy if wave.start == 0 else None
                [done] = yield [question.job(samples=wave, first=first)]
                jobs.append(done)
                completions += done.completions
                cast = [ballot for c in done.completions if (ballot := self.ballot(c)) is not None]
                if self.cluster == "model":
                    jobs += yield from clusters.add(
                        [ballot.answer for ballot in cast if ballot.key is not None]
                    )
                    cast = [
                        ballot if ballot.key is None else replace(ballot, key=clusters.key(ballot.answer))
                        for ballot in cast
                    ]
            except CancelledError:
                if not jobs:
                    raise
                stopped: Stopped | None = "cancelled"
                break
            ballots += cast
            stopped = "cancelled" if done.was_cancelled else over(ballots, n - wave.stop, rules)
            if stopped is not None:
                break
        assert stopped is not None  # `over` always stops after the last wave
        decision = decide(ballots, rules)
        return Outcome(
            jobs,
            completions,
            0 if decision.winner is None else decision.winner.sample,
            fields_of(decision, stopped),
            confidence=decision.confidence,
            undecided=decision.winner is None,
            said=said_of(
                decision,
                n if stopped in ("decided", "sure") else decision.drawn,
                "" if decision.winner is None else self._read_as(completions[decision.winner.sample].text),
            ),
        )

    def ballot(self, completion: "Completion") -> Ballot | None:
        """Returns a sample's ballot; None if it was cancelled before it gave an answer."""
        from emlocal.methods.scoring import scores_of

        repeats, found = repeated(completion.tokens), scores_of(completion)
        return self.ballot_of(completion.sample, completion.text, completion.finish_reason, repeats, found)

    def ballot_of(
        self, sample: int, text: str, finish_reason: str, repeats: float, scores: "Scores | None"
    ) -> Ballot | None:
        """Returns the ballot of a stored answer. `repeats`: see `voting.repeated`."""
        from emlocal.answers.finding import extract  # imported late: it compiles many patterns
        from emlocal.answers.meaning import canonical

        whole = is_whole(finish_reason, repeats)
        reads_boxes = self.extraction == "boxed" or (self.extraction is None and self.cluster == "meaning")
        boxed = reads_boxes and extract(text, "boxed") is not None  # the box came before the text was cut off
        answer = self._found(text) if whole or boxed else None
        if answer is None:
            return None if finish_reason == "cancelled" else Ballot(sample, whole=whole)
        key = canonical(answer) if self.cluster == "meaning" else normalised(answer)
        return Ballot(sample, key, answer, scores, whole) if key else Ballot(sample, whole=whole)

    def _read_as(self, text: str) -> str:
        return super()._read_as(text) if self.cluster == "meaning" else ""

    def _found(self, text: str) -> str | None:
        if self.cluster != "meaning" and self.extraction is None:
            return text.strip() or None  # the whole text
        return super()._found(text)

    def describe(self, samples: int) -> list[str]:
        rules = self.rules
        if rules.alpha is not None:
            weighed = f"weighed by p^{rules.alpha - 1:g}"
        else:
            weighed = "all alike" if rules.plain else f"weighed by {rules.score} (β {rules.beta:g})"
        drawn = f"vote of greedy and up to {counted(samples - 1, 'sample')} in waves of {rules.wave}"
        compared = {"meaning": [], "text": ["compared by text"], "model": ["compared by the model"]}
        return [drawn, weighed, *compared[self.cluster], f"sure at {rules.sure:g}"]


def fields_of(decision: Decision, stopped: Stopped) -> dict[str, Any]:
    """Returns the fields of an output row; shares and nats have six decimals."""
    winner, entropy = decision.winner, decision.entropy
    return {
        "answer": None if winner is None else winner.answer,
        "votes": decision.votes,
        "drawn": decision.drawn,
        "agreement": round(decision.agreement, 6),
        "answers": decision.answers,
        "semantic_entropy": None if entropy is None else round(entropy, 6),
        "stopped": stopped,
    }


def said_of(decision: Decision, samples: int, read_as: str) -> Sequence[str]:
    """Returns remarks for people.

    `samples`: the number that could have been drawn; `read_as`: how the answer was found.
    """
    if decision.winner is None:
        return [without_answers(decision.drawn)]
    said = [f"answer {shortened(decision.winner.answer)}{read_as}"]
    said.append(f"{decision.votes} of {decision.drawn} agree")
    if decision.answers > 1:
        said.append(f"{decision.answers} different answers")
    if samples > decision.drawn:
        said.append(f"{counted(samples - decision.drawn, 'more sample')} not needed")
    return said
