"""GGUF models for the engines that cannot run them: unpacked once into a Hugging Face model folder.

    folder = unpack(resolve("smollm2:135m"))     # config.json, model.safetensors, tokenizer.json, …

The folder lies in emlocal's cache and may be deleted at any time. It needs neither torch nor transformers.
"""

import json
import os
import shutil
from pathlib import Path

from emlocal.errors import ModelError
from emlocal.files import only_one, put_folder_in_place
from emlocal.identity import UNPACKED_FORMAT, gguf_digest
from emlocal.models.gguf.header import shown
from emlocal.models.paths import Progress, cache_dir, check_space, disk_errors, silent
from emlocal.models.resolve import GGUFModel
from emlocal.models.safetensors import read_safetensors_header
from emlocal.text import parse_json

MANIFEST = "emlocal.json"
WEIGHTS = "model.safetensors"
_TOKENIZER_BYTES = 300  # of tokenizer.json for each token, generously


def unpack(model: GGUFModel, progress: Progress = silent) -> Path:
    """The folder with the model dequantized: F32, F16 and BF16 tensors as they are, quantized ones in F16.

    Made on the first call, which takes twice the model's parameters in bytes of disk, and found on later
    ones. Safe to call from several processes at once, and to kill at any time. Raises ModelError for an
    architecture, tokenizer or quantization that cannot be unpacked, and when the disk does not take it.
    """
    key = gguf_digest(model.header)
    folder = cache_dir() / "unpacked" / key
    if _is_whole(folder):
        return folder
    with disk_errors(folder.parent, "EMLOCAL_CACHE_DIR"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with only_one(
            folder.parent / f".{folder.name}.lock",
            lambda: progress("waiting for another emlocal that is unpacking this model", 0, None),
        ):
            if not _is_whole(folder):  # another process may have made it while this one waited
                _make(model, folder, progress)
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether all of it is there as it was written: the manifest, the sizes in it, the weights' header."""
    try:
        sizes = parse_json((folder / MANIFEST).read_text("utf-8"))["files"]
        if any((folder / name).stat().st_size != size for name, size in sizes.items()):
            return False
        read_safetensors_header(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ModelError):
        return False
    return WEIGHTS in sizes


def _make(model: GGUFModel, folder: Path, progress: Progress) -> None:
    """Fill a folder beside `folder` and rename it. The lock is held."""
    from emlocal.models.unpacked import config as words
    from emlocal.models.unpacked import weights as weights
    from emlocal.models.unpacked.tokenizer import build_tokenizer

    header = model.header
    words.check_architecture(header)
    tensors = words.tensors(header)
    weights.check_types(header, tensors)
    for stale in (*folder.parent.glob(f".{folder.name}-*/"), *([folder] if folder.exists() else [])):
        shutil.rmtree(stale)  # of a process that was killed, or damaged since
    needed = weights.file_bytes(tensors) + _TOKENIZER_BYTES * header.vocab_size
    check_space(folder.parent, needed, f"unpacking {shown(header.name)}")
    tokenizer, vocabulary = build_tokenizer(header)
    factors = header.tensors.get("rope_freqs.weight")
    config = words.model_config(
        header, vocabulary, tensors, weights.read_vector(factors) if factors is not None else []
    )
    partial = folder.with_name(f".{folder.name}-{os.getpid()}")
    partial.mkdir()
    try:
        for name, table in (
            ("config.json", config),
            ("generation_config.json", words.generation_config(header, vocabulary)),
            ("tokenizer_config.json", words.tokenizer_config(header, vocabulary)),
        ):
            (partial / name).write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", "utf-8")
        if header.chat_template is not None:
            (partial / "chat_template.jinja").write_text(header.chat_template, "utf-8", newline="")
        tokenizer.save(str(partial / "tokenizer.json"), pretty=False)
        weights.write_safetensors(partial / WEIGHTS, tensors, f"unpacking {shown(header.name)}", progress)
        sizes = {p.name: p.stat().st_size for p in sorted(partial.iterdir())}
        manifest = {"format": UNPACKED_FORMAT, "source": [str(f) for f in header.files], "files": sizes}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", "utf-8")
        put_folder_in_place(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
