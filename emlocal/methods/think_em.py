"""Think-EM: entropy minimization over the steps of an answer, where EM-INF minimises over tokens.

For the first steps of an answer it draws several continuations and keeps the one that the model is most
certain of. After that it is greedy. It follows "Improving reasoning at inference time via uncertainty
minimisation" (arXiv 2603.07159), which has no published code. The definition of a step, and the rules for
dropping steps, are emlocal's.
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
"""Minimum and maximum number of tokens of a step; one that ends the answer may be shorter."""
_CONTINUATIONS = 4  # default number of continuations
_CHOICES = 1 << 20  # the round whose draws decide random choices
_END = re.compile(r"""(?:\n|(?:(?<!\d)\.|[!?。！？])["')\]*_”’»」』]*)[ \t]*\Z""")


def step_ends(text: str, tokens: int) -> bool:
    """Whether a step is complete: at a line break or the end of a sentence.

    A full stop after a digit does not count, since it may be a decimal point or belong to a list.
    """
    return tokens >= LONGEST or (tokens >= SHORTEST and _END.search(text) is not None)


@dataclass(frozen=True)
class ThinkEM(Method):
    """`think-em:K` chooses among K continuations."""

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
        4,
        "--think-steps",
        1,
        1000,
        "Choose this many steps, then decode greedily (think-em).",
        name="think_steps",
    )
    score: Literal["entropy", "log-probability"] = setting(
        "entropy", "--think-score", help="Judge each step by this score (think-em).", name="think_score"
    )
    choice: Literal["surest", "random", "least-sure"] = setting(
        "surest",
        "--think-choice",
        help="Keep this step; all but the default are controls (think-em).",
        name="think_choice",
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
            except (ContextFullError, CancelledError) as error:  # the context is full, or the user cancelled
                if not parts:
                    raise
                why = "cancelled" if isinstance(error, CancelledError) else "context"
                break
            handles.append(done)
            found = done.completions
            if done.was_cancelled:
                parts.append(found[0])  # the beginning of the greedy continuation
                why = "cancelled"
                break
            if not chooses:
                parts.append(found[0])
                continue
            considered += sum(len(completion.tokens) for completion in found)
            if any(completion.finish_reason == "context" for completion in found):
                chooses = False  # where sequences share the context, there may be enough for one
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
        """Chooses a continuation; of equal ones the first, which is the greedy one."""
        said = {_words(part) for part in parts} - {""}
        fine = [c for c in found if _words(c) not in said and (parts or c.finish_reason != "stop")]
        fine = fine or [*found]
        if self.choice == "random":
            u = question.uniforms(_CHOICES, 0)[len(parts)]
            return fine[int(u * len(fine))]
        best = max if self.choice == "surest" else min
        return best(fine, key=self._certainty)

    def _certainty(self, step: "Completion") -> float:
        """Returns the mean over a step's tokens, including the end token; greater means more certain."""
        if self.score == "entropy":
            return -fmean(draw.entropy_before for draw in step.draws)
        return mean_log_probability([draw.p_before for draw in step.draws])

    def describe(self, samples: int) -> list[str]:
        score = "" if self.choice == "random" else f" by {self.score}"
        which = {"surest": "the most certain", "random": "a random one", "least-sure": "the least certain"}
        return [f"{counted(self.steps, 'step')}, {which[self.choice]} of {samples}{score}, then greedy"]

    def check(self, params: SamplingParams) -> None:
        if params.temperature == 0:
            raise UsageError("at temperature 0 all steps are alike, so think-em cannot choose")


def _words(step: "Completion") -> str:
    """Returns a step's text without case and spacing, to recognise one that was said before."""
    return " ".join(step.text.split()).casefold()
