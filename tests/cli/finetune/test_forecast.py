"""A run that will take long says so before it begins; the trial that tells changes nothing."""

from pathlib import Path

import pytest

from emlocal.training import forecast
from tests.cli.finetune.runs import Finetune
from tests.metrics import metrics, timeless


def test_a_long_run_says_so_and_is_the_same(
    finetune: Finetune, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = finetune()
    assert plain.code == 0
    assert "may take up to" not in plain.err
    weights, rows = (out / "adapter_model.safetensors").read_bytes(), timeless(metrics(out))

    monkeypatch.setattr(forecast, "NEVER_LONG", 0)
    tried = finetune("-o", str(tmp_path / "tried"))
    assert "may take up to" not in tried.err  # seconds
    monkeypatch.setattr("emlocal.text.LONG", 0.0)
    told = finetune("-o", str(tmp_path / "told"))
    lines = told.err.splitlines()
    (place,) = (i for i, line in enumerate(lines) if line.startswith("this run may take up to "))
    assert lines[place].endswith("tokens each")
    assert lines[place + 1] == "to shorten it, lower --steps, --prompts-per-step or --max-tokens"
    assert lines[place + 2].split()[0] == "step"  # the table's head: nothing was trained before
    for name in ("tried", "told"):
        assert (tmp_path / name / "adapter_model.safetensors").read_bytes() == weights
        assert timeless(metrics(tmp_path / name)) == rows


def test_quiet_runs_do_not_say_it(finetune: Finetune, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "NEVER_LONG", 0)
    monkeypatch.setattr("emlocal.text.LONG", 0.0)
    assert finetune("-q").err == ""
