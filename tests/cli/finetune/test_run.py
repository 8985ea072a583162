"""Runs of `emlocal finetune`: torch trains a tiny model, llama.cpp or torch answers."""

import json
import re
import sys
from pathlib import Path

import pytest

from emlocal.models.adapters import read_adapter
from tests.cli.finetune.runs import ROW, Emlocal, Finetune
from tests.cli.training import error_of
from tests.metrics import metrics
from tests.tiny_pair import ModelPair


@pytest.mark.parametrize("how", ["llama.cpp", "torch", "folder"])
def test_a_run_to_the_end_and_its_adapter_on_both_engines(
    finetune: Finetune, emlocal: Emlocal, pair: ModelPair, folder: Path, out: Path, how: str
) -> None:
    strong = ("--steps", "4", "--learning-rate", "0.03", "--max-length-change", "100")
    more = {"model": folder} if how == "folder" else {}
    done = finetune(*strong, "--rollouts", "auto" if how == "folder" else how, **more)
    assert done.code == 0
    assert done.out == ""
    lines = done.err.splitlines()
    assert any(f"answers by {'torch' if how == 'folder' else how}, 2 at once, 1 thread" in x for x in lines)
    assert any(", trained on torch, cpu, float32 (" in x for x in lines)
    assert any("learning rate 0.03, β 1.5, rank 4, seed 0" in x for x in lines)
    rows = [match for match in map(ROW.fullmatch, lines) if match]
    assert [match[1] for match in rows] == ["0", "1", "2", "3", "4"]
    assert [match[3] is None for match in rows] == [False] * 4 + [True]
    assert [row["step"] for row in metrics(out)] == list(range(5))
    model = folder if how == "folder" else pair.gguf
    assert lines[-1] == f"  emlocal chat -m {model} --adapter {out}"
    assert read_adapter(out).base_model == str(model)

    greedy = ("--temp", "0", "--max-tokens", "12", "-q", "say 1")
    base = emlocal("generate", "-m", str(pair.gguf), *greedy)
    llama = emlocal("generate", "-m", str(pair.gguf), "--adapter", str(out), *greedy)
    torch = emlocal("generate", "-m", str(model), "--backend", "torch", "--adapter", str(out), *greedy)
    assert llama.code == torch.code == 0
    assert llama.out == torch.out
    assert llama.out != base.out


def test_a_folder_cannot_be_answered_by_llama_cpp(finetune: Finetune, folder: Path, out: Path) -> None:
    done = finetune("--rollouts", "llama.cpp", model=folder)
    assert done.code == 2
    assert "is not a GGUF model, so llama.cpp cannot answer with it" in error_of(done)
    assert not out.exists()


def test_quiet_says_nothing(finetune: Finetune, out: Path) -> None:
    done = finetune("-q")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert (out / "adapter_model.safetensors").exists()


def test_a_path_with_spaces_is_quoted_in_the_command_to_try(
    finetune: Finetune, pair: ModelPair, tmp_path: Path
) -> None:
    model = tmp_path / "my model.gguf"
    model.write_bytes(pair.gguf.read_bytes())
    done = finetune(model=model)
    assert "my model.gguf, trained on torch" in done.err.splitlines()[2]
    assert str(tmp_path) not in done.err.splitlines()[2]
    assert done.err.splitlines()[-1].startswith(f"  emlocal chat -m '{model}' --adapter ")


def test_dry_run_tells_and_writes_nothing(finetune: Finetune, out: Path, tmp_path: Path) -> None:
    before = {p.name for p in tmp_path.iterdir()}
    done = finetune("--dry-run", "--learning-rate", "0.000001", "--alpha", "100", "--limit", "5")
    assert done.code == 0
    assert not out.exists()
    assert {p.name for p in tmp_path.iterdir()} - before <= {"cache"}  # the unpacked model
    values = dict(re.findall(r"^  (--[\w-]+|prompts|memory|2 steps) +(.+)$", done.out, re.MULTILINE))
    assert values["--learning-rate"] == "0.000001"
    assert values["--alpha"] == "100"
    assert values["--target-modules"].startswith("q_proj,k_proj")
    assert values["prompts"] == "5 of 5"
    assert values["memory"].endswith("with one whole micro-batch")
    assert re.fullmatch(r"\d s", values["2 steps"])
    assert not re.search(r"\de[+-]\d", done.out)
    masked = done.out[done.out.index("not in the loss") : done.out.index("in the loss (8 tokens")]
    assert "say " in masked


def test_a_dry_run_says_what_the_votes_take(finetune: Finetune, out: Path) -> None:
    done = finetune("--dry-run", "--recipe", "vote", "--samples", "4", "--limit", "5", "--kl-beta", "0.1")
    assert done.code == 0
    assert not out.exists()
    said = done.out[done.out.index("A run, if") :]
    assert re.search(r"^  the votes +\d.* \(20 answers of \d+ tokens, before the first step\)$", said, re.M)
    share = re.search(r"^ +(\d+)% of the run(; --limit or --samples shorten it)?$", said, re.M)
    assert share is not None
    assert share[1] == "50" or (int(share[1]) > 50) == (share[2] is not None)
    assert re.search(r"^  votes and 2 steps +\d", said, re.M)
    plain = finetune("--dry-run", "--limit", "5").out
    assert "vote" not in plain[plain.index("A run, if") :]


def test_a_collapse_is_exit_1_with_the_adapter_of_before(finetune: Finetune, out: Path) -> None:
    flags = ("--steps", "40", "--learning-rate", "0.05", "--kl-beta", "0", "--entropy-floor", "4.5")
    done = finetune(*flags, "--max-length-change", "1000", "--max-repetition", "1", "--max-kl", "0")
    assert done.code == 1
    assert "stopped: the answers' entropy is" in done.err
    assert "below --entropy-floor 4.5" in done.err
    assert done.err.splitlines()[-1].startswith("  emlocal chat -m ")
    rows = metrics(out)
    kept = int(re.findall(r"the adapter after (\d+) step", done.err)[-1])
    assert rows[kept]["entropy"] >= 4.5 > rows[-1]["entropy"]
    assert read_adapter(out).pairs


def test_a_run_that_took_no_step_does_not_offer_its_adapter(finetune: Finetune) -> None:
    done = finetune("--entropy-floor", "100")
    assert done.code == 1
    assert "changes nothing" in done.err
    assert "try it" not in done.err


def test_a_collapse_is_said_in_quiet_too(finetune: Finetune) -> None:
    done = finetune("-q", "--entropy-floor", "100")
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert line.startswith("warning: stopped: the answers' entropy is ")


def test_prompts_that_do_not_fit_are_counted_or_all_that_there_is(
    finetune: Finetune, out: Path, data: Path
) -> None:
    with data.open("a") as file:
        file.write(json.dumps({"prompt": "a" * 300}) + "\n" + json.dumps({"prompt": "b" * 400}) + "\n")
    done = finetune()
    assert done.code == 0
    assert "2 prompts of 8 do not fit: prompts.jsonl, line 7 has" in done.err
    assert "--context 256 less 8 for the answer leave 248; they are left out" in done.err
    assert json.loads((out / "run.json").read_text())["prompts"]["count"] == 6
    data.write_text(json.dumps({"prompt": "a" * 300}))
    all_of_them = finetune("--resume")
    assert all_of_them.code == 1
    assert "1 prompt of 1 does not fit" in error_of(all_of_them)


def test_validate_shows_and_keeps_both_accuracies(finetune: Finetune, out: Path, tmp_path: Path) -> None:
    file = tmp_path / "validation.jsonl"
    lines = [{"question": f"1+{i}=", "answer": f"so it is\n#### {i + 1}"} for i in range(3)]
    long = {"question": "a" * 400, "answer": "1"}
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, long]))
    done = finetune("--validate", str(file))
    assert done.code == 0
    assert re.search(r"accuracy on the validation prompts: \d+\.\d% → \d+\.\d%", done.err)
    assert "1 prompt of 4 does not fit: validation.jsonl, line 4" in done.err
    kept = json.loads((out / "validation.json").read_text())
    assert kept["prompts"] == 3
    assert 0 <= kept["before"] <= 1
    (out / "validation.json").write_text(json.dumps({**kept, "before": 0.125}))
    # known, so it is not measured again
    assert "12.5% → " in finetune("--resume", "--validate", str(file)).err
    file.write_text(json.dumps(lines[0]))
    assert "12.5% → " not in finetune("--resume", "--validate", str(file)).err


def test_validate_without_answers(finetune: Finetune, out: Path, data: Path) -> None:
    done = finetune("--validate", str(data))
    assert done.code == 2
    assert "prompts.jsonl, line 1: there is no answer to compare with" in error_of(done)
    assert not out.exists()


@pytest.mark.parametrize("tracker", ["trackio", "wandb", "tensorboard"])
def test_report_to_a_package_that_is_missing(
    finetune: Finetune, out: Path, tracker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (tracker, f"{tracker}.summary"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    done = finetune("--report-to", tracker)
    assert done.code == 1
    assert f"--report-to {tracker} needs its package" in error_of(done)
    assert f"pip install {tracker}" in done.err
    assert not out.exists()


def test_report_to_tensorboard(finetune: Finetune, out: Path) -> None:
    assert finetune("--report-to", "tensorboard").code == 0
    (events,) = (out / "tensorboard").iterdir()
    assert b"gradient_norm" in events.read_bytes()
