"""From a Hugging Face folder to a running engine."""

from dataclasses import replace
from pathlib import Path

import torch

from emlocal.backends.base import LoadOptions, ModelInfo
from emlocal.backends.engine import Opened
from emlocal.backends.learner import Descent, EntropyLearner, EntropyObjective, PolicyLearner
from emlocal.backends.slots import check_kv_type
from emlocal.backends.torch.backend import TorchBackend
from emlocal.backends.torch.device import Place, choose_place
from emlocal.backends.torch.model import (
    attach,
    can_pack,
    linear_layers,
    load_model,
    pack,
    skeleton,
    trained_context,
)
from emlocal.em.losses import PolicyObjective
from emlocal.models.adapters.adapter import Adapter
from emlocal.models.adapters.reading import in_memory
from emlocal.models.folder import sampling_settings
from emlocal.models.gguf.header import GGUFHeader
from emlocal.models.regular import read_json
from emlocal.models.tokenizer import Tokenizer


class TorchModel(Opened):
    """A model in torch, to be trained or made an engine of."""

    place: Place

    def backend(self, options: LoadOptions, *, on_device_sampler: bool | None = None) -> TorchBackend:
        return TorchBackend(
            self.model, self.tokenizer, self.info, options, self.place, on_device_sampler=on_device_sampler
        )

    def linear_layers(self) -> dict[str, tuple[int, int]]:
        return linear_layers(self.model)

    def entropy_learner(
        self, adapter: Adapter, descent: Descent, objective: EntropyObjective, *, checkpointing: bool
    ) -> EntropyLearner:
        from emlocal.backends.torch.learner import TorchEntropyLearner

        return TorchEntropyLearner(self.model, adapter, descent, objective, checkpointing=checkpointing)

    def policy_learner(
        self,
        adapter: Adapter,
        descent: Descent,
        objective: PolicyObjective,
        *,
        temperature: float,
        checkpointing: bool,
    ) -> PolicyLearner:
        from emlocal.backends.torch.learner import TorchPolicyLearner

        return TorchPolicyLearner(
            self.model, adapter, descent, objective, temperature=temperature, checkpointing=checkpointing
        )


def open_model(
    folder: Path, *, name: str = "", device: str = "auto", dtype: str = "auto", threads: int | None = None
) -> TorchModel:
    """The model in `folder`, loaded. `name`: what people call it; `threads`: of the CPU, from now on.

    Raises ModelError for a folder that cannot be used, UsageError for a device or format that there is not.
    """
    place = choose_place(device, dtype)
    if threads is not None:
        torch.set_num_threads(threads)
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
    return TorchModel(load_model(folder, place.device, place.dtype), tokenizer, info, place)


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
    """The engine on the model in `folder`, with its adapters.

    Args:
        name: what people call it.
        base: of the GGUF model that the folder was unpacked from; adapters in GGUF need it.
        on_device_sampler: see TorchBackend.

    Raises ModelError for a folder or adapter that cannot be used, UsageError for bad options; as much of it
    as can be known before the weights are loaded.
    """
    check_kv_type("torch", options.kv_type, choose_place(device, dtype).format)
    adapters = [_scaled(in_memory(adapter, base), scale) for adapter, scale in options.adapters]
    if adapters:
        layers = skeleton(folder)
        for adapter in adapters:
            attach(layers, adapter)
    opened = open_model(folder, name=name, device=device, dtype=dtype)
    for adapter in adapters:
        attach(opened.model, adapter, opened.place.dtype)
    if can_pack(opened.place.device, opened.place.dtype):
        pack(opened.model)
    return opened.backend(options, on_device_sampler=on_device_sampler)


def _scaled(adapter: Adapter, scale: float) -> Adapter:
    pairs = {name: replace(pair, scale=pair.scale * scale) for name, pair in adapter.pairs.items()}
    return Adapter(pairs, adapter.base_model)
