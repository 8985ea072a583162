"""The least that decoding can cost on this engine: `llama_decode`, an argmax, and nothing else.

What `emlocal bench` holds the decode loop against. It is a program that someone could have written on
llama-cpp-python's C functions in ten lines, on the same model and context.
"""

import time

import numpy as np

from emlocal.backends.llama_cpp.backend import LlamaCppBackend
from emlocal.errors import BackendError


def bare_decode(backend: LlamaCppBackend, sequence: int, token: int, steps: int) -> list[float]:
    """Seconds of each of `steps` greedy steps after `token`; the sequence is as before afterwards."""
    lib, context, vocabulary = backend._lib, backend._context, backend.info.vocabulary
    batch = lib.llama_batch_init(1, 0, 1)
    start = backend.length(sequence)
    seconds = []
    try:
        for position in range(start, start + steps):
            began = time.perf_counter()
            batch.token[0], batch.pos[0], batch.logits[0] = token, position, 1
            batch.n_seq_id[0], batch.seq_id[0][0] = 1, sequence
            batch.n_tokens = 1
            if lib.llama_decode(context, batch) != 0:
                raise BackendError(f"llama_decode failed at position {position:,} of {backend.context:,}")
            logits = np.ctypeslib.as_array(lib.llama_get_logits(context), (vocabulary,))
            token = int(logits.argmax())
            seconds.append(time.perf_counter() - began)
    finally:
        lib.llama_memory_seq_rm(backend._memory, sequence, start, -1)
        lib.llama_batch_free(batch)
    return seconds
