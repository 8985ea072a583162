"""Uses GGUF files as emlocal does: one path a line on stdin, one verdict a line on stdout.

`llama_worker` knows llama.cpp alone. This one also finds crashes that emlocal causes by its contexts, forks
and batches. Run it as a separate process.
"""

import sys
import warnings

import emlocal
from emlocal.errors import EmlocalError

TEXT = "the cat sat on the mat"


def use(path: str, parallel: int) -> None:
    """Runs a prompt, a conversation, and more prompts at once than there are sequences.

    Refusals are skipped.
    """
    with emlocal.load(path, parallel=parallel, threads=1) as model:
        for raw in (True, False):
            try:
                model.generate(TEXT, raw=raw, max_tokens=5, em=True)
            except EmlocalError:
                continue  # a context of one token, or logits that are NaN
        lines = [{"prompt": TEXT[: 3 + 5 * i], "samples": 2, "raw": True, "max_tokens": 4} for i in range(4)]
        list(model.batch(lines))


def main() -> None:
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        try:
            for parallel in (1, 3):
                use(line.rstrip("\n"), parallel)
            verdict = "answered"
        except EmlocalError as why:
            verdict = f"refused {why.message!r}"
        print(verdict, flush=True)


if __name__ == "__main__":
    main()
