"""`emlocal adapter`, and `--adapter` with every format."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from emlocal.models.adapters import read_adapter
from emlocal.models.adapters.folders import write_mlx, write_peft
from emlocal.models.adapters.gguf_lora import write_gguf
from emlocal.models.gguf import read_header
from tests.cli.conftest import Outcome
from tests.tiny_pair import SHAPES, assert_same, random_adapter

Emlocal = Callable[..., Outcome]
ADAPTER = random_adapter(layers=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A PEFT folder for the tiny model."""
    write_peft(ADAPTER, tmp_path / "peft")
    return tmp_path / "peft"


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """Writes weights with the shapes of the tiny model under transformers' names; no model runs on them."""
    path = tmp_path / "model"
    path.mkdir()
    rng = np.random.default_rng(0)
    names = {f"model.layers.0.{module}.weight": shape for module, shape in SHAPES.items()}
    tensors = {n: rng.normal(size=s).astype("f4") for n, s in names.items()}
    save_file(tensors | {"model.norm.weight": np.ones(32, "f4")}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return path


def test_show(emlocal: Emlocal, folder: Path, tiny: str) -> None:
    facts = json.loads(emlocal("adapter", "show", str(folder), "--json", "--base", tiny).out)
    assert facts.pop("size_bytes") > 4 * facts["parameters"]
    assert "names tiny/base as its base model, but this is" in facts.pop("but")
    assert facts == {
        "path": str(folder),
        "format": "peft",
        "base_model": "tiny/base",
        "rank": [4],
        "alpha": [8.0],
        "scale": [2.0],
        "modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "layers": 7,
        "parameters": sum(4 * (out + inner) for out, inner in SHAPES.values()),
        "fits": True,
    }
    table = emlocal("adapter", "show", str(folder)).out
    assert "base model  tiny/base" in table
    assert "alpha       8" in table
    assert "fits" not in table


def test_show_says_why_it_does_not_fit(
    emlocal: Emlocal, tmp_path: Path, tiny: str, model_folder: Path
) -> None:
    write_mlx(random_adapter(layers=2), tmp_path / "two")
    for base in (tiny, str(model_folder)):
        done = emlocal("adapter", "show", str(tmp_path / "two"), "--base", base)
        assert done.code == 0
        assert "fits        no" in done.out
        assert "model.layers.1.mlp.down_proj, which" in done.out


def test_show_of_a_gguf_needs_no_base(emlocal: Emlocal, tmp_path: Path, tiny: str) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(ADAPTER, path, read_header(Path(tiny)))
    facts = json.loads(emlocal("adapter", "show", str(path), "--json").out)
    assert (facts["format"], facts["layers"], facts["alpha"]) == ("gguf", 7, [8.0])


def test_convert_there_and_back(emlocal: Emlocal, tmp_path: Path, folder: Path, tiny: str) -> None:
    gguf, mlx, back = tmp_path / "a.gguf", tmp_path / "mlx", tmp_path / "back"
    done = emlocal("adapter", "convert", str(folder), "-o", str(gguf), "--base", tiny)
    assert (done.code, done.out) == (0, "")
    assert done.err == f"{gguf}: 7 layers as gguf\n"
    arguments = ["-o", str(mlx), "--to", "mlx", "--base", tiny]
    assert emlocal("adapter", "convert", str(gguf), *arguments).code == 0
    assert emlocal("adapter", "convert", str(mlx), "-o", str(back), "--to", "peft").code == 0
    assert_same(read_adapter(back), ADAPTER)


def test_convert_says_what_it_needs(emlocal: Emlocal, tmp_path: Path, folder: Path, tiny: str) -> None:
    gguf, out = tmp_path / "a.gguf", str(tmp_path / "out")
    done = emlocal("adapter", "convert", str(folder), "-o", str(gguf))
    assert done.code == 2
    assert "a GGUF adapter needs its base model" in done.err
    assert "--base MODEL" in done.err
    done = emlocal("adapter", "convert", str(folder), "-o", out)
    assert done.code == 2
    assert "add --to peft, --to mlx or --to gguf" in done.err
    write_gguf(ADAPTER, gguf, read_header(Path(tiny)))
    done = emlocal("adapter", "convert", str(gguf), "-o", out, "--to", "peft")
    assert done.code == 1
    assert "give the base model too: --base MODEL" in done.err
    assert not Path(out).exists()


def test_convert_replaces_adapters_only_and_only_when_forced(
    emlocal: Emlocal, tmp_path: Path, folder: Path, tiny: str
) -> None:
    out = tmp_path / "out"
    write_peft(random_adapter(seed=5), out)
    arguments = ["adapter", "convert", str(folder), "-o", str(out), "--to", "mlx"]
    assert "exists already" in emlocal(*arguments).err
    assert_same(read_adapter(out), random_adapter(seed=5))
    assert emlocal(*arguments, "--force").code == 0
    assert_same(read_adapter(out), ADAPTER)
    model = tmp_path / "precious.gguf"
    model.write_bytes(Path(tiny).read_bytes())
    done = emlocal("adapter", "convert", str(folder), "-o", str(model), "--base", tiny, "--force")
    assert done.code == 2
    assert "precious.gguf is not a GGUF adapter, and --force replaces only adapters" in done.err
    assert "choose another name" in done.err
    assert model.read_bytes() == Path(tiny).read_bytes()
    done = emlocal("adapter", "convert", str(folder), "-o", str(folder), "--to", "mlx", "--force")
    assert "is the adapter that is being converted" in done.err


def test_a_file_that_is_no_adapter_is_called_that(emlocal: Emlocal, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "hi"}\n')
    done = emlocal("adapter", "show", str(path))
    assert done.code == 2
    assert f"{path} is not an adapter" in done.err
    assert "emlocal models" not in done.err


def test_convert_checks_against_a_model_folder(
    emlocal: Emlocal, tmp_path: Path, folder: Path, model_folder: Path
) -> None:
    arguments = ["--to", "mlx", "--base", str(model_folder)]
    assert emlocal("adapter", "convert", str(folder), "-o", str(tmp_path / "a"), *arguments).code == 0
    write_peft(random_adapter(layers=2), tmp_path / "two")
    done = emlocal("adapter", "convert", str(tmp_path / "two"), "-o", str(tmp_path / "b"), *arguments)
    assert done.code == 1
    assert "which" in done.err
    assert not (tmp_path / "b").exists()


def test_merge(emlocal: Emlocal, tmp_path: Path, folder: Path, model_folder: Path) -> None:
    out = tmp_path / "merged"
    arguments = ["adapter", "merge", "-m", str(model_folder), "--adapter", f"{folder}=0.5", "-o", str(out)]
    done = emlocal(*arguments)
    assert (done.code, done.out) == (0, "")
    assert "7 layers changed" in done.err
    before, after = load_file(model_folder / "model.safetensors"), load_file(out / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    pair = ADAPTER.pairs[name]
    wanted = before[f"{name}.weight"] + 0.5 * pair.scale * pair.b @ pair.a
    assert np.allclose(after[f"{name}.weight"], wanted, atol=1e-5)
    assert np.array_equal(after["model.norm.weight"], before["model.norm.weight"])
    assert (out / "config.json").read_text() == "{}"
    again = emlocal(*arguments)
    assert again.code == 2
    assert "exists already" in again.err


def test_merge_into_what_is_no_model(emlocal: Emlocal, tmp_path: Path, folder: Path) -> None:
    for name in (tmp_path / "none.gguf", folder):
        done = emlocal(
            "adapter", "merge", "-m", str(name), "--adapter", str(folder), "-o", str(tmp_path / "x")
        )
        assert done.code == 2
        assert f"{name}" in done.err
        assert not (tmp_path / "x").exists()


def test_merge_into_a_gguf_model_whatever_the_adapters_format(
    emlocal: Emlocal, tmp_path: Path, folder: Path, tiny: str
) -> None:
    write_gguf(ADAPTER, tmp_path / "a.gguf", read_header(Path(tiny)))
    for adapter, out in ((folder, "one"), (tmp_path / "a.gguf", "two")):
        done = emlocal("adapter", "merge", "-m", tiny, "--adapter", str(adapter), "-o", str(tmp_path / out))
        assert done.code == 0, done.err
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(np.allclose(one[name], two[name], atol=1e-6) for name in one)
    assert not (tmp_path / "one" / "emlocal.json").exists()  # the file says what is in the cache
    asked = ("--temp", "0", "--max-tokens", "12", "-q", "say 1")
    merged = emlocal("generate", "-m", str(tmp_path / "one"), *asked)
    assert merged.out == emlocal("generate", "-m", tiny, "--adapter", str(folder), *asked).out
    assert merged.out != emlocal("generate", "-m", tiny, *asked).out


def test_every_format_answers_the_same(emlocal: Emlocal, tmp_path: Path, folder: Path, tiny: str) -> None:
    write_mlx(ADAPTER, tmp_path / "mlx")
    write_gguf(ADAPTER, tmp_path / "a.gguf", read_header(Path(tiny)))

    def answer(*flags: str) -> str:
        done = emlocal("generate", "-m", tiny, "--json", "--temp", "0", "--max-tokens", "8", *flags, "hello")
        assert done.code == 0, done.err
        return str(json.loads(done.out)["text"])

    answers = {answer("--adapter", f"{p}=0.5") for p in (folder, tmp_path / "mlx", tmp_path / "a.gguf")}
    assert len(answers) == 1
    assert answers != {answer()}


def test_a_folder_for_another_model_is_refused_before_loading(
    emlocal: Emlocal, tmp_path: Path, tiny: str
) -> None:
    write_peft(random_adapter(layers=2), tmp_path / "two")
    done = emlocal("generate", "-m", tiny, "--adapter", str(tmp_path / "two"), "x")
    assert done.code == 1
    assert "model.layers.1.mlp.down_proj, which tiny.gguf does not have" in done.err
    done = emlocal("generate", "-m", tiny, "--adapter", f"{tmp_path / 'two'}=nan", "x")
    assert done.code == 2
    assert "the scale must be finite" in done.err


def test_a_batch_knows_its_adapter(emlocal: Emlocal, tmp_path: Path, folder: Path, tiny: str) -> None:
    """A resumed run must have the same adapter; a folder is identified by its weights."""
    lines = tmp_path / "in.jsonl"
    lines.write_text('{"prompt": "a"}\n')
    arguments = ["batch", str(lines), "-o", str(tmp_path / "out.jsonl"), "-m", tiny, "--max-tokens", "2"]
    first = emlocal(*arguments, "--adapter", str(folder))
    assert first.code == 0, first.err
    assert emlocal(*arguments, "--adapter", str(folder)).code == 0
    write_peft(random_adapter(layers=1, seed=9), tmp_path / "other")
    assert emlocal(*arguments, "--adapter", str(tmp_path / "other")).code != 0
