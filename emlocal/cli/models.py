"""`emlocal models`: what there is, fetching, looking at and removing models."""

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from emlocal import console
from emlocal.errors import ModelError, UsageError
from emlocal.models import hub, starter
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
from emlocal.text import human_size

app = typer.Typer(help="List, fetch, inspect and remove models.", no_args_is_help=True)

Name = Annotated[
    str,
    typer.Argument(
        help="A short name (see list), a .gguf file, a model folder, or org/name:QUANT of the hub.",
        metavar="NAME",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

FORMATS: tuple[Format, ...] = ("gguf", "safetensors")  # of two that are there, the one any machine runs
PLAIN_LINE_SECONDS = 5.0  # between lines of progress when stderr is no terminal


@app.command("list")
def list_models(as_json: Json = False) -> None:
    """List the models emlocal knows and those on this machine."""
    rows = [*_catalog_rows(), *_cached_rows()]
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("model", "parameters", "size", "on disk", "licence"):
        table.add_column(title, justify="right" if title in ("parameters", "size") else "left", no_wrap=True)
    for row in rows:
        table.add_row(
            row["name"],
            row["parameters"],
            human_size(row["bytes"]),
            "yes" if row["on_disk"] else "",
            row["license"],
        )
    console.out().print(table)


def _catalog_rows() -> Iterator[dict[str, Any]]:
    for entry in catalog().values():
        files = on_disk(meaning(entry.alias))
        size = sum(f.stat().st_size for f in files) or entry.bytes
        yield {
            "name": entry.alias,
            "parameters": entry.parameters,
            "bytes": size,
            "on_disk": bool(files),
            "license": entry.license,
        }


def _cached_rows() -> Iterator[dict[str, Any]]:
    """Models in the cache that the catalog does not have, or has in another quantization."""
    known = {meaning(alias) for alias in catalog()}
    for repo in hub.cached_repos():
        files = hub.cached_files(repo)
        for first, shards in hub.models_among(files).items():
            name = HubName(repo, hub.quant_of(first) or first)
            if name not in known:
                size = sum(files[f].stat().st_size for f in shards)
                yield {"name": str(name), "parameters": "", "bytes": size, "on_disk": True, "license": ""}
        weights = [files[name] for name in needed_files(files)]
        if weights:
            size = sum(f.stat().st_size for f in weights)
            yield {"name": repo, "parameters": "", "bytes": size, "on_disk": True, "license": ""}


@app.command()
def pull(name: Name) -> None:
    """Fetch a model, unless it is there already, and print where it is."""
    with console.progress() as progress:
        model = resolve(name, formats=FORMATS, progress=progress)
    console.err().print(_summary(model), markup=False)
    typer.echo(model.path)


@app.command()
def show(name: Name, as_json: Json = False) -> None:
    """Show what a model is and the sampling settings its authors give. Fetches nothing."""
    entry = catalog_entry(name)
    if entry is not None and local_path(name, FORMATS) is None and not on_disk(meaning(name)):
        facts: dict[str, Any] = {
            "name": entry.alias,
            "on_disk": False,
            "parameters": entry.parameters,
            "license": entry.license,
            "gguf": f"{entry.gguf}:{entry.quant}",
            "download_bytes": entry.bytes,
        }
    else:
        facts = _facts(resolve(name, formats=FORMATS, download=False))
    console.show_facts(facts, as_json=as_json)
    if not facts["on_disk"] and not as_json:
        console.err().print(f"Not on this machine yet. Fetch it: emlocal models pull {name}", markup=False)


@app.command("rm")
def remove(name: Name, yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False) -> None:
    """Remove a fetched model from this machine."""
    path = local_path(name, FORMATS)
    if path is not None:
        how = "rm -r" if path.is_dir() else "rm"
        raise UsageError(
            f"{path} is yours; emlocal removes only what it fetched", hint=f"delete it: {how} {path}"
        )
    meant = meaning(name)
    files = (
        list(hub.cached_files(meant.repo).values()) if isinstance(meant, HubName) else list(on_disk(meant))
    )
    if not files:
        raise ModelError(f"{name} is not on this machine", hint="see what is: emlocal models list")
    size = human_size(sum(f.stat().st_size for f in files))
    what = f"{meant.repo} from the Hugging Face cache" if isinstance(meant, HubName) else "the starter model"
    listing = ", ".join(f.name for f in files)
    if not yes:
        typer.confirm(f"Remove {what} ({listing}; {size})?", abort=True, err=True)
    if isinstance(meant, HubName):
        hub.remove(meant.repo)
    else:
        starter.remove()
    console.err().print(f"Removed {what}: {size} freed", markup=False)


@app.command("path")
def print_path(name: Name) -> None:
    """Print the file (or folder) of a model that is on this machine, for scripts."""
    typer.echo(resolve(name, formats=FORMATS, download=False).path)


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
    """What emlocal samples with when no flag is given: config file, then model, then its own defaults."""
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
