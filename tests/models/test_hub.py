"""Models of the hub: the real huggingface_hub with a hub on localhost that misbehaves as hubs do."""

import os
from pathlib import Path

import pytest

from emlocal.errors import ModelError
from emlocal.models.hub import choose, models_among, quant_of
from tests.models.conftest import Resolve
from tests.models.fake_hub import FakeHub
from tests.models.gguf.test_shards import write_shards
from tests.tiny_gguf import tiny_gguf

REPO = "someone/Tiny-GGUF"


@pytest.fixture
def hub(fake_hub: FakeHub) -> FakeHub:
    """A hub with the tiny model under the names of two quantizations."""
    fake_hub.repos[REPO] = {
        "README.md": b"# Tiny",
        "tiny-Q4_K_M.gguf": tiny_gguf(seed=1),
        "tiny-Q8_0.gguf": tiny_gguf(seed=2),
        "mmproj-tiny-F16.gguf": b"GGUF not a model",
    }
    return fake_hub


def test_the_default_quantization_is_fetched_and_then_used_without_a_request(
    hub: FakeHub, resolve: Resolve
) -> None:
    first = resolve(REPO)
    assert first["source"] == "hub"
    assert Path(first["path"]).name == "tiny-Q4_K_M.gguf"
    assert Path(first["path"]).read_bytes() == tiny_gguf(seed=1)
    size = len(tiny_gguf())
    assert first["progress"][-1] == [f"fetching {REPO}", size, size]
    hub.requests.clear()
    again = resolve(REPO)
    assert again["path"] == first["path"]
    assert hub.requests == []
    assert resolve(f"{REPO}:q4_k_m", offline=True)["path"] == first["path"]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        (f"{REPO}:Q8_0", "tiny-Q8_0.gguf"),
        (f"{REPO}:q8_0", "tiny-Q8_0.gguf"),
        (f"{REPO}:tiny-Q8_0.gguf", "tiny-Q8_0.gguf"),
        (f"hf.co/{REPO}", "tiny-Q4_K_M.gguf"),
        (f"https://huggingface.co/{REPO}:Q4_K_M", "tiny-Q4_K_M.gguf"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_ways_to_name_it(resolve: Resolve, name: str, file: str) -> None:
    assert Path(resolve(name)["path"]).name == file


@pytest.mark.usefixtures("hub")
def test_a_cached_quantization_does_not_stand_in_for_another(resolve: Resolve) -> None:
    resolve(f"{REPO}:Q8_0")
    assert Path(resolve(f"{REPO}:Q4_K_M")["path"]).name == "tiny-Q4_K_M.gguf"


def test_shards_are_fetched_together(hub: FakeHub, resolve: Resolve, tmp_path: Path) -> None:
    paths = write_shards(tmp_path / "made", stem="big-Q4_K_M")
    hub.repos[REPO] = {f"Q4_K_M/{p.name}": p.read_bytes() for p in paths}
    answer = resolve(REPO)
    assert [Path(f).name for f in answer["files"]] == [p.name for p in paths]
    total = sum(p.stat().st_size for p in paths)
    done = [step[1] for step in answer["progress"]]
    assert done == sorted(done)
    assert answer["progress"][-1][1:] == [total, total]
    hub.requests.clear()
    assert resolve(REPO, offline=True)["files"] == answer["files"]
    Path(answer["files"][1]).unlink()
    assert "is not on this machine" in resolve(REPO, offline=True)["error"]
    assert resolve(REPO)["files"] == answer["files"], "only the lost shard is fetched again"
    assert [r for r in hub.requests if r.startswith("GET") and "00001" in r] == []


def test_the_connection_breaks_and_the_download_goes_on(hub: FakeHub, resolve: Resolve) -> None:
    hub.cuts["tiny-Q4_K_M.gguf"] = 2
    answer = resolve(REPO)
    assert Path(answer["path"]).read_bytes() == tiny_gguf(seed=1)
    assert len([r for r in hub.requests if r.startswith("GET") and "Q4_K_M" in r]) == 3


def test_the_connection_breaks_for_good_and_nothing_half_is_left(
    hub: FakeHub, resolve: Resolve, tmp_path: Path
) -> None:
    hub.cuts["tiny-Q4_K_M.gguf"] = 1000
    answer = resolve(REPO)
    assert REPO in answer["error"]
    assert not list((tmp_path / "hf").rglob("*.incomplete"))
    hub.cuts.clear()
    assert Path(resolve(REPO)["path"]).read_bytes() == tiny_gguf(seed=1)


@pytest.mark.usefixtures("hub")
def test_parts_of_killed_downloads_are_cleared_away(resolve: Resolve) -> None:
    blobs = Path(resolve(f"{REPO}:Q8_0")["path"]).resolve().parent
    old, new = blobs / "old.1234.incomplete", blobs / "new.1234.incomplete"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (0, 0))
    resolve(f"{REPO}:Q4_K_M")
    assert (old.exists(), new.exists()) == (False, True)


def test_what_the_hub_does_not_have(hub: FakeHub, resolve: Resolve) -> None:
    answer = resolve("someone/Other-GGUF")
    assert "has no model someone/Other-GGUF, or it is private" in answer["error"]
    assert "hf auth login" in answer["hint"]
    answer = resolve(f"{REPO}:Q2_K")
    assert answer["error"] == f"{REPO} has no Q2_K; it has Q4_K_M, Q8_0"
    assert answer["hint"] == f"name one of them: {REPO}:Q4_K_M"
    assert "has no nothing.gguf" in resolve(f"{REPO}:nothing.gguf")["error"]
    hub.repos["someone/Safetensors"] = {"model.safetensors": b"x"}
    assert "someone/Safetensors has no GGUF model" in resolve("someone/Safetensors")["error"]


def test_gated(hub: FakeHub, resolve: Resolve) -> None:
    hub.gated.add(REPO)
    answer = resolve(REPO)
    assert f"{REPO} is gated" in answer["error"]
    assert f"{hub.url}/{REPO}" in answer["hint"]
    assert "hf auth login" in answer["hint"]


def test_not_cached_and_offline(hub: FakeHub, resolve: Resolve, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = resolve(REPO, offline=True)
    assert answer["error"] == f"{REPO} is not on this machine, and --offline is set"
    assert answer["hint"] == f"fetch it: emlocal models pull {REPO}"
    assert resolve(REPO, download=False)["error"] == f"{REPO} is not on this machine"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in resolve(REPO)["error"]
    assert hub.requests == []


def test_no_network(resolve: Resolve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the port of "discard": nobody listens
    answer = resolve(REPO)
    assert "cannot reach http://127.0.0.1:9" in answer["error"]
    assert "emlocal models list" in answer["hint"]


def test_the_hub_is_out_of_order(hub: FakeHub, resolve: Resolve) -> None:
    hub.status = 503
    assert f"answered 503 for {REPO}" in resolve(REPO)["error"]


def test_what_came_is_no_model(hub: FakeHub, resolve: Resolve) -> None:
    hub.repos[REPO] = {"tiny-Q4_K_M.gguf": tiny_gguf()[:-1000]}
    assert "not a usable GGUF file" in resolve(REPO)["error"]


def test_a_file_larger_than_the_disk_is_not_begun(hub: FakeHub, resolve: Resolve) -> None:
    class Huge(bytes):
        """Claims to be a petabyte, which is all that the test needs."""

        def __len__(self) -> int:
            return 10**15

    hub.repos[REPO] = {"tiny-Q4_K_M.gguf": Huge()}
    answer = resolve(REPO)
    assert f"{REPO} needs 1000000.0 GB of disk" in answer["error"]
    assert [r for r in hub.requests if "resolve" in r] == []


@pytest.mark.usefixtures("hub")
def test_a_cache_that_cannot_be_written(resolve: Resolve, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "hub").write_text("a file where the folder should be")
    answer = resolve(REPO)
    assert f"cannot write to {tmp_path / 'hf' / 'hub'}" in answer["error"]
    assert "HF_HOME=" in answer["hint"]


# --- choosing, without any hub


@pytest.mark.parametrize(
    ("file", "quant"),
    [
        ("qwen2.5-0.5b-instruct-q4_k_m.gguf", "Q4_K_M"),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "Q4_1"),
        ("Qwen3-8B-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("Q5_K_M/big-Q5_K_M-00001-of-00003.gguf", "Q5_K_M"),
        ("model-IQ4_XS.gguf", "IQ4_XS"),
        ("model-bf16.gguf", "BF16"),
        ("model.fp16.gguf", "F16"),
        ("gpt-oss-20b-MXFP4.gguf", "MXFP4"),
        ("model.gguf", ""),
        ("Qwen-v4-model.gguf", ""),
    ],
)
def test_quantization_in_a_name(file: str, quant: str) -> None:
    assert quant_of(file) == quant


def test_incomplete_shards_are_no_model() -> None:
    files = ["a-Q4_K_M-00001-of-00002.gguf", "b-Q8_0.gguf", "notes.txt", "mmproj-b.gguf", "\x1b.gguf"]
    assert models_among(files) == {"b-Q8_0.gguf": ("b-Q8_0.gguf",)}


def test_default_order() -> None:
    assert choose("r", ["a-Q8_0.gguf", "a-Q4_0.gguf", "a-F16.gguf"], None) == ("a-Q4_0.gguf",)
    assert choose("r", ["a-IQ1_S.gguf"], None) == ("a-IQ1_S.gguf",)
    assert choose("r", ["a-UD-Q4_K_XL.gguf", "a-Q2_K.gguf"], "q4_k_xl") == ("a-UD-Q4_K_XL.gguf",)
    assert choose("r", ["a-UD-Q2_K.gguf", "a-Q2_K.gguf"], "Q2_K") == ("a-Q2_K.gguf",)


def test_what_is_not_clear_is_listed() -> None:
    with pytest.raises(ModelError, match="r has more than one Q8_0; it has a-Q8_0"):
        choose("r", ["a-Q8_0.gguf", "b-Q8_0.gguf"], "Q8_0")
    with pytest.raises(ModelError, match="r has no model of a default quantisation; it has IQ1_S, IQ2_S"):
        choose("r", ["a-IQ1_S.gguf", "a-IQ2_S.gguf"], None)
