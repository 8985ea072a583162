"""From a Hugging Face folder to a running engine."""

from dataclasses import replace
from pathlib import Path

from emlocal.backends.base import LoadOptions, ModelInfo
from emlocal.backends.torch.backend import TorchBackend
from emlocal.backends.torch.device import choose_place
from emlocal.backends.torch.lora import attach
from emlocal.backends.torch.model import load_model, sampling_settings, trained_context
from emlocal.models.adapters.adapter import Adapter
from emlocal.models.adapters.reading import read_adapter
from emlocal.models.gguf_header import GGUFHeader
from emlocal.models.json_file import read_json
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
) -> TorchBackend:
    """The engine on the model in `folder`.

    Args:
        name: what people call it.
        base: of the GGUF model that the folder was unpacked from; adapters in GGUF need it.
        on_device_sampler: see TorchBackend.

    Raises ModelError for a folder that cannot be used, UsageError for options that cannot be meant.
    """
    place = choose_place(device, dtype)
    config = read_json(folder / "config.json")
    tokenizer = Tokenizer(folder)
    info = ModelInfo(
        name=name or folder.name,
        architecture=str(config.get("model_type", "")),
        vocabulary=tokenizer.vocabulary,
        trained_context=trained_context(config),
        end_tokens=tokenizer.end_tokens,
        chat_template=tokenizer.chat_template,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        sampling=sampling_settings(folder),
    )
    adapters = [_scaled(read_adapter(path, base), scale) for path, scale in options.adapters]
    model = load_model(folder, place.device, place.dtype)
    for adapter in adapters:
        attach(model, adapter)
    return TorchBackend(model, tokenizer, info, options, place, on_device_sampler=on_device_sampler)


def _scaled(adapter: Adapter, scale: float) -> Adapter:
    pairs = {name: replace(pair, scale=pair.scale * scale) for name, pair in adapter.pairs.items()}
    return Adapter(pairs, adapter.base_model)
