"""`emlocal eval` on a tiny model in real llama.cpp."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emlocal.sandbox import landlock
from tests.cli.conftest import Outcome
from tests.evaluation.data import HUMANEVAL_ROW, write

Emlocal = Callable[..., Outcome]
METHODS = "greedy,sample,em-inf,em-inf+self-consistency:2,sequential-refinement:1,vote:3:wave=2,em-best:2"


@pytest.fixture
def questions(tmp_path: Path) -> str:
    values = [{"question": f"{i} + {i}?", "answer": f"… #### {2 * i}"} for i in range(4)]
    return str(write(tmp_path / "questions.jsonl", values))


@pytest.fixture
def evaluate(emlocal: Emlocal, tiny: str, questions: str, tmp_path: Path) -> Emlocal:
    def go(*more: str, task: str = "gsm8k", data: str = questions) -> Outcome:
        common = ("--max-tokens", "8", "--parallel", "2", "-t", "1", "-o", str(tmp_path / "out"))
        return emlocal("eval", "-m", tiny, "--task", task, "--data", data, *common, *more)

    return go


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))
    return found


def timeless(found: dict[str, Any]) -> dict[str, Any]:
    """Returns the results without what differs from run to run."""
    for method in found["methods"]:
        del method["cost"]["seconds"], method["cost"]["passes"]
    return found


def test_methods_are_compared_and_reported(evaluate: Emlocal, tmp_path: Path) -> None:
    done = evaluate("--methods", METHODS, "--samples", "2")
    assert done.code == 0, done.err
    table = done.out.splitlines()
    assert table[0].split()[:2] == ["method", "mean@2"]
    assert [line.split()[0] for line in table[1:8]] == METHODS.split(",")
    found = results(tmp_path)
    assert [m["name"] for m in found["methods"]] == METHODS.split(",")
    assert [m["repetitions"] for m in found["methods"]] == [1, 2, 2, 2, 2, 2, 2]
    assert len(found["comparisons"]) == 6
    assert found["settings"]["seed"] == 0
    assert len(found["model"]["sha256"]) == 64
    assert found["made_with"]["packages"]["llama-cpp-python"]
    voted = found["methods"][3]["cost"]
    assert voted["written"] > found["methods"][2]["cost"]["written"]
    assert (tmp_path / "out" / "results.md").read_text(encoding="utf-8").startswith("# gsm8k: ")
    assert "<details" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8") or all(
        c["wins"] + c["losses"] == 0 for c in found["comparisons"]
    )


def test_answers_that_are_cut_off_and_votes_without_answers_are_said(evaluate: Emlocal) -> None:
    done = evaluate("--methods", "greedy,vote:2", "--max-tokens", "2")
    said = " ".join(done.err.split())
    cut = r"many answers are cut off \(--max-tokens 2, or the context\), and judged as they stand:"
    found = re.search(cut + r" greedy (\d+) of (\d+)", said)
    assert found is not None
    assert int(found[1]) * 10 >= int(found[2])
    votes = re.search(r"no sample has an answer, so that one text was judged: vote:2 (\d+) of (\d+)", said)
    assert votes is not None
    assert votes[2] == found[2]


def test_the_same_command_gives_the_same_results(evaluate: Emlocal, tmp_path: Path) -> None:
    assert evaluate("--methods", "greedy,sample,em-inf").code == 0
    first = timeless(results(tmp_path))
    answers = (tmp_path / "out" / "answers" / "sample.jsonl").read_bytes()
    again = evaluate("--methods", "greedy,sample,em-inf")
    assert again.code == 0
    assert timeless(results(tmp_path)) == first
    assert (tmp_path / "out" / "answers" / "sample.jsonl").read_bytes() == answers
    assert evaluate("--methods", "greedy,sample,em-inf", "--restart").code == 0
    assert timeless(results(tmp_path)) == first


def test_a_stopped_and_killed_run_goes_on_to_the_same(tiny: str, questions: str, tmp_path: Path) -> None:
    values = [{"question": f"{i} times {i}?", "answer": str(i * i)} for i in range(24)]
    data = str(write(tmp_path / "many.jsonl", values))

    def command(out: str) -> list[str]:
        words = ["eval", "-m", tiny, "--task", "gsm8k", "--data", data, "--methods", "sample,em-inf"]
        return [*words, "--max-tokens", "48", "--parallel", "2", "-t", "1", "-o", str(tmp_path / out)]

    def start(out: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "emlocal", *command(out)],
            env=os.environ | {"EMLOCAL_CACHE_DIR": str(tmp_path / "cache")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    assert start("whole").wait() == 0
    for method, how, code in (("sample", signal.SIGINT, 130), ("em-inf", signal.SIGKILL, -signal.SIGKILL)):
        stopped = start("cut")
        journal = tmp_path / "cut" / "answers" / f"{method}.jsonl"
        until = time.monotonic() + 120
        while stopped.poll() is None and time.monotonic() < until:
            if journal.exists() and journal.stat().st_size:
                break
            time.sleep(0.005)
        stopped.send_signal(how)
        assert stopped.wait() == code
    assert not (tmp_path / "cut" / "results.json").exists()
    assert start("cut").wait() == 0
    whole, cut = (
        timeless(json.loads((tmp_path / name / "results.json").read_text())) for name in ("whole", "cut")
    )
    assert cut == whole


@pytest.mark.parametrize("engine", ["torch", "mlx"])
def test_other_engines_are_evaluated_with_the_same_draws(
    evaluate: Emlocal, tmp_path: Path, engine: str
) -> None:
    methods = ("--methods", "sample:1,em-inf:em_steps=0:temperature=1:top_k=0:top_p=1:min_p=0,em-inf:paper")
    done = evaluate(*methods, "--backend", engine, "--samples", "2")
    assert done.code == 0, done.err
    found = results(tmp_path)
    assert found["settings"]["engine"] == engine
    assert found["made_with"]["packages"][engine]
    plain, no_steps, sharp = found["methods"]
    assert no_steps["entropy_after"] == plain["entropy_after"]
    assert sharp["entropy_after"] < sharp["entropy_before"]
    answers = [
        [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted((tmp_path / "out" / "answers").glob("*.jsonl"))
    ]
    assert sorted(map(len, answers)) == [8, 8, 8]


@pytest.mark.skipif(landlock.abi() < landlock.OLDEST_ABI, reason="needs Landlock (Linux 6.2)")
def test_code_is_run_only_where_it_is_allowed(evaluate: Emlocal, tmp_path: Path) -> None:
    data = str(write(tmp_path / "h.jsonl", [HUMANEVAL_ROW]))
    refused = evaluate("--methods", "greedy", task="humaneval", data=data)
    assert (refused.code, refused.out) == (2, "")
    assert "add --allow-code" in refused.err
    assert not (tmp_path / "out").exists()
    allowed = evaluate("--methods", "greedy", "--allow-code", task="humaneval", data=data)
    assert allowed.code == 0, allowed.err
    assert results(tmp_path)["methods"][0]["accuracy"]["value"] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--methods", "greedy,beam"), "a method is one of"),
        (("--methods", "sample:99999"), "between 0 and 100"),
        (("--samples", "0"), "--samples is 0"),
        (("--limit", "0"), "--limit is 0"),
        (("--max-tokens", "0"), "--max-tokens is 0"),
        (("--seed", "-1"), "--seed is -1"),
    ],
)
def test_what_cannot_be_meant_fails_before_the_model_loads(
    evaluate: Emlocal, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = evaluate(*arguments, "--model", str(tmp_path / "none.gguf"))
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_programs_do_not_vote(evaluate: Emlocal, tmp_path: Path) -> None:
    data = str(write(tmp_path / "h.jsonl", [HUMANEVAL_ROW]))
    done = evaluate("--methods", "self-consistency:2", "--allow-code", task="humaneval", data=data)
    assert done.code == 2
    assert "are programs" in done.err


def test_other_settings_are_refused_by_name(evaluate: Emlocal) -> None:
    assert evaluate("--methods", "sample").code == 0
    done = evaluate("--methods", "sample", "--seed", "4")
    assert done.code == 2
    assert "seed: 0 -> 4" in done.err


def test_answers_of_two_engines_do_not_mix(evaluate: Emlocal) -> None:
    assert evaluate("--methods", "sample:1").code == 0
    done = evaluate("--methods", "sample:1,em-inf", "--backend", "torch")
    assert done.code == 2
    assert "engine:" in done.err
    assert "llama.cpp, cpu" in done.err


def test_a_report_says_what_made_answers_that_are_older(evaluate: Emlocal, tmp_path: Path) -> None:
    assert evaluate("--methods", "greedy").code == 0
    assert "answered with" not in results(tmp_path)["made_with"]
    kept = tmp_path / "out" / "made_with.jsonl"
    kept.write_text(re.sub(r'"emlocal": "[^"]*"', '"emlocal": "0.0.1"', kept.read_text("utf-8")), "utf-8")
    assert evaluate("--methods", "greedy,sample:1").code == 0
    assert results(tmp_path)["made_with"]["answered with"] == {"greedy": ["emlocal 0.0.1"]}
    assert "answered with: greedy emlocal 0.0.1" in (tmp_path / "out" / "results.md").read_text("utf-8")


def test_methods_that_are_left_out_are_named(evaluate: Emlocal) -> None:
    assert evaluate("--methods", "greedy,sample:1").code == 0
    done = evaluate("--methods", "greedy")
    assert done.code == 0
    assert "not in the report, because --methods does not name them: sample_1" in done.err


def test_a_folder_that_cannot_be_fails_before_the_model_loads(evaluate: Emlocal, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file", encoding="utf-8")
    done = evaluate("--model", str(tmp_path / "none.gguf"))
    assert (done.code, done.out) == (2, "")
    assert "is a file; -o must name a folder" in done.err


def test_the_folder_has_a_name_that_every_system_takes(
    emlocal: Emlocal, tiny: str, questions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(tiny).with_name("a:b?.gguf").write_bytes(Path(tiny).read_bytes())
    model = str(Path(tiny).with_name("a:b?.gguf"))
    done = emlocal("eval", "-m", model, "--task", "gsm8k", "--data", questions, "--methods", "greedy", "-q")
    assert done.code == 0, done.err
    assert (tmp_path / "eval-gsm8k-a-b-.gguf" / "results.json").exists()
