"""Draws a pool of answers to a task's questions: one greedy, the others sampled, with all their scores.

A pool is enough to compute votes, confidences and best-of-N of any kind without asking the model again. The
draws depend only on the seed, the question and the sample. So a vote of fewer samples, or one that stopped
early, is a beginning of the pool's (benchmarks/pool_table.py).

A question's row is on disk as soon as all its samples are there. A killed run resumes with the questions that
have no row. To resume elsewhere, unpack the committed file (xz -dk docs/results/pools/NAME.jsonl.xz) and run
the same command.

    python benchmarks/pool.py NAME.jsonl --task gsm8k --data gsm8k/train.jsonl --limit 200 -m MODEL.gguf
"""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import emlocal
from emlocal.evaluation.answering import asked_as, name_of, takes_system
from emlocal.evaluation.tasks import open_task
from emlocal.evaluation.tasks.task import Problem, Task
from emlocal.generation import Completion, Scheduler
from emlocal.generation.prompt import prompt_tokens
from emlocal.methods.asking import Answered, Asking, Question, ask
from emlocal.methods.method import Answering, Method, Outcome
from emlocal.methods.scoring import scores_json
from emlocal.methods.voting import repeated
from emlocal.sampling.draw import request_key
from emlocal.settings import Plan, SamplingParams


@dataclass(frozen=True)
class Pool(Method):
    """Draws all samples, the first greedily, and chooses none."""

    def answer(self, question: Question) -> Answering:
        [done] = yield [question.job(first=question.greedy)]
        return Outcome([done], done.completions)


def sample(completion: Completion, entropies: bool) -> dict[str, Any]:
    """Returns the stored fields of an answer.

    `entropies` adds each token's entropy, in hundredths of a nat.
    """
    draws = completion.draws
    before = [draw.entropy_before for draw in draws]
    row: dict[str, Any] = {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "tokens": len(completion.tokens),
        "repeated": round(repeated(completion.tokens), 4),
        "scores": scores_json(completion),
    }
    if entropies:
        row["entropies"] = [round(100 * h) for h in before]
        row["ends"] = completion.ends
    return row


def rows(
    backend: Any, parallel: int, task: Task, problems: Sequence[Problem], plan: Plan, entropies: bool
) -> Iterator[dict[str, Any]]:
    """Yields a row for each question as soon as it is answered."""
    system = takes_system(backend)
    of: dict[Asking, Problem] = {}

    def asking(problem: Problem) -> Asking:
        it = Asking(
            Pool(),
            Question(
                asked_as(task.ask(problem, {}), task.system, system),
                plan,
                lambda it: prompt_tokens(backend, it),
                request_key(name_of(problem, 1)),
            ),
        )
        of[it] = problem
        return it

    todo = map(asking, problems)
    with Scheduler(backend, parallel) as runner:
        for event in ask(runner, lambda: next(todo, None)):
            if isinstance(event, Answered):
                outcome = event.asking.result()
                yield {
                    "id": of.pop(event.asking).id,
                    "prompt_tokens": outcome.jobs[0].timings.prompt_tokens,
                    "passes": sum(job.forward_passes for job in outcome.jobs),
                    "samples": [sample(completion, entropies) for completion in outcome.completions],
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--backend")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--min-p", type=float, default=0.05)
    parser.add_argument("--dynatemp-range", type=float, default=0.0)
    parser.add_argument("--max-tokens", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--entropies", action="store_true", help="keep each token's entropy")
    given = parser.parse_args()
    params = SamplingParams(
        temperature=given.temperature, min_p=given.min_p, dynatemp_range=given.dynatemp_range
    )
    plan = replace(Plan(), params=params, samples=given.samples, max_tokens=given.max_tokens, seed=given.seed)
    task = open_task(given.task, given.data, given.limit)
    there: set[str] = set()
    if given.output.exists():
        lines = given.output.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]  # a kill may have cut the last line
        given.output.write_text("".join(whole), encoding="utf-8")
        there = {json.loads(line)["id"] for line in whole}
    todo = [problem for problem in task.problems if problem.id not in there]
    options: dict[str, Any] = {"backend": given.backend} if given.backend else {}
    if given.threads:
        options["threads"] = given.threads
    with (
        emlocal.load(given.model, parallel=given.parallel, **options) as model,
        given.output.open("a", encoding="utf-8") as file,
    ):
        for row in rows(model.backend, given.parallel, task, todo, plan, given.entropies):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            there.add(row["id"])
            print(f"{len(there)} of {len(task.problems)}", flush=True)


if __name__ == "__main__":
    main()
