"""GGUF models and adapters: read the header, check it, and only then let native code have the file.

    header = read_header(Path("model.gguf"))
    header.architecture, header.context_length, header.quantization, header.weights_bytes

A sharded model (`model-00001-of-00003.gguf`) is read as one, from any of its shards.
"""

from emlocal.models.gguf.adapter import MAX_LORA_RANK, read_adapter_header, read_adapter_pairs
from emlocal.models.gguf.header import ArrayRef, GGUFHeader, TensorInfo
from emlocal.models.gguf.model import read_header, shard_paths

__all__ = [
    "MAX_LORA_RANK",
    "ArrayRef",
    "GGUFHeader",
    "TensorInfo",
    "read_adapter_header",
    "read_adapter_pairs",
    "read_header",
    "shard_paths",
]
