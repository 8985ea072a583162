"""Compares one adapter in llama.cpp and torch, attached and merged: greedy answers and logits on 20 prompts.

llama.cpp rounds activations to 8 bits beside quantized weights, and that alone reverses near ties of small
models. So the comparison runs twice: with the quantized file as it is, and with the same weights in float32,
where only the order of sums differs.

    python benchmarks/adapter_agreement.py --model smollm2:135m --adapter out --questions test.jsonl
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from common import circumstances, say

TOKENS = 48


def dequantized(source: Path, target: Path, rounded: type | None = None) -> None:
    """Writes the GGUF file with all tensors in float32.

    `rounded`: a format that quantized ones are rounded to first.
    """
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, inner)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if rounded is not None and tensor.tensor_type > gguf.GGMLQuantizationType.F16:
            values = values.astype(rounded)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def greedy(backend: Any, prompt: list[int]) -> tuple[list[int], Any]:
    """Returns the greedy tokens, and the logits after the prompt."""
    import numpy as np

    from emlocal.backends.base import Feed

    sequence = backend.open()
    backend.forward([Feed(sequence, prompt)])
    first = row = backend.logits(sequence)
    tokens: list[int] = []
    while len(tokens) < TOKENS and (not tokens or tokens[-1] not in backend.info.end_tokens):
        tokens.append(int(np.argmax(row)))
        backend.forward([Feed(sequence, tokens[-1:])])
        row = backend.logits(sequence)
    backend.release(sequence)
    return tokens, first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True)
    chosen = parser.parse_args()
    import numpy as np

    from emlocal.backends.engine import LoadOptions, engine
    from emlocal.backends.torch.backend import open_folder
    from emlocal.generation.prompt import chat_tokens
    from emlocal.models.adapters import read_adapter
    from emlocal.models.adapters.merge import merge, open_model
    from emlocal.models.resolve import resolve
    from emlocal.models.unpacked import unpack
    from emlocal.training.prompts import read_prompts

    model = resolve(chosen.model)
    folder = unpack(model)
    options = LoadOptions(context=1024, adapters=((chosen.adapter, 1.0),))
    found: dict[str, list[tuple[list[int], Any]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        exact, merged = Path(temporary) / "float32.gguf", Path(temporary) / "merged"
        dequantized(model.path, exact)
        merge(read_adapter(chosen.adapter), 1.0, open_model(folder), merged)
        engines = {
            "torch": lambda: open_folder(folder, options, dtype="float32"),
            "torch, merged": lambda: open_folder(merged, LoadOptions(context=1024), dtype="float32"),
            "llama.cpp, float32": lambda: engine("llama.cpp").load(resolve(str(exact)), options),
            "llama.cpp, quantized": lambda: engine("llama.cpp").load(model, options),
            "llama.cpp, quantized, no adapter": lambda: engine("llama.cpp").load(
                model, LoadOptions(context=1024)
            ),
        }
        for name, load in engines.items():
            backend = load()
            prompts = [
                chat_tokens(backend, p.messages) for p in read_prompts(str(chosen.questions), limit=20)
            ]
            found[name] = [greedy(backend, prompt) for prompt in prompts]
            backend.close()
            say(f"{name}: done")
    around = circumstances()
    print(f"`{around['command']}`, commit {around['commit']}, {around['date']}\n")
    print(
        f"| against torch | answers equal ({TOKENS} tokens at most)"
        " | largest difference of log-probabilities |"
    )
    print("|---|---|---|")
    for name, answers in found.items():
        if name == "torch":
            continue
        equal = sum(a[0] == b[0] for a, b in zip(answers, found["torch"], strict=True))
        apart = max(
            float(np.abs(log_p(a[1]) - log_p(b[1]))[log_p(b[1]) > -10].max())
            for a, b in zip(answers, found["torch"], strict=True)
        )
        print(f"| {name} | {equal} of {len(answers)} | {apart:.4f} |")


def log_p(row: Any) -> Any:
    import numpy as np

    shifted = row.astype(np.float64) - row.max()
    return shifted - np.log(np.exp(shifted).sum())


if __name__ == "__main__":
    main()
