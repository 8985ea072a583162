"""Think-EM: entropy minimization over the steps of an answer, where EM-INF has it over tokens.

Of several ways to go on, the one of which the model is surest is kept, for the answer's first steps; from
there on it is greedy. After "Improving reasoning at inference time via uncertainty minimisation" (arXiv
2603.07159), which came without code: what a step is, and which ones lose, is emlocal's.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, ClassVar, Literal

from emlocal.em.scores import mean_log_probability
from emlocal.errors import CancelledError, ContextFullError, UsageError
from emlocal.methods.method import Answering, Method, Outcome
from emlocal.settings import SamplingParams, check_settings, setting
from emlocal.text import counted

if TYPE_CHECKING:
    from emlocal.generation import Completion, Handle
    from emlocal.methods.asking import Question

SHORTEST, LONGEST = 8, 64
"""Tokens of a step; one that ends the answer may be shorter."""
_CONTINUATIONS = 4  # where nobody says how many
_CHOICES = 1 << 20  # the round of draws that random choices come from
_END = re.compile(r"""(?:\n|(?:(?<!\d)\.|[!?。！？])["')\]*_”’»」』]*)[ \t]*\Z""")


def step_ends(text: str, tokens: int) -> bool:
    """Whether a step is complete: at a line break or the end of a sentence.

    A full stop after a digit may be a decimal point or a list's, and ends none.
    """
    return tokens >= LONGEST or (tokens >= SHORTEST and _END.search(text) is not None)


@dataclass(frozen=True)
class ThinkEM(Method):
    """`think-em:K` chooses among K ways to go on."""

    name: ClassVar[str] = "think-em"
    collects: ClassVar[bool] = True
    value: ClassVar[str] = "samples"
    sampling: ClassVar[Mapping[str, float]] = {
        "temperature": 0.8,
        "dynatemp_range": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.05,
    }

    steps: int = setting(
        4, "--think-steps", 1, 1000, "Steps that think-em chooses; then it is greedy.", name="think_steps"
    )
    score: Literal["entropy", "log-probability"] = setting(
        "entropy", "--think-score", help="How sure think-em takes a step to be.", name="think_score"
    )
    choice: Literal["surest", "random", "least-sure"] = setting(
        "surest", "--think-choice", help="Which step think-em keeps; the others test it.", name="think_choice"
    )

    def __post_init__(self) -> None:
        check_settings(self)

    def samples(self, asked: int | None) -> int:
        return asked or _CONTINUATIONS

    def answer(self, question: "Question") -> Answering:
        from emlocal.generation import joined

        greedy = replace(question.plan.params, temperature=0.0, dynatemp_range=0.0)
        parts: list[Completion] = []
        handles: list[Handle] = []
        steps = considered = changed = 0
        chooses = True
        why: Literal["context", "cancelled"] | None = None
        while not parts or parts[-1].finish_reason == "pause":
            after = [token for part in parts for token in part.tokens]
            chooses = chooses and steps < self.steps
            if chooses:
                job = question.job(round=steps, first=greedy, after=after, pause=step_ends)
            else:
                job = question.job(samples=range(1), params=greedy, after=after)
            try:
                [done] = yield [job]
            except (ContextFullError, CancelledError) as error:  # no more fits, or is wanted
                if not parts:
                    raise
                why = "cancelled" if isinstance(error, CancelledError) else "context"
                break
            handles.append(done)
            found = done.completions
            if done.was_cancelled:
                parts.append(found[0])  # greedy's beginning
                why = "cancelled"
                break
            if not chooses:
                parts.append(found[0])
                continue
            considered += sum(len(completion.tokens) for completion in found)
            if any(completion.finish_reason == "context" for completion in found):
                chooses = False  # where sequences share their room, there may be enough for one
                continue
            kept = self._chosen(question, found, parts)
            steps += 1
            changed += kept.tokens != found[0].tokens
            parts.append(kept)
        answer = joined(parts)
        if why is not None:
            answer.finish_reason = why
        fields = {"steps": steps, "changed_steps": changed, "considered_tokens": considered}
        return Outcome(handles, [answer], fields=fields)

    def _chosen(
        self, question: "Question", found: "Sequence[Completion]", parts: "Sequence[Completion]"
    ) -> "Completion":
        """One of these ways to go on; of equal ones the first, which is greedy's."""
        said = {_words(part) for part in parts} - {""}
        fine = [c for c in found if _words(c) not in said and (parts or c.finish_reason != "stop")]
        fine = fine or [*found]
        if self.choice == "random":
            u = question.uniforms(_CHOICES, 0)[len(parts)]
            return fine[int(u * len(fine))]
        best = max if self.choice == "surest" else min
        return best(fine, key=self._certainty)

    def _certainty(self, step: "Completion") -> float:
        """Mean over its tokens, the end token included: the greater, the surer."""
        if self.score == "entropy":
            return -fmean(draw.entropy_before for draw in step.draws)
        return mean_log_probability([draw.p_before for draw in step.draws])

    def describe(self, samples: int) -> list[str]:
        score = "" if self.choice == "random" else f" by {self.score}"
        which = {"surest": "the surest", "random": "one at random", "least-sure": "the least sure"}
        return [f"{counted(self.steps, 'step')}, {which[self.choice]} of {samples}{score}, then greedy"]

    def check(self, params: SamplingParams) -> None:
        if params.temperature == 0:
            raise UsageError("at temperature 0 all ways to go on are greedy's, and think-em cannot choose")


def _words(step: "Completion") -> str:
    """The text of a step, as far as it matters for whether it was said before."""
    return " ".join(step.text.split()).casefold()
