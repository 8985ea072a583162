"""Loads GGUF files with the real llama.cpp: one path a line on stdin, one verdict a line on stdout.

Run it as a separate process: a crash of llama.cpp ends this process, and the test sees which file caused it.
Loading includes the next steps of every use in emlocal: a context, encoding some text, decoding it and two
single tokens, and the logits of each.
"""

import ctypes
import sys

import llama_cpp

TEXT = b"the cat \xf0\x9f\x98\x80 <|im_start|>\n1+2=3"


def load(path: str) -> str:
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
    if not model:
        return "refused"
    try:
        return use(model)
    finally:
        llama_cpp.llama_model_free(model)


def use(model: int) -> str:
    vocab = llama_cpp.llama_model_get_vocab(model)
    tokens = (llama_cpp.llama_token * 128)()
    count = llama_cpp.llama_tokenize(vocab, TEXT, len(TEXT), tokens, 128, True, True)
    for token in range(llama_cpp.llama_vocab_n_tokens(vocab)):
        piece = ctypes.create_string_buffer(256)
        llama_cpp.llama_token_to_piece(vocab, token, piece, 256, 0, True)
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = 64, 1, 1
    parameters.n_batch = parameters.n_ubatch = 64
    parameters.n_seq_max, parameters.kv_unified = 4, True
    context = llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        return "no context"
    try:
        first = 0.0
        for number, length in enumerate((max(1, min(count, 32)), 1, 1)):
            status = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, length))
            if status != 0:
                return f"decode status {status}"
            logits = llama_cpp.llama_get_logits_ith(context, -1)
            if not logits:
                return "no logits"
            first = first if number else logits[0]
        return f"decoded {first:.3f}"
    finally:
        llama_cpp.llama_free(context)


@llama_cpp.llama_log_callback
def no_log(level: int, text: bytes, user_data: object) -> None:
    """Suppresses llama.cpp's many messages about broken files."""


def main() -> None:
    llama_cpp.llama_log_set(no_log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    for line in sys.stdin:
        print(load(line.rstrip("\n")), flush=True)


if __name__ == "__main__":
    main()
