"""Adapters that requests choose by the model's id, on the command's own server with llama.cpp."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from emlocal.errors import UsageError
from emlocal.loading import named_apart
from emlocal.models.adapters.gguf_lora import write_gguf
from emlocal.models.gguf import read_header
from tests.tiny_gguf import write_tiny_gguf
from tests.tiny_pair import random_adapter

NAMES = ("tiny.gguf", "law", "code")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    base = read_header(write_tiny_gguf(folder / "tiny.gguf"))
    for seed, name in enumerate(NAMES[1:], 1):
        write_gguf(random_adapter(layers=1, seed=seed), folder / f"{name}.lora", base)
    return folder


@pytest.fixture(scope="module")
def url(files: Path) -> Iterator[str]:
    flags = ["-m", str(files / "tiny.gguf"), "--port", "0", "--threads", "1", "--context", "128"]
    flags += [word for name in NAMES[1:] for word in ("--adapter", f"{name}={files / name}.lora")]
    environment = os.environ | {"EMLOCAL_CACHE_DIR": str(files / "cache"), "COLUMNS": "400"}
    command = [sys.executable, "-m", "emlocal", "serve", *flags]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, text=True)
    assert server.stderr is not None
    try:
        for line in server.stderr:
            if " answers at http" in line:
                yield line.partition(" answers at ")[2].partition("/v1")[0]
                break
        else:
            pytest.fail("the server did not start")
    finally:
        server.terminate()
        server.communicate(timeout=60)
    assert server.returncode == 0


def asked(url: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def text(url: str, model: str, seed: int) -> str:
    response = asked(url, {"prompt": "abc" * 12, "model": model, "seed": seed, "max_tokens": 10})
    assert response.status_code == 200, response.text
    found: str = response.json()["choices"][0]["text"]
    return found


def test_the_ids_are_listed_and_chosen_together(url: str) -> None:
    listed = httpx.get(f"{url}/v1/models").json()["data"]
    assert {each["id"]: each["emlocal"].get("adapter") for each in listed} == {
        f"{name}{method}": None if name == NAMES[0] else name
        for name in NAMES
        for method in ("", ":em-inf", ":vote")
    }
    wanted = [(name, seed) for seed in range(4) for name in NAMES]
    alone = [text(url, *each) for each in wanted]
    with ThreadPoolExecutor(len(wanted)) as pool:
        together = [*pool.map(lambda each: text(url, *each), wanted)]
    assert together == alone
    assert all(len({*alone[i : i + 3]}) == 3 for i in range(0, len(alone), 3))


def test_the_page_offers_them(url: str) -> None:
    settings = {each["name"]: each for each in httpx.get(f"{url}/settings").json()["settings"]}
    assert settings["model"]["choices"] == [*NAMES]


def test_another_id_is_refused(url: str) -> None:
    response = asked(url, {"prompt": "x", "model": "../law"})
    assert response.status_code == 404
    assert json.loads(response.text)["error"]["code"] == "model_not_found"


def test_a_name_is_told_from_a_scale(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.mkdir()
    others, named = named_apart([str(path), f"{path}=0.5", f"law={path}", f"code={path}=2"])
    assert others == (str(path), f"{path}=0.5")
    assert named == {"law": (path, 1.0), "code": (path, 2.0)}
    for wrong in (f"a b={path}", f"../x={path}", f"={path}", f"law={path}/none"):
        with pytest.raises(UsageError):
            named_apart([wrong])
    with pytest.raises(UsageError, match="two adapters"):
        named_apart([f"law={path}", f"law={path}=2"])
