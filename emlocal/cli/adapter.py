"""The command `emlocal adapter`: show an adapter, convert it, or merge it into its model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from emlocal import console
from emlocal.errors import ModelError, UsageError
from emlocal.files import Progress
from emlocal.models.gguf.header import GGUFHeader, shown
from emlocal.models.resolve import GGUFModel, resolve
from emlocal.text import counted, human_size

if TYPE_CHECKING:
    from emlocal.models.adapters.adapter import Adapter

app = typer.Typer(help="Show, convert and merge LoRA adapters.", no_args_is_help=True)


AdapterFormat = Literal["peft", "mlx", "gguf"]
Path_ = Annotated[
    Path,
    typer.Argument(
        help="Read this adapter: a PEFT or MLX folder, or a GGUF file.", metavar="ADAPTER", show_default=False
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base", help="Set the base model: a GGUF model, or a folder with config.json.", metavar="MODEL"
    ),
]


@app.command()
def show(
    path: Path_,
    base: Base = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show an adapter's facts and, with --base, whether it fits that model."""
    console.show_facts(_facts(path, base), as_json=as_json)


@app.command()
def convert(
    path: Path_,
    out: Annotated[
        Path,
        typer.Option("-o", "--output", help="Write the adapter to this folder or .gguf file.", metavar="OUT"),
    ],
    to: Annotated[
        AdapterFormat | None,
        typer.Option("--to", help="Set the format to write. (default: gguf if OUT ends in .gguf)"),
    ] = None,
    base: Base = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it holds an adapter.")] = False,
) -> None:
    """Convert an adapter to another format. GGUF adapters need --base, a GGUF model."""
    kind = to or ("gguf" if out.suffix == ".gguf" else None)
    if kind is None:
        raise UsageError(f"the format of {out} is not given", "add --to peft, --to mlx or --to gguf")
    if out.exists() and not force:
        raise UsageError(f"{out} exists already", "choose another name, or add --force to replace it")
    if out.exists() and out.resolve() == path.resolve():
        raise UsageError(f"{out} is the adapter that is being converted", "choose another name")
    header = _gguf_base(base) if base is not None and not _is_folder_model(base) else None
    if kind == "gguf" and header is None:
        raise UsageError(
            "a GGUF adapter needs its base model in GGUF, for tensor names and head counts",
            "name it: --base MODEL",
        )
    from emlocal.models.adapters import read_adapter
    from emlocal.models.adapters.folders import write_mlx, write_peft

    adapter = read_adapter(path, header)
    if base is not None and header is None:
        _check_fits_folder(adapter, Path(base))
    if kind == "gguf":
        _write_gguf(adapter, out, header)
    elif kind == "mlx":
        write_mlx(adapter, out, replace=force)
    else:
        write_peft(adapter, out, replace=force)
    console.err().print(f"{out}: {counted(len(adapter.pairs), 'layer')} as {kind}", markup=False)


@app.command()
def merge(
    model: Annotated[
        str,
        typer.Option(
            "-m",
            "--model",
            help="Set the model: a short name, .gguf file (it is unpacked), folder or org/name.",
            metavar="MODEL",
        ),
    ],
    adapter: Annotated[
        str,
        typer.Option(
            "--adapter", help="Add this adapter, at this scale (1 without one).", metavar="PATH[=SCALE]"
        ),
    ],
    out: Annotated[
        Path, typer.Option("-o", "--output", help="Write the merged model to this folder.", metavar="OUT")
    ],
) -> None:
    """Add an adapter to a model's weights and write the result as a folder of safetensors."""
    from emlocal.loading import adapter_and_scale
    from emlocal.models.adapters import read_adapter
    from emlocal.models.adapters.merge import merge as merge_into
    from emlocal.models.adapters.merge import open_model
    from emlocal.models.adapters.origin import other_base

    if out.exists():
        raise UsageError(f"{out} exists already", "choose another name, or remove it first")
    path, scale = adapter_and_scale(adapter)
    with console.progress() as progress:
        folder, header = _as_folder(model, progress)
        read, opened = read_adapter(path, header), open_model(folder)
        if other := other_base(path, model, header):
            console.warn(other)
        merge_into(read, scale, opened, out, progress)
    console.err().print(
        f"{out}: {human_size(opened.bytes)}, {counted(len(read.pairs), 'layer')} changed", markup=False
    )


def _as_folder(model: str, progress: Progress) -> tuple[Path, GGUFHeader | None]:
    """Returns the model as a folder of safetensors. A GGUF model is unpacked; its header is returned too."""
    from emlocal.models.unpacked import unpack

    if _is_folder_model(model):  # any architecture is fine, because nothing runs the model here
        return Path(model), None
    found = resolve(model, formats=("safetensors", "gguf"), progress=progress)
    return (unpack(found, progress), found.header) if isinstance(found, GGUFModel) else (found.path, None)


def _write_gguf(adapter: "Adapter", out: Path, base: GGUFHeader | None) -> None:
    from emlocal.models.adapters.gguf_lora import write_gguf
    from emlocal.models.gguf import read_adapter_pairs

    assert base is not None
    if out.is_dir():
        raise UsageError(f"{out} is a folder; a GGUF adapter is a file", "choose a name that ends in .gguf")
    if out.exists():
        try:
            read_adapter_pairs(out)
        except ModelError as why:
            raise UsageError(
                f"{out} is not a GGUF adapter, and --force replaces only adapters: {why.message}",
                "choose another name",
            ) from why
    write_gguf(adapter, out, base)


def _is_folder_model(base: str) -> bool:
    return (Path(base) / "config.json").is_file()


def _gguf_base(base: str) -> GGUFHeader:
    return resolve(base, download=False).header


def _check_fits_folder(adapter: "Adapter", base: Path) -> None:
    from emlocal.models.adapters.adapter import check_fits
    from emlocal.models.adapters.merge import open_model

    check_fits(adapter, open_model(base).shapes, str(base))


def _facts(path: Path, base: str | None) -> dict[str, Any]:
    from emlocal.models.adapters import adapter_files, format_of, read_adapter
    from emlocal.models.adapters.gguf_lora import read_in_file_order

    kind = format_of(path)
    # These facts do not depend on the order of rows, so no base is needed.
    adapter = read_in_file_order(path)[1] if kind == "gguf" else read_adapter(path)
    pairs = adapter.pairs
    facts: dict[str, Any] = {
        "path": str(path),
        "format": kind,
        "base_model": shown(adapter.base_model) or None,
        "rank": sorted({p.rank for p in pairs.values()}),
        "alpha": sorted({round(p.scale * p.rank, 9) for p in pairs.values()}),
        "scale": sorted({p.scale for p in pairs.values()}),
        "modules": sorted({name.rpartition(".")[2] for name in pairs}),
        "layers": len(pairs),
        "parameters": sum(p.a.size + p.b.size for p in pairs.values()),
        "size_bytes": sum(f.stat().st_size for f in adapter_files(path)),
    }
    return facts if base is None else facts | _fit(path, adapter, base)


def _fit(path: Path, adapter: "Adapter", base: str) -> dict[str, Any]:
    """Checks whether the adapter fits the base, and why not. Raises only for errors in `base` itself."""
    from emlocal.models.adapters import read_adapter
    from emlocal.models.adapters.origin import other_base

    header = None if _is_folder_model(base) else _gguf_base(base)
    try:
        if header is None:
            _check_fits_folder(adapter, Path(base))
        else:
            read_adapter(path, header)
    except ModelError as error:
        return {"fits": False, "why_not": error.message}
    other = other_base(path, base, header)
    return {"fits": True} if other is None else {"fits": True, "but": other}
