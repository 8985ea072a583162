"""From a model folder to a running engine."""

from pathlib import Path

from emlocal.backends.base import LoadOptions, ModelInfo
from emlocal.backends.mlx.backend import MLXBackend, check_kv_type
from emlocal.backends.mlx.lora import attach
from emlocal.backends.mlx.model import context_of, load_model, windows
from emlocal.backends.mlx.place import choose_place
from emlocal.models.adapters.reading import read_adapter
from emlocal.models.folder import read_folder_header
from emlocal.models.gguf_header import GGUFHeader
from emlocal.models.tokenizer import Tokenizer


def open_folder(
    folder: Path,
    options: LoadOptions,
    *,
    name: str = "",
    base: GGUFHeader | None = None,
    device: str = "auto",
    dtype: str = "auto",
    on_device_sampler: bool | None = None,
) -> MLXBackend:
    """The engine on the model in `folder`, with its adapters.

    Args:
        name: what people call it.
        base: of the GGUF model that the folder was unpacked from; adapters in GGUF need it.
        on_device_sampler: see MLXBackend.

    Raises ModelError for a folder or adapter that cannot be used, UsageError for bad options.
    """
    header = read_folder_header(folder)
    place = choose_place(header.tensors, device, dtype)
    check_kv_type(options.kv_type, place.format)
    adapters = [(read_adapter(path, base), scale) for path, scale in options.adapters]
    tokenizer = Tokenizer(folder)
    model = load_model(header, place)
    name = name or header.name
    for adapter, strength in adapters:
        attach(model, adapter, strength, place.dtype, name)
    info = ModelInfo(
        name=name,
        architecture=header.architecture,
        vocabulary=header.vocab_size,
        trained_context=context_of(header, windows(model)),
        end_tokens=tokenizer.end_tokens,
        chat_template=tokenizer.chat_template,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        sampling=header.sampling,
    )
    return MLXBackend(model, tokenizer, info, options, place, on_device_sampler=on_device_sampler)
