"""From a model folder to a model, and to a running engine."""

from dataclasses import replace
from pathlib import Path

from emlocal.backends.base import LoadOptions, ModelInfo
from emlocal.backends.engine import Opened
from emlocal.backends.learner import Descent, EntropyLearner, EntropyObjective
from emlocal.backends.mlx.backend import MLXBackend
from emlocal.backends.mlx.device import Place, choose_place
from emlocal.backends.mlx.model import attach, context_of, linear_layers, load_model, windows
from emlocal.backends.slots import check_kv_type
from emlocal.models.adapters.adapter import Adapter
from emlocal.models.adapters.reading import in_memory
from emlocal.models.folder import FolderHeader, read_folder_header
from emlocal.models.gguf.header import GGUFHeader
from emlocal.models.tokenizer import Tokenizer


class MLXModel(Opened):
    """A model in MLX, to be trained or made an engine of."""

    place: Place

    def backend(self, options: LoadOptions, *, on_device_sampler: bool | None = None) -> MLXBackend:
        return MLXBackend(
            self.model, self.tokenizer, self.info, options, self.place, on_device_sampler=on_device_sampler
        )

    def linear_layers(self) -> dict[str, tuple[int, int]]:
        return linear_layers(self.model)

    def entropy_learner(
        self, adapter: Adapter, descent: Descent, objective: EntropyObjective, *, checkpointing: bool
    ) -> EntropyLearner:
        from emlocal.backends.mlx.learner import MLXEntropyLearner

        return MLXEntropyLearner(self.model, adapter, descent, objective, checkpointing=checkpointing)


def open_model(folder: Path, *, name: str = "", device: str = "auto", dtype: str = "auto") -> MLXModel:
    """The model in `folder`, loaded. `name`: what people call it.

    Raises ModelError for a folder that cannot be used, UsageError for a device or format that there is not.
    """
    header = read_folder_header(folder)
    return _open(header, choose_place(header.tensors, device, dtype), name)


def _open(header: FolderHeader, place: Place, name: str) -> MLXModel:
    tokenizer = Tokenizer(header.path)
    model = load_model(header, place)
    info = ModelInfo.of_folder(header, tokenizer, name)
    info = replace(info, trained_context=context_of(header, windows(model)))
    return MLXModel(model, tokenizer, info, place)


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
    check_kv_type("mlx", options.kv_type, place.format)
    adapters = [(in_memory(adapter, base), scale) for adapter, scale in options.adapters]
    opened = _open(header, place, name)
    for adapter, strength in adapters:
        attach(opened.model, adapter, strength, place.dtype, opened.info.name)
    return opened.backend(options, on_device_sampler=on_device_sampler)
