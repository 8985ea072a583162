"""Which model, and the engine that runs it."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from emlocal.backends import ENGINES
from emlocal.settings.table import Table, setting

if TYPE_CHECKING:
    BackendName = str
else:
    BackendName = Literal["auto", *ENGINES]
KVName = Literal["f32", "f16", "q8_0", "q4_0"]
PANEL = "Model and engine"
CONTEXT_NAMES = "--ctx-size --max-model-len --context-length --n-ctx --num-ctx --max-kv-size"
"""What other programs call the context."""
_setting = partial(setting, panel=PANEL)


@dataclass(frozen=True)
class EngineOptions:
    """Which model, and how to run it. None: as emlocal chooses."""

    model: str | None = _setting(
        None,
        "-m --model --hf-repo",
        help="Short name, .gguf file, or org/name:QUANT of the hub.",
        metavar="MODEL",
    )
    backend: BackendName | None = _setting(None, "--backend", help="Engine to run on.")
    adapter: tuple[str, ...] = _setting(
        (),
        "--adapter --lora --adapter-path",
        help="LoRA adapter: a PEFT or MLX folder, or a GGUF file. Repeatable.",
        metavar="PATH[=SCALE]",
    )
    context: int | None = _setting(
        None,
        f"-c --context {CONTEXT_NAMES}",
        16,
        help="Tokens of context. (default: the model's, at most 8192; 2048 in a batch)",
        unit="tokens",
    )
    threads: int | None = _setting(
        None, "-t --threads --n-threads", 1, help="CPU threads. (default: physical cores)"
    )
    kv_type: KVName | None = _setting(
        None,
        "--kv-type --kv-cache-dtype --cache-type",
        help="Type of the cached keys and values. (default: f16; in torch the model's)",
    )
    offline: bool = _setting(False, "--offline", help="Never use the network.")


ENGINE = Table.of(EngineOptions)
