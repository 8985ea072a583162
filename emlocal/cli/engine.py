"""From flags to a loaded model, with the one line that says which and why."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emlocal import console
from emlocal.backends.base import Backend, LoadOptions
from emlocal.backends.context import context_length
from emlocal.backends.select import load_backend, select_backend
from emlocal.cli.options import EngineOptions
from emlocal.errors import UsageError
from emlocal.generation import interruptible
from emlocal.models.gguf import read_adapter_header
from emlocal.models.memory import KV_TYPE_BYTES, check_memory
from emlocal.models.resolve import LocalModel, resolve


@contextmanager
def open_backend(options: EngineOptions, *, sequences: int, quiet: bool) -> Iterator[Backend]:
    """Resolve, check and load the model; free it at the end.

    Raises UsageError for settings out of range, ModelError for a model or adapter that cannot be used.
    """
    _check(options)
    name, reason = select_backend(str(options.backend or "auto"))
    if options.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    with console.progress(quiet) as progress:
        model = resolve(options.model, offline=bool(options.offline), progress=progress)
    adapters = tuple(_adapter(text, model) for text in options.adapter or [])
    context = context_length(options.context, model.header.context_length)
    kv_type = str(options.kv_type or "f16")
    check_memory(model.header, context, kv_type_bytes=KV_TYPE_BYTES[kv_type])
    load = LoadOptions(
        context=context,
        sequences=sequences,
        threads=options.threads,
        kv_type=kv_type,  # type: ignore[arg-type]  # KVChoice has the same words
        adapters=adapters,
    )
    with interruptible() as cancelled:  # llama.cpp calls back while it loads: nothing may be raised there
        backend = load_backend(name, model, load)
    if cancelled.requested:
        backend.close()
        raise KeyboardInterrupt
    if not quiet:
        console.note(
            f"{backend.info.name} ({model.header.quantization}) on {name}, {reason}; {backend.describe()}"
        )
    try:
        yield backend
    finally:
        backend.close()


def _check(options: EngineOptions) -> None:
    if options.context is not None and options.context < 16:
        raise UsageError(f"--context is {options.context}; it must be at least 16 tokens")
    cores = os.cpu_count() or 1
    if options.threads is not None and not 1 <= options.threads <= 4 * cores:
        raise UsageError(f"--threads is {options.threads}; it must be between 1 and {4 * cores} here")


def _adapter(text: str, model: LocalModel) -> tuple[Path, float]:
    """FILE or FILE=SCALE, the file checked against the model."""
    path, scale = Path(text), 1.0
    if not path.exists() and "=" in text:
        name, _, number = text.rpartition("=")
        try:
            path, scale = Path(name), float(number)
        except ValueError:
            raise UsageError(f"--adapter is {text!r}; after '=' comes the scale, a number") from None
    if not path.exists():
        raise UsageError(f"there is no adapter {path}")
    if path.is_dir() or path.suffix != ".gguf":
        raise UsageError(f"{path} is no GGUF adapter, and the llama.cpp engine loads no other kind")
    read_adapter_header(path, model.header)
    return path, scale
