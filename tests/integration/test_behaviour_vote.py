"""behaviour-vote on a real model that writes programs."""

from pathlib import Path

import pytest

import emlocal
from emlocal.evaluation.tasks import open_task
from tests.evaluation.data import contained

QWEN = Path("~/.cache/emlocal-bench/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf").expanduser()
HUMANEVAL = Path("/work/shared/data/humaneval/HumanEval.jsonl.gz")


@pytest.mark.real
@contained
@pytest.mark.skipif(not (QWEN.exists() and HUMANEVAL.exists()), reason="needs the bench model and HumanEval")
def test_two_problems_of_humaneval() -> None:
    task = open_task("humaneval", HUMANEVAL, limit=2)
    method = emlocal.Method("behaviour-vote", samples=4, allow_code=True)
    with emlocal.load(QWEN, threads=1, context=2048) as model:
        for problem in task.problems:
            answer = model.generate(problem.question, method=method, seed=1, max_tokens=400)
            fields = answer.fields
            assert fields["programs"] == 4
            assert 1 <= fields["cluster"] <= 4
            assert fields["behaviours"] >= 1
            assert (fields["inputs"] > 0) == (len({c.text for c in answer.completions}) > 1)
            found = task.find(problem, answer.text, {})
            assert found is not None
            assert (
                answer.completions[0].text
                == model.generate(problem.question, temperature=0, max_tokens=400).text
            )
