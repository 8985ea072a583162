"""Which model, and the engine that runs it."""

from dataclasses import dataclass
from typing import Literal

from emlocal.backends import ENGINES
from emlocal.settings.table import Table, setting

KVName = Literal["f32", "f16", "q8_0", "q4_0"]
PANEL = "Model and engine"
CONTEXT_NAMES = ("--ctx-size", "--max-model-len", "--context-length", "--n-ctx", "--num-ctx", "--max-kv-size")
"""What other programs call the context."""


@dataclass(frozen=True)
class EngineOptions:
    """Which model, and how to run it. None: as emlocal chooses."""

    model: str | None = setting(
        None,
        "--model",
        help="Short name, .gguf file, or org/name:QUANT of the hub.",
        kind="text",
        aliases=("--hf-repo",),
        short="-m",
        metavar="MODEL",
        panel=PANEL,
    )
    backend: str | None = setting(
        None,
        "--backend",
        help="Engine to run on.",
        choices=("auto", *ENGINES),
        panel=PANEL,
    )
    adapter: tuple[str, ...] = setting(
        (),
        "--adapter",
        help="LoRA adapter: a PEFT or MLX folder, or a GGUF file. Repeatable.",
        kind="texts",
        aliases=("--lora", "--adapter-path"),
        metavar="PATH[=SCALE]",
        panel=PANEL,
    )
    context: int | None = setting(
        None,
        "--context",
        16,
        help="Tokens of context. (default: the model's, at most 8192; 2048 in a batch)",
        kind="whole",
        aliases=CONTEXT_NAMES,
        short="-c",
        panel=PANEL,
        unit="tokens",
    )
    threads: int | None = setting(
        None,
        "--threads",
        1,
        help="CPU threads. (default: physical cores)",
        kind="whole",
        aliases=("--n-threads",),
        short="-t",
        panel=PANEL,
    )
    kv_type: KVName | None = setting(
        None,
        "--kv-type",
        help="Type of the cached keys and values. (default: f16; in torch the model's)",
        choices=("f32", "f16", "q8_0", "q4_0"),
        aliases=("--kv-cache-dtype", "--cache-type"),
        panel=PANEL,
    )
    offline: bool = setting(False, "--offline", help="Never use the network.", panel=PANEL)


ENGINE = Table.of(EngineOptions)
