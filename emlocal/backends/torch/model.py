"""Loading a Hugging Face folder: safetensors only, no code from the folder, no network, no chatter."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

from emlocal.backends.torch.decoder import attention_windows
from emlocal.errors import ModelError


def load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The causal language model in `folder`, ready to be run.

    Raises ModelError for a folder that is no such model, is incomplete, or has layers other than
    full or sliding attention.
    """
    with quiet():
        config = _read_config(folder)
        try:
            loader: Any = AutoModelForCausalLM
            model, loading = loader.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise ModelError(f"{folder} cannot be loaded: {_first_line(error)}") from None
        if missing := sorted(loading["missing_keys"]):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ModelError(
                f"{folder} has no weights for {missing[0]}{more}",
                "fetch the model again; a file may be missing",
            )
        try:
            model = model.eval().requires_grad_(False).to(device)
        except torch.OutOfMemoryError:
            size = sum(p.nbytes for p in model.parameters()) / 1e9
            raise ModelError(
                f"{folder} needs {size:.1f} GB; {device} has less free", "use a smaller model"
            ) from None
    loaded: nn.Module = model
    return loaded


def skeleton(folder: Path) -> nn.Module:
    """The model in `folder` without its weights (on torch's meta device): its layers, in milliseconds.

    Raises ModelError as `load_model` does for its configuration.
    """
    with quiet(), torch.device("meta"):
        loader: Any = AutoModelForCausalLM
        model: nn.Module = loader.from_config(_read_config(folder), trust_remote_code=False)
    return model


def _read_config(folder: Path) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} has no usable config.json: {_first_line(error)}") from None
    check_architecture(config.to_dict())
    return config


def check_architecture(config: Mapping[str, Any]) -> None:
    """Raise ModelError for a configuration (config.json) that is no decoder of attention layers alone."""
    name = config.get("model_type") or "?"
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{name} is an encoder and a decoder; the torch engine runs decoders only")
    if config.get("vision_config") or config.get("audio_config"):
        raise ModelError(f"{name} also takes pictures or sound; the torch engine runs text models only")
    attention_windows(config)


def trained_context(config: Mapping[str, Any]) -> int:
    """The tokens that the model was trained for; without stretching of positions that changes with length.

    Raises ModelError where the configuration does not tell.
    """
    length = config.get("max_position_embeddings")
    if not isinstance(length, int) or length < 1:
        raise ModelError(f"{config.get('model_type')}'s config.json has no max_position_embeddings")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        # these choose the frequencies by the longest row: rows of a batch would depend on each other
        original = rope.get("original_max_position_embeddings") or config.get(
            "original_max_position_embeddings"
        )
        length = min(length, original or length)
    return length


@contextmanager
def quiet() -> Iterator[None]:
    """Within this block transformers shows no bars and no warnings; what it was set to comes back."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(50)  # CRITICAL
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
