"""emlocal from Python, on the tiny model and the starter model."""

import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest

import emlocal
from emlocal.errors import ContextFullError, ModelError, UsageError
from emlocal.models.resolve import GGUFModel
from emlocal.sampling import SamplingParams


@pytest.fixture(scope="module")
def model(tiny_model: GGUFModel) -> emlocal.Model:
    with emlocal.load(tiny_model.path, parallel=3, context=200, threads=1) as loaded:
        yield loaded


def test_generate_repeats_itself(model: emlocal.Model) -> None:
    answer = model.generate("the cat", raw=True, em=True, max_tokens=12)
    assert model.generate("the cat", raw=True, em=True, max_tokens=12).text == answer.text
    hot = [model.generate("the cat", raw=True, temperature=3, max_tokens=12, seed=s).tokens for s in (0, 1)]
    assert hot[0] != hot[1]
    assert answer.finish_reason == "length"
    assert len(answer.tokens) == len(answer.draws) == 12
    assert answer.entropy.after < answer.entropy.before
    assert answer.timings.generated_tokens == 12


def test_stream_is_generate_in_pieces(model: emlocal.Model) -> None:
    pieces = list(model.stream("the cat", raw=True, em="paper", max_tokens=12, seed=3))
    assert len(pieces) > 3
    assert "".join(pieces) == model.generate("the cat", raw=True, em="paper", max_tokens=12, seed=3).text


def test_batch_in_order_and_with_settings_of_the_lines_own(model: emlocal.Model) -> None:
    lines = [
        "one",
        {"prompt": "two", "max_tokens": 3, "id": 7},
        {"prompt": ""},
        {"prompt": "four", "temp": 0},
    ]
    rows = list(model.batch(lines, raw=True, max_tokens=6, keep=True))
    assert [row.get("completion_tokens") for row in rows] == [6, 3, None, 6]
    assert rows[1]["kept"] == {"id": 7}
    assert "empty" in rows[2]["error"]
    again = list(model.batch(lines, raw=True, max_tokens=6, keep=True))
    assert [row.get("text") for row in again] == [row.get("text") for row in rows]


def test_batch_with_a_method(model: emlocal.Model) -> None:
    method = emlocal.Method("self-consistency", samples=4, extraction="none")
    (row,) = model.batch(["a"], method=method, raw=True, max_tokens=4)
    assert len(row["samples"]) == 4
    assert len({s["text"] for s in row["samples"]}) > 1  # each has its own draws
    assert row["votes"] >= 1


def test_methods_answer_one_prompt(model: emlocal.Model) -> None:
    settings = {"raw": True, "max_tokens": 6, "temperature": 2.0}
    vote = model.generate(
        "a", method=emlocal.Method("self-consistency", samples=4, extraction="none"), **settings
    )
    assert vote.fields["votes"] >= 1
    assert vote.text.strip() == vote.fields["answer"]
    assert len({completion.text for completion in vote.completions}) > 1
    pieces = list(model.stream("a", method="self-consistency:4", **settings))
    assert pieces == [model.generate("a", method="self-consistency:4", **settings).text]
    asked = emlocal.Method("vote", samples=3, extraction="none", beta=0, sure=1.0)
    waves = model.generate("a", method=asked, **settings)
    assert waves.fields["drawn"] == len(waves.completions)
    (row,) = model.batch(["a"], method="em-best:2", **settings)
    assert row["chosen_by"] == "mean-entropy"
    revised = model.generate("a", method="sequential-refinement:1", **settings)
    assert revised.timings.generated_tokens == 12
    assert (
        model.generate("a", raw=True, max_tokens=6, method="greedy").tokens
        == model.generate("a", raw=True, max_tokens=6, temperature=0).tokens
    )


@pytest.mark.real
@pytest.mark.parametrize("parallel", [1, 2])
def test_conversations_by_turns_read_only_what_is_new(smollm2: GGUFModel, parallel: int) -> None:
    with emlocal.load(smollm2.path, parallel=parallel, context=512, threads=1) as one:
        chats: list[list[dict[str, str]]] = [[], []]
        held = [0, 0]
        for turn in range(3):
            for i, said in enumerate(chats):
                said.append({"role": "user", "content": f"Question {turn} to you, {'Ada' if i else 'Max'}?"})
                answer = one.generate(said, temperature=0, max_tokens=6)
                assert turn == 0 or answer.timings.cached_tokens == held[i]
                held[i] = answer.timings.prompt_tokens + answer.timings.generated_tokens - 1
                said.append({"role": "assistant", "content": answer.text})


def test_streams_side_by_side(model: emlocal.Model) -> None:
    settings = {"raw": True, "max_tokens": 12, "temperature": 1.5}
    alone = [model.generate(text, **settings).text for text in ("the cat", "a dog")]
    one, two = (model.stream(text, **settings) for text in ("the cat", "a dog"))
    together = [*zip_longest(one, two, fillvalue="")]
    assert ["".join(pieces) for pieces in zip(*together, strict=True)] == alone


def test_one_at_a_time_in_shared_room(tiny_model: GGUFModel) -> None:
    with emlocal.load(tiny_model.path, context=64, threads=1) as one:
        one.generate("x" * 20, raw=True, max_tokens=30)  # takes some of the room
        rows = list(one.batch(["y" * 30, "y" * 40, "z"], raw=True, max_tokens=100))
        assert all("error" not in row for row in rows)
        assert {row["finish_reason"] for row in rows} <= {"context", "stop"}


def test_a_batch_that_nobody_listens_to_any_more_holds_nothing(model: emlocal.Model) -> None:
    for _ in range(5):
        rows = model.batch([f"prompt {i}" for i in range(20)], raw=True, max_tokens=4)
        next(rows)
        rows.close()
    assert len(list(model.batch(["a"] * 6, raw=True, max_tokens=4, method="greedy"))) == 6


def test_a_closed_model_says_so(tiny_model: GGUFModel) -> None:
    with emlocal.load(tiny_model.path, context=64) as gone:
        pass
    gone.close()
    with pytest.raises(UsageError, match="closed"):
        gone.generate("x", raw=True)
    with pytest.raises(UsageError, match="closed"):
        gone.batch(["x"], raw=True)


def test_answers_that_run_end_with_the_model(tiny_model: GGUFModel) -> None:
    """They held sequences of an engine that was gone: the process ended with a segmentation fault."""
    with emlocal.load(tiny_model.path, parallel=2, context=64, threads=1) as gone:
        rows, left = (gone.batch(["a", "b", "c", "d"], raw=True, max_tokens=4) for _ in range(2))
        pieces = gone.stream("the cat", raw=True, max_tokens=40, temperature=1.5)
        next(rows), next(pieces)
    for unfinished in (rows, pieces):
        with pytest.raises(UsageError, match="closed"):
            list(unfinished)
    with pytest.raises(UsageError, match="closed"):
        next(left)  # not begun before


def test_settings_that_cannot_be_meant(model: emlocal.Model) -> None:
    for bad, message in (
        ({"temprature": 1}, "temprature"),
        ({"temperature": -1}, "temperature is -1"),
        ({"em": "strong"}, "strong"),
        ({"raw": True, "system": "be brief"}, "raw"),
    ):
        with pytest.raises(UsageError, match=message):
            model.generate("x", **bad)
    with pytest.raises(ContextFullError):
        model.generate("x " * 500, raw=True)
    with pytest.raises(ModelError):
        emlocal.load(Path("nowhere.gguf"))
    with pytest.raises(UsageError, match="one text"):
        model.batch("abc")
    for call in (model.batch, model.generate):
        with pytest.raises(UsageError, match="there is no method 'nope'"):
            call("abc" if call == model.generate else ["abc"], method="nope")
    with pytest.raises(UsageError, match="parallel"):
        emlocal.load(parallel=0)


def test_every_sampling_setting_can_be_given(model: emlocal.Model) -> None:
    given = {
        name: value for name, value in vars(SamplingParams()).items() if name not in ("em", "logit_bias")
    }
    model.generate("x", raw=True, max_tokens=1, logit_bias={5: -1.0}, **given)


def test_on_torch(
    tiny_model: GGUFModel, unpacked_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model folder, whose engine is chosen, and the GGUF file that it came from give the same answer.

    It is the same alone, in pieces and in a batch.
    """
    monkeypatch.setenv("EMLOCAL_CACHE_DIR", str(tmp_path))
    with (
        emlocal.load(unpacked_tiny, context=100, threads=1) as folder,
        emlocal.load(tiny_model.path, backend="torch", parallel=3, context=100, threads=1) as file,
    ):
        assert folder.backend.name == file.backend.name == "torch"
        answer = folder.generate("the cat", raw=True, em=True, max_tokens=12)
        assert answer.entropy.after < answer.entropy.before
        assert "".join(file.stream("the cat", raw=True, em=True, max_tokens=12)) == answer.text
        lines = ["the cat", {"prompt": "two", "max_tokens": 3}, "x" * 150, "the cat"]
        rows = list(file.batch(lines, raw=True, temperature=0, max_tokens=12))
        assert [row.get("completion_tokens") for row in rows] == [12, 3, None, 12]
        greedy = folder.generate("the cat", raw=True, temperature=0, max_tokens=12).text
        assert rows[0]["text"] == rows[3]["text"] == greedy
        assert "the context holds 100" in rows[2]["error"]


@pytest.mark.real
def test_the_starter_model_answers_a_conversation(smollm2: GGUFModel) -> None:
    with emlocal.load(smollm2.path, parallel=2, context=512) as real:
        said = [
            {"role": "user", "content": "What is the capital of Italy?"},
            {"role": "assistant", "content": "The capital of Italy is Rome."},
            {"role": "user", "content": "What is the capital of France?"},
        ]
        assert "Paris" in real.generate(said, temperature=0, max_tokens=20).text
        rows = list(
            real.batch(["Name a colour.", {"messages": said, "temperature": 0}], max_tokens=20, em=True)
        )
        assert "Paris" in rows[1]["text"]


def test_importing_emlocal_imports_little() -> None:
    code = "import sys, emlocal; print(sys.modules.keys() & {'numpy', 'llama_cpp'}, emlocal.load.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "load"]


def test_adapters_of_any_format(tiny_model: GGUFModel, tmp_path: Path) -> None:
    from emlocal.models.adapters.folders import write_peft
    from tests.tiny_pair import random_adapter

    write_peft(random_adapter(layers=1), tmp_path / "good")
    write_peft(random_adapter(layers=2), tmp_path / "wrong")

    def answer(*adapters: tuple[Path, float]) -> str:
        with emlocal.load(tiny_model.path, context=64, adapters=adapters) as loaded:
            return loaded.generate("the cat", raw=True, temperature=0, max_tokens=8).text

    assert answer((tmp_path / "good", 1.0)) != answer() == answer((tmp_path / "good", 0.0))
    with pytest.raises(ModelError, match=r"tiny\.gguf does not have"):
        answer((tmp_path / "wrong", 1.0))
