"""The command `emlocal models`: lists, fetches, shows and removes models."""

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from emlocal import console
from emlocal.errors import ModelError, UsageError
from emlocal.loading import best_here, room_here
from emlocal.models import hub, starter
from emlocal.models.choice import fit
from emlocal.models.folder import needed_files
from emlocal.models.gguf.header import shown
from emlocal.models.resolve import (
    Format,
    HubName,
    Model,
    catalog,
    catalog_entry,
    local_path,
    meaning,
    on_disk,
    resolve,
)
from emlocal.settings.options import EngineOptions
from emlocal.text import human_size

app = typer.Typer(help="List, fetch, show and remove models.", no_args_is_help=True)

Name = Annotated[
    str,
    typer.Argument(
        help="Name a model: a short name (see list), .gguf file, folder or org/name:QUANT.",
        metavar="NAME",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

# of two formats on disk, prefer the one that any machine can run
FORMATS: tuple[Format, ...] = ("gguf", "safetensors")
PLAIN_LINE_SECONDS = 5.0  # seconds between lines of progress when stderr is not a terminal


@app.command("list")
def list_models(as_json: Json = False) -> None:
    """List the models that emlocal knows and those on this machine.

    Fits: whether the memory that is free now takes a model with a context of 8192 tokens. Thinks: whether it
    thinks before it answers, always or on request.
    """
    rows = [*_catalog_rows(), *_cached_rows()]
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("model", "parameters", "size", "on disk", "fits", "thinks", "licence"):
        table.add_column(title, justify="right" if title in ("parameters", "size") else "left", no_wrap=True)
    for row in rows:
        table.add_row(
            row["name"],
            row["parameters"],
            human_size(row["bytes"]),
            "yes" if row["on_disk"] else "",
            row["fits"],
            "" if row["thinks"] == "no" else row["thinks"],
            row["license"],
        )
    console.out().print(table)


def _catalog_rows() -> Iterator[dict[str, Any]]:
    room = room_here()
    for entry in catalog().values():
        files = on_disk(meaning(entry.alias))
        size = sum(f.stat().st_size for f in files) or entry.bytes
        yield {
            "name": entry.alias,
            "parameters": entry.parameters,
            "bytes": size,
            "on_disk": bool(files),
            "fits": fit(entry, room).describe(),
            "thinks": entry.thinks,
            "license": entry.license,
        }


def _cached_rows() -> Iterator[dict[str, Any]]:
    """Yields models in the cache that the catalog lacks or has in another quantization."""
    known = {meaning(alias) for alias in catalog()}
    for repo in hub.cached_repos():
        files = hub.cached_files(repo)
        for first, shards in hub.models_among(files).items():
            name = HubName(repo, hub.quant_of(first) or first)
            if name not in known:
                size = sum(files[f].stat().st_size for f in shards)
                yield _cached_row(str(name), size)
        weights = [files[name] for name in needed_files(files)]
        if weights:
            size = sum(f.stat().st_size for f in weights)
            yield _cached_row(repo, size)


def _cached_row(name: str, size: int) -> dict[str, Any]:
    unknown = {"parameters": "", "fits": "", "thinks": "", "license": ""}
    return {"name": name, "bytes": size, "on_disk": True} | unknown


@app.command()
def pull(name: Name) -> None:
    """Fetch a model if it is missing, and print its path. The name auto means the best that fits."""
    name = _named(name)
    with console.progress() as progress:
        model = resolve(name, formats=FORMATS, progress=progress)
    console.err().print(_summary(model), markup=False)
    typer.echo(model.path)


@app.command()
def show(name: Name, as_json: Json = False) -> None:
    """Show a model's facts and its authors' sampling settings. Fetches nothing.

    The name auto means the best that fits.
    """
    name = _named(name)
    entry = catalog_entry(name)
    if entry is not None and local_path(name, FORMATS) is None and not on_disk(meaning(name)):
        facts: dict[str, Any] = {
            "name": entry.alias,
            "on_disk": False,
            "parameters": entry.parameters,
            "license": entry.license,
            "thinks": entry.thinks,
            "fits": fit(entry, room_here()).describe(),
            "gguf": f"{entry.gguf}:{entry.quant}",
            "download_bytes": entry.bytes,
        }
    else:
        facts = _facts(resolve(name, formats=FORMATS, download=False))
    console.show_facts(facts, as_json=as_json)
    if not facts["on_disk"] and not as_json:
        console.err().print(f"not on this machine yet; fetch it: emlocal models pull {name}", markup=False)


@app.command("rm")
def remove(
    name: Name, yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False
) -> None:
    """Remove a fetched model from this machine."""
    path = local_path(name, FORMATS)
    if path is not None:
        how = "rm -r" if path.is_dir() else "rm"
        raise UsageError(
            f"{path} is your own file; emlocal removes only models that it fetched",
            hint=f"delete it: {how} {path}",
        )
    meant = meaning(name)
    files = (
        list(hub.cached_files(meant.repo).values()) if isinstance(meant, HubName) else list(on_disk(meant))
    )
    if not files:
        raise ModelError(
            f"{name} is not on this machine", hint="list the models that are: emlocal models list"
        )
    size = human_size(sum(f.stat().st_size for f in files))
    what = f"{meant.repo} from the Hugging Face cache" if isinstance(meant, HubName) else "the starter model"
    listing = ", ".join(f.name for f in files)
    if not yes:
        typer.confirm(f"Remove {what} ({listing}; {size})?", abort=True, err=True)
    if isinstance(meant, HubName):
        hub.remove(meant.repo)
    else:
        starter.remove()
    console.err().print(f"removed {what}: {size} freed", markup=False)


@app.command("path")
def print_path(name: Name) -> None:
    """Print the path of a model that is on this machine, for scripts."""
    typer.echo(resolve(_named(name), formats=FORMATS, download=False).path)


def _named(name: str) -> str:
    """Returns the short name of the best model that fits in place of "auto"."""
    entry = best_here(EngineOptions(name))
    return name if entry is None else entry.alias


def _facts(model: Model) -> dict[str, Any]:
    header, entry = model.header, catalog_entry(model.name)
    return {
        "name": model.name,
        "on_disk": True,
        "title": shown(header.name),
        "architecture": shown(header.architecture),
        "parameters": header.parameters,
        "quantization": header.quantization,
        "weights_bytes": header.weights_bytes,
        "context_length": header.context_length,
        "vocabulary": header.vocab_size,
        "chat_template": header.chat_template is not None,
        "license": shown(header.license) if header.license else entry.license if entry else None,
        "sampling": header.sampling,
        "sampling_in_effect": _in_effect(header.sampling),
        "source": model.source,
        "files": [str(f) for f in model.files],
    }


def _in_effect(own: Mapping[str, float]) -> dict[str, dict[str, float | str]]:
    """Returns the sampling settings without flags: the config file's, then the model's, then the defaults."""
    from emlocal.settings import SamplingParams, describe_em, resolve_settings, settings_of
    from emlocal.settings.resolve import read_config

    resolved = resolve_settings(("config", read_config())).with_model(own)
    effective: dict[str, dict[str, float | str]] = {
        name: {"value": vars(resolved.params)[name], "from": resolved.sources[name]}
        for name in settings_of(SamplingParams)
    }
    em = resolved.params.em
    return effective | {"em": {"value": describe_em(em), "from": "config" if em else "default"}}


def _summary(model: Model) -> str:
    header = model.header
    return (
        f"{model.name}: {header.architecture}, {header.parameters / 1e6:,.0f} million parameters, "
        f"{header.quantization}, {human_size(header.file_size)}"
    )
