"""Compares MLX with mlx-lm and llama.cpp on 20 prompts: greedy tokens, and EM-INF's with the same seeds.

mlx-lm runs the same folder in the same format. llama.cpp runs the same weights in float32, rounded to float16
as in unpacking, so that only the order of sums differs; its keys and values are float32 too. Where two
answers part, the probabilities of both tokens in that row show how near a tie it was.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from adapter_agreement import dequantized
from common import MODELS, arguments, report, say

PROMPTS = [
    *("The capital of France is", "Water boils at", "Two plus two is", "The sky is", "My name is"),
    *("Once upon a time", "def add(a, b):", "Dear Sir or", "1, 2, 3, 4,", "The opposite of hot"),
    *("La vie est", "Roses are red,", "To be or not", "The largest planet", "Hello, how are"),
    *("Question: Why?", "x = [1,", "She opened the", "In the year", "Thank you"),
]


def spoken(backend: Any, prompt: list[int], params: Any, tokens: int) -> tuple[list[int], list[Any]]:
    """Draws tokens with seed 1; returns them with the rows of logits behind them."""
    from emlocal.backends.base import Feed, Row
    from emlocal.sampling import Uniforms

    uniforms, said, rows = Uniforms(1), [], []
    sequence = backend.open()
    backend.forward([Feed(sequence, prompt)])
    for t in range(tokens):
        rows.append(backend.logits(sequence))
        said.append(backend.sample([Row(sequence, params, uniforms[t])])[0].token)
        if t + 1 < tokens:
            backend.forward([Feed(sequence, said[-1:])])
    backend.release(sequence)
    return said, rows


def mlx_lm(folder: Path, dtype: Any) -> Callable[[list[int], int], list[int]]:
    """Returns a function that gives mlx-lm's own greedy tokens."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(dtype)
    return lambda prompt, n: [int(t) for t, _ in generate_step(mx.array(prompt), model, max_tokens=n)]


def parting(backend: Any, one: tuple[list[int], list[Any]], other: tuple[list[int], list[Any]]) -> str | None:
    """Describes where two answers part.

    It names the tokens, their probabilities in both engines, and the rows' distance.
    """
    at = next((i for i, (a, b) in enumerate(zip(one[0], other[0], strict=True)) if a != b), None)
    if at is None:
        return None
    tokens = [one[0][at], other[0][at]]
    ps = []
    for row in (one[1][at], other[1][at]):
        p = np.exp(row.astype(np.float64) - row.max())
        ps.append((p / p.sum())[tokens])
    texts = [backend.token_bytes(token).decode(errors="replace") for token in tokens]
    far = float(np.abs(one[1][at] - other[1][at]).max())
    sides = " and ".join(f"{p[0]:.4f} / {p[1]:.4f}" for p in ps)
    return f"token {at}: {texts[0]!r} or {texts[1]!r}, {sides}; logits differ by {far:.1e} at most"


def compare(name: str, parts: list[str], tokens: int) -> dict[str, Any]:
    from emlocal.backends.base import LoadOptions
    from emlocal.backends.llama_cpp import LlamaCppBackend
    from emlocal.backends.mlx.backend import open_folder
    from emlocal.models.resolve import resolve
    from emlocal.models.unpacked import unpack
    from emlocal.sampling import SamplingParams
    from emlocal.settings import EMInf

    model = resolve(str(MODELS[name]))
    folder = unpack(model)
    engine = open_folder(folder, LoadOptions(context=256, sequences=2))
    prompts = [engine.encode(text, add_special=True, parse_special=False) for text in PROMPTS]
    kinds = {"greedy": SamplingParams(temperature=0), "em-inf": SamplingParams(em=EMInf())}
    ours: dict[str, list[Any]] = {"greedy": [], "em-inf": []}
    for kind in ours if "llama.cpp" in parts else ("greedy",):
        for prompt in prompts:
            ours[kind].append(spoken(engine, prompt, kinds[kind], tokens))
            say(f"{name}, mlx, {kind}: {len(ours[kind])}")
    found: dict[str, Any] = {}
    if "mlx-lm" in parts:
        theirs = mlx_lm(folder, engine.place.dtype)
        equal = [
            theirs(prompt, tokens) == said for prompt, (said, _) in zip(prompts, ours["greedy"], strict=True)
        ]
        found["mlx-lm, greedy"] = {"answers": sum(equal), "tokens": None, "partings": []}
    if "llama.cpp" in parts:
        with tempfile.TemporaryDirectory() as place:
            path = Path(place, "float32.gguf")
            dequantized(model.path, path, rounded=np.float16)
            other = LlamaCppBackend(resolve(str(path)), LoadOptions(context=256, sequences=2, kv_type="f32"))
            for kind, params in kinds.items():
                theirs_said = [spoken(other, prompt, params, tokens) for prompt in prompts]
                pairs = list(zip(ours[kind], theirs_said, strict=True))
                partings = [parting(engine, one, two) for one, two in pairs]
                same = [a == b for (one, _), (two, _) in pairs for a, b in zip(one, two, strict=True)]
                found[f"llama.cpp, {kind}"] = {
                    "answers": partings.count(None),
                    "tokens": sum(same) / len(same),
                    "partings": [f"{PROMPTS[i]!r}, {p}" for i, p in enumerate(partings) if p],
                }
            other.close()
    engine.close()
    return found


def main() -> None:
    chosen = arguments(__doc__ or "", parts=("mlx-lm", "llama.cpp"), tokens=16)
    results = {name: compare(name, chosen.part, chosen.tokens) for name in chosen.model}
    rows = []
    for name, found in results.items():
        for other, of in found.items():
            share = "" if of["tokens"] is None else f"{of['tokens']:.1%}"
            rows.append((name, other, f"{of['answers']} of {len(PROMPTS)}", share))
    report(results, ("model", "beside", "equal answers", "equal tokens"), rows, chosen.json)
    if not chosen.json:
        for name, found in results.items():
            for other, of in found.items():
                for line in of["partings"]:
                    print(f"\n{name}, {other}: {line}")


if __name__ == "__main__":
    main()
