"""Behaviour vote: runs several programs on inputs that the model writes; the largest group that agrees wins.

Programs with equal results form a cluster, whatever their text (SemanticVote, arXiv 2605.08680; FMV,
2604.15618). Examples in the prompt may rule programs out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from emlocal.em.scores import mean_log_probability
from emlocal.errors import CancelledError, ContextFullError, EmlocalError, UsageError
from emlocal.methods.method import Answering, Method, Outcome
from emlocal.settings import SamplingParams, setting
from emlocal.text import counted

if TYPE_CHECKING:
    from emlocal.generation import Completion, Handle, Job
    from emlocal.methods.asking import Question

_SAMPLES = 8  # default number of samples
INPUTS = 8
"""Maximum number of inputs that the model writes."""
_EXAMPLES = 8  # maximum number of the prompt's examples that are used
_INPUT_TOKENS = 400
SECONDS_A_CALL, SECONDS_A_PROGRAM = 0.5, 4.0
"""Processor time in seconds. On the clock, a program may take twice its own time and 5 s more."""
MEMORY = 1 << 30
"""Bytes of address space of a program."""
ASK_INPUTS = (
    "Write a Python list `inputs` of {most} different tuples of arguments to test `{signature}` with, one"
    " tuple a line. Do not write the results."
)
_SUCH_AS = " A tuple looks like {example}, but write others."


@dataclass(frozen=True)
class BehaviourVote(Method):
    """`behaviour-vote:N` runs N programs; it needs the user's permission to run code."""

    name: ClassVar[str] = "behaviour-vote"
    collects: ClassVar[bool] = True
    runs_code: ClassVar[bool] = True
    value: ClassVar[str] = "samples"
    sampling: ClassVar[Mapping[str, float]] = {"temperature": 0.8, "min_p": 0.05}

    allow_code: bool = setting(
        False,
        "--allow-code",
        help="Allow programs that the model writes to run, in a sandbox (behaviour-vote).",
    )
    use_examples: bool = setting(
        True,
        "--use-examples/--no-use-examples",
        help="Exclude programs that contradict the prompt's examples (behaviour-vote).",
    )

    def samples(self, asked: int | None) -> int:
        if asked == 1:
            raise UsageError(
                "--samples is 1; behaviour-vote needs at least 2 programs", "set a larger --samples"
            )
        return asked or _SAMPLES

    def check_leave(self) -> None:
        if not self.allow_code:
            raise UsageError(
                f"{self.name} runs code that the model writes",
                "add --allow-code (in Python allow_code=True); docs/evaluation.md says how it is contained",
            )
        from emlocal.sandbox.run import check_containment

        check_containment()

    def check(self, params: SamplingParams) -> None:
        if params.temperature == 0:
            raise UsageError("greedy samples are all alike and cannot vote")

    def describe(self, samples: int) -> list[str]:
        without = "" if self.use_examples else ", whatever the examples say"
        return [f"the most alike in behaviour of {samples}, one of them greedy{without}"]

    def answer(self, question: "Question") -> Answering:
        from emlocal.answers.programs import code_of
        from emlocal.methods.programs import Example, asked_for, joined, printed, written

        inputs: Sequence[Handle] = ()
        [drawn] = yield [question.job(first=question.greedy)]
        completions = drawn.completions
        prompt = _said_last(question)
        function = asked_for(prompt, [completion.text for completion in completions])
        if function is None or drawn.was_cancelled:
            return _undecided([drawn], 0)
        found = [code_of(completion.text, f"def {function.name}") for completion in completions]
        programs = {i: joined(function.head, code) for i, code in enumerate(found) if code is not None}
        if len(set(programs.values())) < 2:  # there is nothing to choose
            index = 0 if 0 in programs or not programs else min(programs)
            decided = Decision(index, len(programs), min(1, len(programs)), 0, 0, undecided=not programs)
        else:
            examples = {repr(each.arguments): each for each in printed(prompt, function.name)[:_EXAMPLES]}
            try:
                such_as = next(iter(examples), None)
                inputs = yield [_ask_inputs(question, completions[0].text, function.signature, such_as)]
            except (ContextFullError, _NoQuestionError):
                pass  # the examples alone must do
            except CancelledError:
                return _undecided([drawn], len(programs))
            if any(handle.was_cancelled for handle in inputs):  # nobody waits for programs any more
                return _undecided([drawn, *inputs], len(programs))
            for completion in (completion for handle in inputs for completion in handle.completions):
                for arguments in written(completion.text, function, INPUTS):
                    examples.setdefault(repr(arguments), Example(arguments))
            results = _run(programs, function.name, [*examples])
            expected = [each.expected if self.use_examples else None for each in examples.values()]
            decided = decide(results, expected, [_certainty(completion) for completion in completions])
        return Outcome(
            [drawn, *inputs],
            completions,
            decided.index,
            decided.fields(len(programs)),
            confidence=None if decided.undecided else decided.cluster / len(completions),
            undecided=decided.undecided,
            said=decided.said(len(programs)),
        )


@dataclass(frozen=True)
class Decision:
    """The result of a vote."""

    index: int
    """The sample that is the answer."""
    cluster: int
    """Number of programs with the same behaviour as the answer, itself included."""
    behaviours: int
    """Number of different behaviours among the programs that were not ruled out."""
    inputs: int
    """Number of inputs on which at least one program returned something; the others are ignored."""
    ruled_out: int
    """Number of programs that met fewer of the expected results than others did."""
    undecided: bool = False

    def fields(self, programs: int) -> Mapping[str, int]:
        """Returns the fields of an output row. `programs`: the number of answers with a program."""
        return {
            "programs": programs,
            "cluster": self.cluster,
            "behaviours": self.behaviours,
            "inputs": self.inputs,
            "ruled_out": self.ruled_out,
        }

    def said(self, programs: int) -> list[str]:
        """Returns remarks for people."""
        if self.undecided:
            return ["there are no programs to choose from, or no inputs to test them with"]
        did = f"agree on {counted(self.inputs, 'input')}" if self.inputs else "are the same text"
        out = f"{self.ruled_out} contradict the prompt's examples"
        return [f"{self.cluster} of {counted(programs, 'program')} {did}", *([out] if self.ruled_out else [])]


def decide(
    results: Mapping[int, Sequence[str]],
    expected: Sequence[tuple[object] | None],
    certainty: Sequence[float],
) -> Decision:
    """Decides the vote of programs.

    Args:
        results: for each sample with a program, its result on each input, as the sandbox reports it.
        expected: for each input, the expected value in a tuple, or None if unknown.
        certainty: of each sample; greater means that the model was more certain. Sample 0 is the greedy one.
    """
    returning = [i for i in range(len(expected)) if any(_returns(each[i]) for each in results.values())]
    wrong = {
        sample: sum(_contradicts(each[i], expected[i]) for i in returning) for sample, each in results.items()
    }
    least = min(wrong.values(), default=0)
    left = [sample for sample in sorted(results) if wrong[sample] == least]
    clusters: dict[tuple[str, ...], list[int]] = {}
    for sample in left:
        signature = tuple(results[sample][i] for i in returning)
        if any(map(_returns, signature)):  # a program that fails everywhere is right about nothing
            clusters.setdefault(signature, []).append(sample)
    undecided = not clusters
    best = max(
        clusters.values(),
        key=lambda samples: (len(samples), 0 in samples, max(certainty[sample] for sample in samples)),
        default=sorted(results),
    )
    index = 0 if 0 in best or not best else max(best, key=lambda sample: certainty[sample])
    ruled_out = len(results) - len(left)
    return Decision(index, 0 if undecided else len(best), len(clusters), len(returning), ruled_out, undecided)


_NONE = Decision(0, 0, 0, 0, 0, undecided=True)


def _undecided(jobs: "Sequence[Handle]", programs: int) -> Outcome:
    """Returns the greedy answer, from the first of these jobs."""
    fields, said = _NONE.fields(programs), _NONE.said(programs)
    return Outcome(jobs, jobs[0].completions, fields=fields, undecided=True, said=said)


def _returns(result: str) -> bool:
    return result.startswith("returns ")


def _contradicts(result: str, expected: tuple[object] | None) -> bool:
    """Whether a result differs from the prompt's example. A float must be right to the printed decimals."""
    from emlocal.sandbox.canonical import canonical, shortened

    if expected is None:
        return False
    wanted, said = expected[0], result.removeprefix("returns ")
    if not _returns(result):
        return True
    if isinstance(wanted, float) and (places := _places(wanted)) is not None:
        try:
            return abs(float(said) - wanted) > 0.5001 * 10.0**-places
        except ValueError:
            return True
    return said != shortened(canonical(wanted))


def _places(value: float) -> int | None:
    """Returns the decimals of a float with at least two; None for other floats, which must be exact."""
    places = len(repr(value).partition(".")[2])
    return places if places >= 2 and "e" not in repr(value) else None


def _certainty(completion: "Completion") -> float:
    """Returns the mean log-probability of the tokens, in nats."""
    if not completion.draws:
        return -math.inf
    return mean_log_probability([draw.p_before for draw in completion.draws])


def _said_last(question: "Question") -> str:
    """Returns the person's last message."""
    asked = question.asked
    from emlocal.generation.dialogue import text_of

    return asked if isinstance(asked, str) else text_of(asked[-1])


class _NoQuestionError(EmlocalError):
    """The model cannot be asked for inputs."""


def _ask_inputs(question: "Question", answer: str, signature: str, such_as: str | None) -> "Job":
    """Returns the job that asks for inputs; `such_as`: an example from the prompt.

    Raises _NoQuestionError if the template refuses a longer conversation.
    """
    said = ASK_INPUTS.format(most=INPUTS, signature=signature)
    if such_as is not None:
        said += _SUCH_AS.format(example=such_as)
    try:
        job = question.then(answer, said).job(
            1, samples=range(1), params=question.greedy, max_tokens=_INPUT_TOKENS, free=True
        )
    except EmlocalError as why:
        raise _NoQuestionError(why.message) from why
    return job


def _run(programs: Mapping[int, str], name: str, inputs: Sequence[str]) -> dict[int, list[str]]:
    """Returns the results of each program on each input. Equal programs run only once."""
    from emlocal.sandbox.run import Calls, Limits, results

    if not inputs:
        return {sample: [] for sample in programs}
    calls, limits = Calls(name, inputs, SECONDS_A_CALL), Limits(SECONDS_A_PROGRAM, MEMORY)
    found = {program: results(program, calls, limits) for program in dict.fromkeys(programs.values())}
    return {sample: found[program] for sample, program in programs.items()}
