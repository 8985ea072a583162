"""From a Hugging Face folder to a running engine."""

from pathlib import Path

from emlocal.backends.base import LoadOptions, ModelInfo
from emlocal.backends.torch.backend import TorchBackend
from emlocal.backends.torch.device import choose_place
from emlocal.backends.torch.model import load_model, sampling_settings, trained_context
from emlocal.errors import UsageError
from emlocal.models.json_file import read_json
from emlocal.models.tokenizer import Tokenizer


def open_folder(
    folder: Path,
    options: LoadOptions,
    *,
    name: str = "",
    device: str = "auto",
    dtype: str = "auto",
    on_device_sampler: bool | None = None,
) -> TorchBackend:
    """The engine on the model in `folder`; `name` is what people call it.

    Raises ModelError for a folder that cannot be used, UsageError for options that cannot be meant.
    """
    if options.adapters:
        raise UsageError("the torch engine of this version loads no adapters", "use --backend llama.cpp")
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
    model = load_model(folder, place.device, place.dtype)
    return TorchBackend(model, tokenizer, info, options, place, on_device_sampler=on_device_sampler)
