"""Evaluations on an engine without a model: the questions, the stored answers, and resuming."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from emlocal.backends.base import Feed
from emlocal.backends.fake import END, VOCABULARY, FakeBackend, hashed
from emlocal.batch.lines import canonical
from emlocal.batch.run import BatchSettings
from emlocal.errors import CancelledError, UsageError
from emlocal.evaluation import runner as run
from emlocal.evaluation.answering import Answer, Judge, Judged, takes_system
from emlocal.evaluation.contenders import describe, read_contenders
from emlocal.evaluation.report.document import answered_with
from emlocal.evaluation.results import compare, summarize
from emlocal.evaluation.tasks.mathematics import MathTask
from emlocal.evaluation.tasks.scicode import SciCodeTask
from emlocal.evaluation.tasks.task import Task
from emlocal.generation.scheduler import SPARE_SEQUENCES
from emlocal.sandbox import landlock
from emlocal.settings import Plan, SamplingParams
from tests.evaluation.data import SCICODE_ROW, rows

PARALLEL = 3
MADE_WITH = {"emlocal": "0", "commit": "a"}
QUESTIONS = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(1, 6)]


def math() -> Task:
    return MathTask("sums", rows(*QUESTIONS))


def knowing(answers: dict[str, str]) -> Callable[[Sequence[int]], NDArray[np.float32]]:
    """Returns a script that says the answer to the last of these questions in the prompt, and ends."""

    def script(tokens: Sequence[int]) -> NDArray[np.float32]:
        text = bytes(t for t in tokens if t < END).decode(errors="replace")
        prompt, _, said = text.rpartition("[assistant]")
        row = np.zeros(VOCABULARY, dtype=np.float32)
        known = max(answers, key=prompt.rfind)
        reply = answers[known].encode()
        done = len(said.encode())
        row[reply[done] if done < len(reply) else END] = 30
        return row

    return script


def backend(script: Any = hashed, **options: Any) -> FakeBackend:
    return FakeBackend(script, sequences=PARALLEL + SPARE_SEQUENCES, shared=False, **options)


def entries(
    methods: str, repetitions: int = 1, params: SamplingParams | None = None, seed: int = 0
) -> list[run.Entry]:
    made = []
    for contender in read_contenders(methods):
        base = Plan(params or SamplingParams(temperature=1.0), 40, (), seed, 1)
        plan = contender.plan(base, frozenset())
        identity: dict[str, object] = {"method": contender.name, "seed": seed}
        method = contender.method.collected()
        settings = BatchSettings(plan, method, entropies=True, fingerprint=canonical(identity))
        repeated = 1 if plan.params.temperature == 0 else repetitions
        made.append(run.Entry(contender.name, describe(contender, plan, base), settings, identity, repeated))
    return made


def answered(
    folder: Path, task: Task, methods: str, engine: FakeBackend | None = None, **more: Any
) -> dict[str, list[Answer]]:
    made = entries(methods, **{k: more.pop(k) for k in ("repetitions", "seed") if k in more})
    more = {"system": task.system, "parallel": PARALLEL, "made_with": MADE_WITH, **more}
    return run.answer(engine or backend(), task, made, folder, **more)


def judged(folder: Path, task: Task, methods: str, *args: Any, **more: Any) -> dict[str, list[Judged]]:
    return run.judge(task, answered(folder, task, methods, *args, **more), folder)


def texts(found: dict[str, list[Answer]]) -> dict[str, list[str]]:
    return {name: [answer.text for answer in given] for name, given in found.items()}


def _said(i: int, row: dict[str, str]) -> str:
    """Returns the right answer to the first three questions, and one too many for the others."""
    return f"It is \\boxed{{{int(row['answer']) + (i > 2)}}}."


HALF = {row["question"]: _said(i, row) for i, row in enumerate(QUESTIONS)}


def test_right_and_wrong_are_told_apart(tmp_path: Path) -> None:
    found = judged(tmp_path, math(), "greedy", backend(knowing(HALF)))
    assert [one.verdict.mark for one in found["greedy"]] == ["right"] * 3 + ["wrong"] * 2
    assert [one.verdict.answer for one in found["greedy"]] == ["2", "4", "6", "9", "11"]
    task = math()
    result = summarize(task, "greedy", "", found["greedy"], 1000, 0)
    assert result.accuracy.value == 0.6
    assert result.accuracy.low == pytest.approx(0.2307, abs=1e-3)  # Wilson, 3 of 5
    assert result.cost.written == pytest.approx((4 * 16 + 17) / 5)  # "It is \\boxed{2}." and a digit more
    assert result.cost.flops == pytest.approx(2 * 1000 * (result.cost.read + result.cost.written))
    assert (result.no_answer, result.guessed, result.cut_off, result.errors) == (0, 0, 0, 0)


def test_what_was_found_how_is_counted(tmp_path: Path) -> None:
    replies = ["\\boxed{2}", "It is 4.", "No idea.", "8" * 100, "\\boxed{10}"]
    script = knowing({row["question"]: reply for row, reply in zip(QUESTIONS, replies, strict=True)})
    found = judged(tmp_path, math(), "greedy", backend(script))["greedy"]
    assert [one.verdict.mark for one in found] == ["right", "right", "no answer", "wrong", "right"]
    result = summarize(math(), "greedy", "", found, 1, 0)
    assert (result.no_answer, result.guessed, result.cut_off, result.errors) == (1, 2, 1, 0)


def test_a_question_that_does_not_fit_is_an_error_and_wrong(tmp_path: Path) -> None:
    found = judged(tmp_path, math(), "greedy", backend(knowing(HALF), context=32))["greedy"]
    result = summarize(math(), "greedy", "", found, 1, 0)
    assert (result.errors, result.no_answer, result.accuracy.value) == (5, 0, 0.0)


def test_all_methods_share_their_draws(tmp_path: Path) -> None:
    found = texts(answered(tmp_path, math(), "sample,em-inf:em_steps=0,sample:temperature=1.0"))
    assert found["sample"] == found["em-inf:em_steps=0"] == found["sample:temperature=1.0"]
    voting = answered(tmp_path, math(), "self-consistency:3")["self-consistency:3"]
    assert [v.row["samples"][0]["text"] for v in voting] == found["sample"]
    assert texts(answered(tmp_path / "other", math(), "sample", seed=1)) != {"sample": found["sample"]}
    both = answered(tmp_path / "vote", math(), "greedy,vote:3:wave=3:temperature=1.0")
    (greedy, waves) = both.values()
    assert [v.row["samples"][0]["text"] for v in waves] == [g.text for g in greedy]
    assert {v.row["drawn"] for v in waves} == {3}


def test_repetitions_are_different_draws_and_greedy_has_one(tmp_path: Path) -> None:
    found = answered(tmp_path, math(), "greedy,sample", repetitions=4)
    assert [len(given) for given in found.values()] == [5, 20]
    of_first = [a.text for a in found["sample"] if a.problem.id == "1"]
    assert len(set(of_first)) == 4
    assert [a.repetition for a in found["sample"][:4]] == [1, 2, 3, 4]


def test_the_prompt_of_a_repetition_is_read_once(tmp_path: Path) -> None:
    once, often = backend(), backend()
    short = entries("sample:1")[0]
    for engine, repetitions, folder in ((once, 1, "a"), (often, 4, "b")):
        made = [replace(short, repetitions=repetitions)]
        run.answer(
            engine, math(), made, tmp_path / folder, system=None, parallel=PARALLEL, made_with=MADE_WITH
        )
    assert often.fed < 4 * once.fed


def test_answers_that_are_there_are_not_asked_for_again(tmp_path: Path) -> None:
    first = texts(answered(tmp_path, math(), "greedy,sample"))
    again = backend()
    assert texts(answered(tmp_path, math(), "greedy,sample", again)) == first
    assert again.fed == 0
    more = texts(answered(tmp_path, math(), "greedy,sample,em-inf"))
    assert {name: more[name] for name in first} == first


@pytest.mark.parametrize("after", [1, 4, 7])
def test_a_run_that_was_stopped_goes_on_to_the_same(tmp_path: Path, after: int) -> None:
    whole = texts(answered(tmp_path / "whole", math(), "sample,em-inf+self-consistency:2"))
    seen = 0

    def progress(what: str, done: int, total: int) -> None:
        nonlocal seen
        seen += done > 0

    methods = "sample,em-inf+self-consistency:2"
    with pytest.raises(CancelledError):
        answered(tmp_path / "cut", math(), methods, cancelled=lambda: seen >= after, progress=progress)
    assert texts(answered(tmp_path / "cut", math(), methods)) == whole


class Watched(FakeBackend):
    """Records which sequences were computed together."""

    def __init__(self) -> None:
        super().__init__(hashed, sequences=PARALLEL + SPARE_SEQUENCES, shared=False)
        self.passes: list[list[tuple[int, tuple[int, ...]]]] = []

    def forward(self, feeds: Sequence[Feed], cancelled: Callable[[], bool] = lambda: False) -> Any:
        self.passes.append([(self.length(feed.sequence), tuple(feed.tokens)) for feed in feeds])
        return super().forward(feeds, cancelled)


def test_a_run_that_was_stopped_computes_what_it_would_have(tmp_path: Path) -> None:
    many = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(50)]
    whole, cut, resumed = Watched(), Watched(), Watched()
    first = texts(answered(tmp_path / "whole", MathTask("sums", rows(*many)), "sample", whole))
    done = 0

    def progress(what: str, n: int, total: int) -> None:
        nonlocal done
        done = n

    task = MathTask("sums", rows(*many))
    with pytest.raises(CancelledError):
        answered(tmp_path / "cut", task, "sample", cut, cancelled=lambda: done >= 29, progress=progress)
    assert cut.passes == whole.passes[: len(cut.passes)]
    journal = tmp_path / "cut" / "answers" / "sample.jsonl"
    kept = journal.read_bytes()
    assert texts(answered(tmp_path / "cut", MathTask("sums", rows(*many)), "sample", resumed)) == first
    # The second block, of 18, was interrupted: it is computed again from its beginning, but the first is not.
    assert resumed.passes == whole.passes[-len(resumed.passes) :]
    assert 0.5 * len(whole.passes) < len(resumed.passes) < 0.8 * len(whole.passes)
    assert journal.read_bytes().startswith(kept)


def test_other_settings_do_not_go_on(tmp_path: Path) -> None:
    answered(tmp_path, math(), "sample")
    with pytest.raises(UsageError, match="was started with other settings: seed"):
        answered(tmp_path, math(), "sample", seed=5)
    assert len(answered(tmp_path, math(), "sample", seed=5, restart=True)["sample"]) == 5


def test_a_smaller_and_a_larger_limit_share_answers(tmp_path: Path) -> None:
    few = MathTask("sums", rows(*QUESTIONS[:2]))
    first = texts(answered(tmp_path, few, "sample"))["sample"]
    assert texts(answered(tmp_path, math(), "sample"))["sample"][:2] == first
    assert texts(answered(tmp_path, few, "sample"))["sample"] == first


def test_a_template_without_system_gets_it_with_the_question(tmp_path: Path) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    engine = backend()
    engine.info = replace(engine.info, chat_template=refusing + str(engine.info.chat_template))
    assert takes_system(engine) is False
    assert all(a.error is None for a in answered(tmp_path, math(), "greedy", engine)["greedy"])
    bare = backend()
    bare.info = replace(bare.info, chat_template=None)
    assert takes_system(bare) is None
    assert all(a.error is None for a in answered(tmp_path / "b", math(), "greedy", bare)["greedy"])


def test_a_restart_judges_anew(tmp_path: Path) -> None:
    task = math()
    given = answered(tmp_path, task, "greedy", backend(knowing(HALF)))
    right = [one.verdict.right for one in run.judge(task, given, tmp_path)["greedy"]]
    path = tmp_path / "verdicts.jsonl"
    path.write_text(path.read_text("utf-8").replace("true", "false"), "utf-8")
    assert not any(one.verdict.right for one in run.judge(task, given, tmp_path)["greedy"])
    assert [one.verdict.right for one in run.judge(task, given, tmp_path, restart=True)["greedy"]] == right


def test_what_is_there_besides_is_told(tmp_path: Path) -> None:
    answered(tmp_path, math(), "greedy,sample:1", backend(knowing(HALF)))
    assert run.others_in(tmp_path, entries("greedy,sample:1")) == []
    assert run.others_in(tmp_path, entries("greedy")) == ["sample_1"]


def test_what_answers_were_made_with_is_remembered(tmp_path: Path) -> None:
    engine, newer = backend(knowing(HALF)), {"emlocal": "1", "commit": "b"}
    answered(tmp_path, math(), "greedy", engine)
    answered(tmp_path, math(), "greedy", engine, made_with=newer)  # nothing is left to answer
    assert answered_with(tmp_path) == {"greedy": [MADE_WITH]}
    answered(tmp_path, math(), "greedy,sample:1", engine, made_with=newer)
    assert answered_with(tmp_path) == {"greedy": [MADE_WITH], "sample:1": [newer]}


def test_a_program_may_raise_what_is_no_text(tmp_path: Path) -> None:
    class Odd(MathTask):
        def check(self, problem: Any, found: str) -> tuple[bool, str]:
            return False, "half \ud800"

    task = Odd("sums", rows(*QUESTIONS))
    given = answered(tmp_path, task, "greedy", backend(knowing(HALF)))["greedy"]
    for _ in range(2):  # found, then read again
        with Judge(task, tmp_path / "verdicts.jsonl") as judge:
            assert {one.verdict.detail for one in judge.judge(given)} == {"half ?"}


def test_verdicts_are_kept_and_torn_ones_made_again(tmp_path: Path) -> None:
    class Counting(MathTask):
        checks = 0

        def check(self, problem: Any, found: str) -> tuple[bool, str]:
            Counting.checks += 1
            return super().check(problem, found)

    task = Counting("sums", rows(*QUESTIONS))
    given = answered(tmp_path, task, "greedy", backend(knowing(HALF)))["greedy"]

    def marks() -> list[str]:
        with Judge(task, tmp_path / "verdicts.jsonl") as judge:
            return [one.verdict.mark for one in judge.judge(given)]

    first = marks()
    assert Counting.checks == 5
    assert marks() == first
    assert Counting.checks == 5
    path = tmp_path / "verdicts.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert marks() == first
    assert Counting.checks == 6
    assert marks() == first  # the torn line got an end, and hides no other
    assert Counting.checks == 6


@pytest.mark.skipif(landlock.abi() < landlock.OLDEST_ABI, reason="needs Landlock (Linux 6.2)")
def test_steps_are_asked_with_what_was_answered(tmp_path: Path) -> None:
    task = SciCodeTask(rows(SCICODE_ROW))
    squares = "```python\ndef squares(x):\n    return [v * v for v in x]\n```"
    total = "```python\ndef total(x):\n    return sum(squares(x)), len(x)\n```"
    engine = backend(knowing({"'''Squares of x.'''": squares, "'''Their sum, and how many.'''": total}))
    made = [replace(e, settings=replace(e.settings, plan=replace(e.settings.plan, max_tokens=200)))
            for e in entries("greedy,sample", repetitions=2)]  # fmt: skip
    given = run.answer(
        engine, task, made, tmp_path, system=task.system, parallel=PARALLEL, made_with=MADE_WITH
    )
    found = run.judge(task, given, tmp_path)
    assert [one.verdict.mark for one in found["greedy"]] == ["right", "right"]
    assert given["greedy"][1].earlier == {"900.1": squares, "900.2": total}
    result = summarize(task, "greedy", "", found["greedy"], 1, 0)
    assert result.solved is not None
    assert (result.accuracy.value, result.solved.value) == (1.0, 1.0)
    again = backend(hashed)
    run.answer(again, task, made, tmp_path, system=task.system, parallel=PARALLEL, made_with=MADE_WITH)
    assert again.fed == 0


def test_wins_and_losses_are_counted_by_question(tmp_path: Path) -> None:
    task = math()
    right = {row["question"]: f"\\boxed{{{row['answer']}}}" for row in QUESTIONS}
    found = judged(tmp_path, task, "greedy", backend(knowing(HALF)))
    better = judged(tmp_path / "b", math(), "sample", backend(knowing(right)), repetitions=2)
    results = [
        summarize(task, "greedy", "", found["greedy"], 1, 0),
        summarize(task, "sample", "", better["sample"], 1, 0),
    ]
    (comparison,) = compare(task, results, 0)
    assert (comparison.name, comparison.reference) == ("sample", "greedy")
    assert (comparison.wins, comparison.losses, comparison.p) == (2, 0, 0.5)
    assert comparison.difference.value == pytest.approx(0.4)
    assert results[1].pass_at[2].value == 1
    assert results[0].pass_at == {}
