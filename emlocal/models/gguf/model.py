"""GGUF models: read the header, check it, and only then let native code have the file."""

import re
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from emlocal.errors import ModelError
from emlocal.models.gguf import types
from emlocal.models.gguf.checks import check_language_model, check_tokens
from emlocal.models.gguf.file import parse_file
from emlocal.models.gguf.header import GGUFHeader, TensorInfo, int_or_none, shown, unusable
from emlocal.models.gguf.known import Known, recall, remember

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


def read_header(path: Path) -> GGUFHeader:
    """Read and check a language model. Raises ModelError with one line that says what is wrong and where.

    What this accepts llama.cpp loads, or refuses with an error; docs/models.md says what that rests on.
    """
    shards = shard_paths(path)
    missing = [p.name for p in shards if not p.exists()]
    if missing and len(shards) > 1:
        raise ModelError(
            f"{path.name} is one of {len(shards)} shards and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing beside it",
            hint="put all shards into one folder, or fetch the model whole: emlocal models pull NAME",
        )
    known = recall(shards[0])
    first = known or Known(bytearray(), {})
    headers = [parse_file(shards[0], first), *map(parse_file, shards[1:])]
    for number, header in enumerate(headers):
        _check_split(header, number, len(headers))
    header = headers[0] if len(headers) == 1 else _merge(headers)
    check_language_model(header)
    if known is None:
        check_tokens(header, first.data)
        remember(headers[0], first.data[: headers[0].data_offset])
    return header


def shard_paths(path: Path) -> tuple[Path, ...]:
    """All files of the model that `path` is (a shard of), by its name. llama.cpp opens the first."""
    match = _SHARD.fullmatch(path.name)
    if match is None or not 1 < int(match["count"]) <= 999:
        return (path,)
    numbers = range(1, int(match["count"]) + 1)
    return tuple(path.with_name(f"{match['stem']}-{n:05d}-of-{match['count']}.gguf") for n in numbers)


def _check_split(header: GGUFHeader, number: int, count: int) -> None:
    """The metadata of a shard must agree with its name. llama.cpp asserts the type of split.no."""
    if count == 1:
        said = header.metadata.get("split.count", 1)
        if int_or_none(said) not in (0, 1):
            name = "model-00001-of-00003.gguf"
            raise unusable(header.path, f"split.count is {shown(str(said))}, but it is not named like {name}")
        return
    for key, want in (("split.no", number), ("split.count", count)):
        value = header.metadata.get(key)
        # Only the first shard has to carry the count.
        if key == "split.count" and number and value is None:
            continue
        if value != want or header.value_types.get(key) != types.UINT16:
            raise unusable(header.path, f"{key} is {shown(str(value))}, but by its name it is {want}")


def _merge(headers: list[GGUFHeader]) -> GGUFHeader:
    """One header for all shards: metadata of the first, tensors of all."""
    first = headers[0]
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise unusable(header.path, f"the tensor {shown(name)} is also in {tensors[name].file.name}")
            tensors[name] = tensor
    said = int_or_none(first.metadata.get("split.tensors.count"))
    if said != len(tensors):
        raise unusable(
            first.path, f"split.tensors.count is {said}, but the shards hold {len(tensors):,} tensors"
        )
    return replace(
        first,
        tensors=MappingProxyType(tensors),
        file_size=sum(h.file_size for h in headers),
        files=tuple(h.path for h in headers),
    )
