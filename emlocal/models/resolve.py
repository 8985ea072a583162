"""From a typed name to a checked model on this machine.

    resolve("smollm2:135m")                  a short name of the catalog
    resolve("model.gguf")                    a file, or a folder with one model in it
    resolve("Qwen/Qwen3-8B-GGUF:Q8_0")       a repository of the hub, and a quantization or a file of it
    resolve("Qwen/Qwen3-8B", formats=("safetensors", "gguf"))     for engines that run both

Files come first, then names. A model that is on this machine already is used without a request. The models
that emlocal knows by a short name are in catalog.toml beside this file.
"""

import re
import tomllib
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, Literal, overload

from emlocal.errors import ModelError, UsageError, WrongNameError
from emlocal.files import Progress, silent
from emlocal.models import hub, starter
from emlocal.models.folder import (
    CONFIG,
    FolderHeader,
    has_folder_model,
    needed_files,
    read_folder_header,
    weight_files,
    why_not,
)
from emlocal.models.gguf import GGUFHeader, read_header
from emlocal.models.gguf.header import shown


@dataclass(frozen=True)
class CatalogEntry:
    """One model of the catalog; catalog.toml explains the fields."""

    alias: str
    parameters: str
    license: str
    thinks: Literal["no", "can", "always"]
    gguf: str
    quant: str
    bytes: int
    layers: int
    heads: tuple[int, int, int]
    mlx: str
    safetensors: str

    @property
    def kv(self) -> int:
        """Bytes of one token's keys and values in f16."""
        return 2 * 2 * prod(self.heads)


@cache
def _catalog_file() -> dict[str, Any]:
    with Path(__file__).with_name("catalog.toml").open("rb") as file:
        return tomllib.load(file)


@cache
def catalog() -> dict[str, CatalogEntry]:
    """Returns all entries by alias, in the order of the file."""
    entries = [CatalogEntry(**entry | {"heads": tuple(entry["heads"])}) for entry in _catalog_file()["model"]]
    return {entry.alias: entry for entry in entries}


def candidates() -> list[CatalogEntry]:
    """Returns the entries that `-m auto` may choose, the best first."""
    return [catalog()[alias] for alias in _catalog_file()["auto"]]


def catalog_entry(name: str) -> CatalogEntry | None:
    """Returns the entry of an alias; upper and lower case are the same."""
    return catalog().get(name.lower())


def close_aliases(name: str) -> list[str]:
    """Returns up to three aliases that `name` probably means, the likeliest first."""
    family = [alias for alias in catalog() if alias.split(":")[0] == name.lower()]
    return family[:3] or get_close_matches(name.lower(), catalog(), n=3, cutoff=0.5)


_HUB_NAME = re.compile(
    r"(?:(?:https?://)?(?:hf\.co|huggingface\.co)/)?"
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?::(?P<wanted>[\w./ +-]{1,200}))?",
    re.ASCII,
)
_ADAPTER = "adapter_config.json"
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


@dataclass(frozen=True)
class GGUFModel:
    """A GGUF model on this machine, its header checked. `path` is the first of `files`, the one to open."""

    name: str
    path: Path
    files: tuple[Path, ...]
    source: Literal["path", "starter", "hub"]
    header: GGUFHeader


@dataclass(frozen=True)
class FolderModel:
    """A Hugging Face model folder on this machine, checked. `path` is the folder, `files` are its weights."""

    name: str
    path: Path
    files: tuple[Path, ...]
    source: Literal["path", "hub"]
    header: FolderHeader


Format = Literal["gguf", "safetensors"]
Model = GGUFModel | FolderModel


@dataclass(frozen=True)
class HubName:
    """A repository of the hub; `wanted` is a quantization or a file in it, None for the default."""

    repo: str
    wanted: str | None
    safetensors: str | None = field(default=None, compare=False)
    """The repository of the same model in safetensors, if it is another one and known."""

    def folder_repo(self) -> str | None:
        """Returns the repository to look for safetensors in; None if GGUF was asked for."""
        return self.safetensors or (None if self.wanted else self.repo)

    def __str__(self) -> str:
        return f"{self.repo}:{self.wanted}" if self.wanted else self.repo


def default_model() -> tuple[str, str]:
    """Returns the name of the model that is used by default, and the reason."""
    here = "already on this machine" if starter.is_present() else "93 MB from the package index"
    return starter.ALIAS, f"the starter model, {here}"


@overload
def resolve(
    name: str | None = None,
    *,
    formats: tuple[Literal["gguf"]] = ("gguf",),
    offline: bool = False,
    progress: Progress = silent,
    download: bool = True,
) -> GGUFModel: ...


@overload
def resolve(
    name: str | None = None,
    *,
    formats: tuple[Format, ...],
    offline: bool = False,
    progress: Progress = silent,
    download: bool = True,
) -> Model: ...


def resolve(
    name: str | None = None,
    *,
    formats: tuple[Format, ...] = ("gguf",),
    offline: bool = False,
    progress: Progress = silent,
    download: bool = True,
) -> Model:
    """Returns the model that `name` means, and downloads it if needed.

    `download` and `offline` can forbid the download. `formats` are those that the engine can run, its
    preferred one first. A name with a quantization means GGUF, and so does the starter model's name. A model
    on this machine in any of the formats is used before anything is downloaded.

    Raises UsageError for an impossible name, and ModelError if the model cannot be found, downloaded or
    trusted; each in one line, with the command that fixes it.
    """
    name = default_model()[0] if name is None else name
    path = local_path(name, formats)
    if path is not None:
        return _local(name, path, "path")
    meant = meaning(name)
    for format_ in formats:
        files = on_disk(meant, format_)
        if files:
            break
    else:
        if offline or not download:
            raise ModelError(
                f"{name} is not on this machine" + (", and --offline is set" if offline else ""),
                hint=f"fetch it: emlocal models pull {name}",
            )
        files = _fetch(meant, formats, progress)
    return _local(name, files[0], "hub" if isinstance(meant, HubName) else "starter")


def local_path(name: str, formats: tuple[Format, ...] = ("gguf",)) -> Path | None:
    """Returns the existing file or model folder that `name` is; None if it is not a path.

    For a folder of GGUF files this is the one model in it.
    """
    if not name.strip() or not name.isprintable():
        raise UsageError(
            f'"{shown(name)}" is not a valid model name', hint="list the models: emlocal models list"
        )
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return _model_in(path, formats)
        if path.exists():
            if path.suffix == ".safetensors":
                raise WrongNameError(
                    f"{path} is one file of a model", hint=f"name its folder: -m {path.parent}"
                )
            return path
    except OSError as error:  # a name too long for the file system, or a folder that may not be entered
        raise UsageError(f"cannot read {shown(name)}: {error.strerror}") from error
    if (
        name.startswith((".", "~", "/"))
        or "\\" in name
        or _DRIVE.match(name)
        or (path.suffix == ".gguf" and ":" not in name)
    ):
        raise WrongNameError(
            f"there is no file {name}", hint="list the models that emlocal knows: emlocal models list"
        )
    return None


def is_safetensors_folder(name: str) -> bool:
    """Returns whether `name` is a folder with a model in safetensors and none in GGUF.

    llama.cpp cannot run such a folder.
    """
    if not name.strip() or not name.isprintable():
        return False
    try:
        names = {path.name for path in Path(name).expanduser().iterdir()}
    except OSError:  # not a folder, or one without permission: `resolve` reports it
        return False
    return has_folder_model(names) and bool(weight_files(names)) and not hub.models_among(names)


def meaning(name: str) -> CatalogEntry | HubName:
    """Returns the meaning of a name that is not a file: the starter model's entry, or a repository."""
    entry = catalog_entry(name)
    if entry is not None:
        return entry if entry.alias == starter.ALIAS else HubName(entry.gguf, entry.quant, entry.safetensors)
    match = _HUB_NAME.fullmatch(name)
    if match is None or ".." in name or (match["wanted"] or "").startswith("/"):
        close = close_aliases(name)
        maybe = f"; did you mean {' or '.join(close)}?" if close else ""
        raise WrongNameError(
            f"there is no model {shown(name)}{maybe}",
            hint="list the models that emlocal knows: emlocal models list",
        )
    return HubName(match["repo"], match["wanted"])


def on_disk(meant: CatalogEntry | HubName, format_: Format = "gguf") -> tuple[Path, ...]:
    """Returns the model's files that are on this machine, all of them or none. Makes no request.

    For a model in safetensors this is the folder.
    """
    if isinstance(meant, CatalogEntry):
        return (starter.starter_path(),) if format_ == "gguf" and starter.is_present() else ()
    repo = meant.folder_repo() if format_ == "safetensors" else meant.repo
    cached = hub.cached_files(repo) if repo else {}
    if format_ == "safetensors":
        return (cached[CONFIG].parent,) if needed_files(cached) else ()
    if not hub.models_among(cached):
        return ()
    try:
        return tuple(cached[name] for name in hub.choose(meant.repo, cached, meant.wanted))
    except ModelError:  # cached in another quantization only
        return ()


def _fetch(
    meant: CatalogEntry | HubName, formats: tuple[Format, ...], progress: Progress
) -> tuple[Path, ...]:
    if isinstance(meant, CatalogEntry):
        return (starter.fetch(progress),)
    found: dict[str, dict[str, int]] = {}
    for format_ in formats:
        repo = meant.folder_repo() if format_ == "safetensors" else meant.repo
        if repo is None:
            continue
        sizes = found[repo] = found.get(repo) or hub.remote_files(repo)
        if format_ == "safetensors" and (names := needed_files(sizes)):
            paths = hub.download(repo, {name: sizes[name] for name in names}, progress)
            return (paths[0].parent,)
        if format_ == "gguf" and (hub.models_among(sizes) or meant.wanted or formats == ("gguf",)):
            names = hub.choose(repo, sizes, meant.wanted)
            return tuple(hub.download(repo, {name: sizes[name] for name in names}, progress))
    raise WrongNameError(
        f"{meant.repo} does not have a model that emlocal can use: {why_not(found[meant.repo])}",
        hint="use a repository with safetensors or GGUF files (emlocal models list)",
    )


def _local(name: str, path: Path, source: Literal["path", "starter", "hub"]) -> Model:
    if path.is_dir():
        folder = read_folder_header(path)
        return FolderModel(name, path, folder.files, "hub" if source == "hub" else "path", folder)
    header = read_header(path)
    return GGUFModel(name, header.files[0], header.files, source, header)


def _model_in(folder: Path, formats: tuple[Format, ...]) -> Path:
    """Returns the folder itself if it has a config.json and weights, otherwise the one GGUF model in it."""
    names = {p.name for p in folder.iterdir()}
    models = hub.models_among(names) if "gguf" in formats else {}
    whole = has_folder_model(names)
    if whole and "safetensors" in formats and (formats[0] == "safetensors" or not models):
        return folder
    if len(models) == 1:
        return folder / next(iter(models))
    if whole and weight_files(names) and not models:
        raise WrongNameError(
            f"the folder {folder} has a model in safetensors, which llama.cpp does not run",
            hint="leave --backend out, use --backend torch, or fetch the model as GGUF",
        )
    if whole and not models:
        raise WrongNameError(
            f"the folder {folder} does not have a model that emlocal can use: {why_not(names)}",
            hint="fetch it as safetensors or GGUF",
        )
    if models:
        raise WrongNameError(
            f"the folder {folder} has {len(models)} models: {', '.join(models)}",
            hint=f"name one: {folder / next(iter(models))}",
        )
    if _ADAPTER in names:
        raise WrongNameError(
            f"the folder {folder} is an adapter, not a model",
            hint=f"use the model that it was trained on, and --adapter {folder}",
        )
    kind = "GGUF model" if formats == ("gguf",) else "model, in GGUF or safetensors"
    raise WrongNameError(
        f"the folder {folder} has no {kind}", hint="list the models that emlocal knows: emlocal models list"
    )
