"""`emlocal.finetune` and `emlocal.rl` equal the commands: the same adapters, checks and warnings."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import emlocal
from emlocal.errors import UsageError
from emlocal.training.folder import View
from tests.cli.conftest import Outcome
from tests.cli.conftest import emlocal as verb  # noqa: F401
from tests.metrics import metrics, timeless
from tests.tiny_pair import ModelPair

LINES = [{"question": f"say {i}", "answer": str(i)} for i in range(6)]
SMALL: dict[str, Any] = {
    "steps": 2,
    "prompts_per_step": 2,
    "max_tokens": 8,
    "rank": 4,
    "threads": 1,
    "dtype": "float32",
}
FLAGS = ("--steps", "2", "--prompts-per-step", "2", "--max-tokens", "8", "--rank", "4")
FLAGS += ("--threads", "1", "--dtype", "float32")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


class Told(View):
    """Records its reports."""

    def __init__(self) -> None:
        super().__init__(lambda text: self.warnings.append(text))
        self.warnings: list[str] = []
        self.rows: list[dict[str, Any]] = []

    def finished_step(self, row: dict[str, Any]) -> None:
        super().finished_step(row)
        self.rows.append(row)


@pytest.mark.parametrize("name", ["finetune", "rl"])
def test_python_trains_what_the_verb_does(
    name: str,
    pair: ModelPair,
    data: Path,
    tmp_path: Path,
    verb: Callable[..., Outcome],  # noqa: F811
) -> None:
    more, flags = ({}, ()) if name == "finetune" else ({"samples": 2}, ("--samples", "2"))
    train = emlocal.finetune if name == "finetune" else emlocal.rl
    view = Told()
    result = train(data, tmp_path / "python", model=str(pair.gguf), view=view, **SMALL, **more)
    asked = ("-m", str(pair.gguf), "--data", str(data), "-o", str(tmp_path / "verb"))
    assert verb(name, *asked, *FLAGS, *flags).code == 0
    for file in ("adapter_model.safetensors", "adapter_config.json", "run.json"):
        assert (tmp_path / "python" / file).read_bytes() == (tmp_path / "verb" / file).read_bytes(), file
    assert timeless(result.metrics) == timeless(view.rows) == timeless(metrics(tmp_path / "verb"))
    assert (result.outcome.reason, result.adapter, result.accuracy) == ("finished", tmp_path / "python", None)
    with pytest.raises(UsageError, match="has a run already"):
        train(data, tmp_path / "python", model=str(pair.gguf), **SMALL, **more)


def test_prompts_of_ones_own_accuracy_and_warnings(pair: ModelPair, tmp_path: Path) -> None:
    long = "word " * 400
    with pytest.warns(UserWarning, match="1 prompt of 3 does not fit: prompt 3 has"):
        result = emlocal.finetune(
            ["say 0", {"question": "say 1"}, {"messages": [{"role": "user", "content": long}]}],
            tmp_path / "out",
            model=str(pair.gguf),
            validate=LINES[:2],
            **SMALL,
        )
    assert result.accuracy is not None
    assert json.loads((tmp_path / "out" / "validation.json").read_text())["prompts"] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned = emlocal.load(pair.gguf, context=64, adapters=[(result.adapter, 1.0)])
    tuned.close()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stepz": 3}, "there is no setting .stepz."),
        ({"recipe": "best"}, "there is no recipe best"),
        ({"steps": 0}, "steps is 0; it must be between 1"),
        ({"save_every": 0}, "save_every is 0; it must be between 1"),
        ({"rollouts": "mlx"}, "--rollouts is mlx, but torch trains"),
        ({"limit": 0}, "limit is 0"),
        ({"data": ["", {"x": 1}, 3]}, "prompt 1: empty; prompt 2: none of .*; prompt 3: this is neither"),
        ({"data": []}, "the list has no prompts"),
        ({"validate": ["say"]}, "prompt 1: there is no answer to compare with"),
    ],
)
def test_bad_settings(pair: ModelPair, tmp_path: Path, given: dict[str, Any], message: str) -> None:
    data = given.pop("data", ["say 0"])
    with pytest.raises(UsageError, match=message) as caught:
        emlocal.finetune(data, tmp_path / "out", model=str(pair.gguf), **{**SMALL, "threads": 1, **given})
    if "stepz" in message:
        assert caught.value.hint.startswith("did you mean steps")
    assert not (tmp_path / "out").exists()


def test_a_reward_by_its_name_or_with_weights(pair: ModelPair, tmp_path: Path) -> None:
    few: dict[str, Any] = SMALL | {"steps": 1, "samples": 2, "model": str(pair.gguf)}
    emlocal.rl(LINES, tmp_path / "a", reward="sequence", **few)
    emlocal.rl(LINES, tmp_path / "b", reward={"verifier": 1, "token": 0.5}, target_modules=["q_proj"], **few)
    held = [json.loads((tmp_path / name / "run.json").read_text())["settings"] for name in "ab"]
    assert [each["reward"] for each in held] == [[["sequence", 1.0]], [["verifier", 1.0], ["token", 0.5]]]
    assert held[1]["target_modules"] == ["q_proj"]
