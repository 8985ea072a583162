"""A vote: the greedy answer first, then samples in waves, until it is clear what most of them come to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from emlocal.errors import CancelledError, UsageError
from emlocal.methods.method import Answering, Outcome
from emlocal.methods.self_consistency import SelfConsistency
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
"""The samples beside greedy's, where nobody says otherwise."""
SCORE: Score = "tail-entropy"
BETA = 1.0
SCORE_HELP = (
    "Rank the samples of vote and em-best by this score."
    " (default: tail-entropy for vote, mean-entropy for em-best)"
)
_SAMPLES = 8  # where nobody says how many
_LONGEST = 40  # characters of an answer in a line for people


@dataclass(frozen=True)
class Vote(SelfConsistency):
    """`vote:N` has N answers vote: greedy's, and samples for as long as they can change something."""

    name: ClassVar[str] = "vote"
    sampling: ClassVar[Mapping[str, float]] = DRAWN_WITH

    score: Score | None = setting(None, "--score", help=SCORE_HELP)
    beta: float | None = setting(
        None,
        "--vote-beta",
        0,
        100,
        "Weigh the surer samples of a vote by up to e^X (0 = all alike). (default: 1)",
    )
    alpha: float | None = setting(
        None,
        "--vote-alpha",
        1,
        100,
        "Weigh samples by the probability of their text to the power X - 1 instead (1 = all alike).",
    )
    wave: int = setting(4, "--wave", 1, 1024, "Draw the samples of a vote in waves of this size.")
    sure: float = setting(
        0.95,
        "--vote-sure",
        0.5,
        1,
        "Stop a vote when its leader is ahead with more than this probability (1 = when none can catch it).",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self)
        if self.alpha is not None and self.beta is not None:
            raise UsageError("--vote-alpha and --vote-beta contradict each other: each sets the weights")

    def params(self, given: SamplingParams, chosen: frozenset[str] = frozenset()) -> SamplingParams:
        params = super().params(given, chosen)
        self.check(params)
        return params

    def samples(self, asked: int | None) -> int:
        if asked == 1:
            raise UsageError("--samples is 1; vote needs at least 2")
        return asked or _SAMPLES

    @property
    def rules(self) -> Rules:
        """How it is counted, and when it stops."""
        beta = BETA if self.beta is None else self.beta
        return Rules(self.score or SCORE, beta, self.alpha, self.wave, self.sure)

    def answer(self, question: "Question") -> Answering:
        rules, n = self.rules, question.plan.samples
        jobs: list[Handle] = []
        completions: list[Completion] = []
        ballots: list[Ballot] = []
        for wave in waves(n, rules.wave):
            try:
                # one job, greedy's sample 0 in the first of them: its prompt is read once
                first = question.greedy if wave.start == 0 else None
                [done] = yield [question.job(samples=wave, first=first)]
            except CancelledError:
                if not jobs:
                    raise
                stopped: Stopped | None = "cancelled"
                break
            jobs.append(done)
            completions += done.completions
            ballots += [ballot for c in done.completions if (ballot := self.ballot(c)) is not None]
            stopped = "cancelled" if done.was_cancelled else over(ballots, n - wave.stop, rules)
            if stopped is not None:
                break
        assert stopped is not None  # once all are drawn
        decision = decide(ballots, rules)
        return Outcome(
            jobs,
            completions,
            0 if decision.winner is None else decision.winner.sample,
            fields_of(decision, stopped),
            confidence=decision.confidence,
            undecided=decision.winner is None,
            said=said_of(decision, n if stopped in ("decided", "sure") else decision.drawn),
        )

    def ballot(self, completion: "Completion") -> Ballot | None:
        """What a sample has to say; None where it was stopped before it had."""
        from emlocal.methods.scoring import scores_of

        repeats, found = repeated(completion.tokens), scores_of(completion)
        return self.ballot_of(completion.sample, completion.text, completion.finish_reason, repeats, found)

    def ballot_of(
        self, sample: int, text: str, finish_reason: str, repeats: float, scores: "Scores | None"
    ) -> Ballot | None:
        """The same of a stored answer. `repeats`: see `voting.repeated`."""
        from emlocal.answers.finding import extract  # many patterns, compiled on import
        from emlocal.answers.meaning import canonical

        whole = is_whole(finish_reason, repeats)
        answer = self._found(text) if whole or extract(text, "boxed") is not None else None
        if answer is None:
            return None if finish_reason == "cancelled" else Ballot(sample, whole=whole)
        return Ballot(sample, canonical(answer), answer, scores, whole)

    def describe(self, samples: int) -> list[str]:
        rules = self.rules
        if rules.alpha is not None:
            weighed = f"weighed by p^{rules.alpha - 1:g}"
        else:
            weighed = "all alike" if rules.plain else f"weighed by {rules.score} (β {rules.beta:g})"
        drawn = f"vote of greedy and up to {counted(samples - 1, 'sample')} in waves of {rules.wave}"
        return [drawn, weighed, f"sure at {rules.sure:g}"]


def fields_of(decision: Decision, stopped: Stopped) -> dict[str, Any]:
    """For output rows; shares and nats to six places."""
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


def said_of(decision: Decision, samples: int) -> Sequence[str]:
    """The same for people. `samples`: how many there could have been."""
    if decision.winner is None:
        return [f"none of {decision.drawn} has an answer to vote on"]
    said = [f"answer {_shortened(decision.winner.answer)}", f"{decision.votes} of {decision.drawn} agree"]
    if decision.answers > 1:
        said.append(f"{decision.answers} different answers")
    if samples > decision.drawn:
        said.append(f"{counted(samples - decision.drawn, 'more sample')} not needed")
    return said


def _shortened(answer: str) -> str:
    line = " ".join(answer.split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"
