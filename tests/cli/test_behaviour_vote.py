"""`--method behaviour-vote` in all verbs: it needs permission, and a machine that can contain programs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import emlocal
from emlocal.errors import UsageError
from emlocal.sandbox import landlock
from tests.cli.conftest import Outcome
from tests.evaluation.data import HUMANEVAL_ROW, contained, write

Emlocal = Callable[..., Outcome]
VOTE = ("--method", "behaviour-vote:3")
FIELDS = {"programs": 0, "cluster": 0, "behaviours": 0, "inputs": 0, "ruled_out": 0}


def verbs(folder: Path, model: str) -> dict[str, tuple[str, ...]]:
    """Returns each verb with the method; the model need not exist."""
    lines = str(write(folder / "in.jsonl", [{"prompt": "Write f."}]))
    tests = str(write(folder / "h.jsonl", [HUMANEVAL_ROW]))
    common = ("-m", model, "--max-tokens", "8", "-t", "1")
    task = ("--task", "humaneval", "--data", tests, "-o", str(folder / "eval"))
    return {
        "generate": ("generate", *common, *VOTE, "--json", "Write f."),
        "batch": ("batch", lines, "-o", str(folder / "rows.jsonl"), *common, *VOTE),
        "chat": ("chat", *common, *VOTE),
        "eval": ("eval", *common, *task, "--methods", "greedy,behaviour-vote:3"),
    }


@pytest.mark.parametrize("verb", ["generate", "batch", "chat", "eval"])
def test_it_needs_leave_before_a_model_is_loaded(emlocal: Emlocal, tmp_path: Path, verb: str) -> None:
    done = emlocal(*verbs(tmp_path, str(tmp_path / "none.gguf"))[verb])
    assert (done.code, done.out) == (2, "")
    assert "runs code that the model writes" in done.err
    assert "add --allow-code" in done.err


@pytest.mark.parametrize("verb", ["generate", "batch", "chat", "eval"])
def test_it_needs_a_sandbox_before_a_model_is_loaded(
    emlocal: Emlocal, tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(landlock, "abi", lambda: 0)
    done = emlocal(*verbs(tmp_path, str(tmp_path / "none.gguf"))[verb], "--allow-code")
    assert (done.code, done.out) == (1, "")
    assert "this system cannot contain generated code" in done.err


@contained
def test_with_leave_it_answers(emlocal: Emlocal, tiny: str, tmp_path: Path) -> None:
    """The tiny model writes no programs, so the answer is the greedy one."""
    made = verbs(tmp_path, tiny)
    done = emlocal(*made["generate"], "--allow-code", "--no-use-examples", "--seed", "1")
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    assert {name: answer[name] for name in FIELDS} == FIELDS
    assert answer["text"] == answer["samples"][0]["text"]
    assert len(answer["samples"]) == 3
    assert emlocal(*made["batch"], "--allow-code").code == 0
    [row] = map(json.loads, (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines())
    assert {name: row[name] for name in FIELDS} == FIELDS
    talk = "Write f.\n/method off\nWrite f.\n/method behaviour-vote:2\nWrite f.\n"
    talked = emlocal(*made["chat"], "--allow-code", stdin=talk)
    assert talked.err.count("no programs to choose from") == 2, talked.err
    refused = emlocal("chat", "-m", tiny, "-t", "1", stdin="/method behaviour-vote:2\n")
    assert "runs code that the model writes" in refused.err
    assert emlocal(*made["eval"], "--allow-code", "--parallel", "2").code == 0
    methods = json.loads((tmp_path / "eval" / "results.json").read_text(encoding="utf-8"))["methods"]
    assert [method["name"] for method in methods] == ["greedy", "behaviour-vote:3"]


@contained
def test_only_programs_are_run(emlocal: Emlocal, tmp_path: Path) -> None:
    data = str(write(tmp_path / "q.jsonl", [{"question": "1 + 1?", "answer": "2"}]))
    methods = ("--methods", "greedy,behaviour-vote:3", "--allow-code", "-m", str(tmp_path / "none.gguf"))
    done = emlocal("eval", "--task", "gsm8k", "--data", data, *methods)
    assert done.code == 2
    assert "behaviour-vote:3 runs programs, but the answers to gsm8k are not programs" in done.err


@contained
def test_in_python(tiny: str) -> None:
    with emlocal.load(tiny, threads=1) as model:
        with pytest.raises(UsageError, match="runs code that the model writes"):
            model.generate("Write f.", method="behaviour-vote:2", max_tokens=4)
        method = emlocal.Method("behaviour-vote", samples=2, allow_code=True, use_examples=False)
        answer = model.generate("Write f.", method=method, max_tokens=4)
    assert dict(answer.fields) == FIELDS
    assert len(answer.completions) == 2
