"""Contexts with fewer tokens than sequences: llama.cpp aborts if asked for more rows than fit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from emlocal.backends.engine import LoadOptions
from emlocal.backends.llama_cpp.backend import LlamaCppBackend
from emlocal.errors import UsageError
from emlocal.models.resolve import resolve
from tests.tiny_architectures import architecture_metadata, architecture_tensors
from tests.tiny_gguf import build, u32, write_tiny_gguf

pytestmark = pytest.mark.real
ASK = """
import sys, emlocal
path, context, parallel = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with emlocal.load(path, parallel=parallel, threads=1, context=context or None) as model:
    lines = [{"prompt": "abc", "raw": True, "max_tokens": 3}] * 3
    print([row.get("error", "answered") for row in model.batch(lines)])
"""


def asked(path: Path, context: int, parallel: int) -> "subprocess.CompletedProcess[str]":
    """Runs in a separate process, which an assertion in llama.cpp would end."""
    return subprocess.run(
        [sys.executable, "-c", ASK, str(path), str(context), str(parallel)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"GGML_NO_BACKTRACE": "1"},
    )


@pytest.mark.parametrize("parallel", [40, 254])
def test_more_sequences_than_tokens(tmp_path: Path, parallel: int) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf")
    done = asked(path, 16, parallel)
    assert done.stdout == f"{['answered'] * 3}\n", done.stderr[-500:]


def test_more_sequences_than_llama_cpp_has(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf")
    with pytest.raises(UsageError, match="257 sequences at once, emlocal's own included, exceed"):
        LlamaCppBackend(resolve(str(path)), LoadOptions(sequences=257))


@pytest.mark.parametrize(("architecture", "length"), [("llama", 1), ("llama", 2), ("gemma3", 1)])
def test_models_trained_for_a_token_or_two(tmp_path: Path, architecture: str, length: int) -> None:
    path = tmp_path / "model.gguf"
    metadata = architecture_metadata(architecture) | {f"{architecture}.context_length": u32(length)}
    path.write_bytes(build(metadata, architecture_tensors(architecture)))
    done = asked(path, 0, 1)
    assert done.stdout.count(f"the context holds {length}, one of them for the answer") == 3, done.stderr[
        -500:
    ]
