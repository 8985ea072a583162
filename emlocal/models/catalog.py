"""The models emlocal knows by a short name. The facts are in catalog.toml beside this file."""

import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class CatalogEntry:
    """One model; `bytes` is the size of its default GGUF file, the rest are repositories on the hub."""

    alias: str
    parameters: str
    license: str
    gguf: str
    quant: str
    bytes: int
    mlx: str
    safetensors: str


@cache
def catalog() -> dict[str, CatalogEntry]:
    """All entries by alias, in the order of the file."""
    with Path(__file__).with_name("catalog.toml").open("rb") as file:
        entries = [CatalogEntry(**entry) for entry in tomllib.load(file)["model"]]
    return {entry.alias: entry for entry in entries}


def find(name: str) -> CatalogEntry | None:
    """The entry of an alias, whatever its case."""
    return catalog().get(name.lower())


def close_aliases(name: str) -> list[str]:
    """Up to three aliases that someone who typed `name` may have meant, the likeliest first."""
    family = [alias for alias in catalog() if alias.split(":")[0] == name.lower()]
    return family[:3] or get_close_matches(name.lower(), catalog(), n=3, cutoff=0.5)
