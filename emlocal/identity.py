"""Names and digests that identify a model, an adapter and a run, and the differences between two runs.

Files of earlier versions contain these names and digests. Outputs, runs and unpacked models are found again
by them, so none of them may change.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from emlocal.settings import SamplingParams, describe_em, settings_of

if TYPE_CHECKING:
    from emlocal.batch.run import BatchSettings
    from emlocal.loading import Loaded
    from emlocal.models.gguf.header import GGUFHeader
    from emlocal.models.resolve import Model

UNPACKED_FORMAT = 1
"""Version of the unpacked format.

Increase it whenever the same GGUF file gives another folder: for an engine that runs the folder, this is
another model.
"""
_SAMPLE_BYTES = 4096
_END_BYTES = 1 << 20  # read from either end of a model file
_SHOWN = 60
_NOT_SET = "not set"


def sha256(files: Sequence[Path]) -> str:
    """Returns the SHA-256 of all bytes of a model's files, in their order. Takes about a second per GB."""
    hashed = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                hashed.update(block)
    return hashed.hexdigest()


def fingerprint(*files: Path) -> str:
    """Returns a file's name, size, and a digest of its ends: quick, and enough to tell models apart."""
    hashed = hashlib.blake2b(digest_size=8)
    for path in files:
        with path.open("rb") as file:
            hashed.update(file.read(_END_BYTES))
            file.seek(-min(_END_BYTES, path.stat().st_size), os.SEEK_END)
            hashed.update(file.read())
    return f"{files[0].name}, {sum(f.stat().st_size for f in files):,} bytes, {hashed.hexdigest()}"


def gguf_digest(header: "GGUFHeader") -> str:
    """Returns a name for the contents of a GGUF model, wherever its file is: 32 hexadecimal digits.

    The name is a hash of the sizes, of all bytes before the weights, and of 4 kB from the middle of every
    tensor. The bytes before the weights are metadata, vocabulary, and names and places of tensors. Fine-tuned
    and merged models differ from their base in all or most rows of the tensors they touch, so the name tells
    them apart, in milliseconds. A hash of every byte would take seconds per gigabyte at each start. A patch
    of single rows in place can go unnoticed.
    """
    from emlocal.files import open_regular

    digest = hashlib.sha256(f"emlocal unpacked {UNPACKED_FORMAT}".encode())
    for path in header.files:
        inside = sorted((t for t in header.tensors.values() if t.file == path), key=lambda t: t.offset)
        with open_regular(path) as file:
            digest.update(os.fstat(file.fileno()).st_size.to_bytes(8, "little"))
            digest.update(file.read(inside[0].offset if inside else -1))
            for tensor in inside:
                file.seek(tensor.offset + max(tensor.nbytes - _SAMPLE_BYTES, 0) // 2)
                digest.update(file.read(min(_SAMPLE_BYTES, tensor.nbytes)))
    return digest.hexdigest()[:32]


def weights_digest(model: "Model") -> str:
    """Returns a digest of the weights that a training run begins with, in whatever format they are."""
    from emlocal.models.resolve import GGUFModel

    if isinstance(model, GGUFModel):
        return gguf_digest(model.header)
    digest = hashlib.sha256()
    for path in model.files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def batch_identity(settings: "BatchSettings", loaded: "Loaded") -> dict[str, object]:
    """Returns the facts that make the rows of two runs differ, for the manifest.

    A resumed run must have the same.
    """
    from emlocal.models.adapters import adapter_files

    plan, backend = settings.plan, loaded.backend
    return {
        "model": fingerprint(*loaded.model.files),
        "adapters": [[fingerprint(*adapter_files(path)), scale] for path, scale in loaded.adapters],
        **settings.method.identity(),
        "system": settings.system,
        "raw": settings.raw,
        "keep": settings.keep,
        "format": "openai" if settings.openai else "emlocal",
        "engine": f"{backend.name}, {backend.arithmetic}",
        "context": backend.context,
        "samples": plan.samples,
        "seed": plan.seed,
        "max-tokens": plan.max_tokens,
        "stop": list(plan.stop),
        "em": describe_em(plan.params.em),
        "sampling": {name: vars(plan.params)[name] for name in settings_of(SamplingParams)},
        "logit-bias": [list(pair) for pair in plan.params.logit_bias],
        # later settings appear only if given: outputs begun before these settings existed can still be
        # resumed
        **({} if settings.calibration is None else {"calibration": settings.calibration.digest}),
        **({} if plan.constraint is None else {plan.constraint.kind: plan.constraint.text}),
        **({"thinking": plan.thinking} if plan.thinking else {}),
        **({} if settings.abstain_below is None else {"abstain-below": settings.abstain_below}),
    }


def differences(old: Mapping[str, object], new: Mapping[str, object]) -> str:
    """Returns `name: old -> new` for every setting that differs, by its dotted name; "" if none differs."""
    before, now = _leaves(old), _leaves(new)
    names = [*now, *(name for name in before if name not in now)]
    pairs = [(name, before.get(name, _NOT_SET), now.get(name, _NOT_SET)) for name in names]
    return "; ".join(f"{name}: {_excerpt(was, is_)}" for name, was, is_ in pairs if was != is_)


def _leaves(settings: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Returns every setting by its dotted name, as JSON text; whole numbers are the same with `.0`."""
    leaves: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            leaves |= _leaves(value, f"{prefix}{name}.")
        else:
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            leaves[f"{prefix}{name}"] = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return leaves


def _excerpt(old: str, new: str) -> str:
    """Returns `old -> new`; for long texts, the part where they begin to differ."""
    if max(len(old), len(new)) <= _SHOWN:
        return f"{old} -> {new}"
    shorter = min(len(old), len(new))
    first = next((at for at in range(shorter) if old[at] != new[at]), shorter)
    start = max(0, first - _SHOWN // 4)
    return f"{_part(old, start)} -> {_part(new, start)}"


def _part(text: str, start: int) -> str:
    before = "…" if start else ""
    after = "…" if len(text) > start + _SHOWN else ""
    return before + text[start : start + _SHOWN] + after
