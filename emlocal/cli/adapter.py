"""`emlocal adapter`: what an adapter is, in another format, or merged into its model."""

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
    Path, typer.Argument(help="A PEFT or MLX folder, or a GGUF file.", metavar="ADAPTER", show_default=False)
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base", help="The model it is for: a GGUF model, or a folder with config.json.", metavar="MODEL"
    ),
]


@app.command()
def show(
    path: Path_,
    base: Base = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what an adapter is and, with --base, whether it fits that model."""
    console.show_facts(_facts(path, base), as_json=as_json)


@app.command()
def convert(
    path: Path_,
    out: Annotated[
        Path, typer.Option("-o", "--output", help="Folder, or .gguf file, to write.", metavar="OUT")
    ],
    to: Annotated[
        AdapterFormat | None, typer.Option("--to", help="Format to write; gguf if OUT ends in .gguf.")
    ] = None,
    base: Base = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is an adapter.")] = False,
) -> None:
    """Write an adapter in another format. To and from GGUF takes --base, a GGUF model."""
    kind = to or ("gguf" if out.suffix == ".gguf" else None)
    if kind is None:
        raise UsageError(f"in which format is {out} to be?", "say --to peft, --to mlx or --to gguf")
    if out.exists() and not force:
        raise UsageError(f"{out} exists already", "choose another name, or --force to replace it")
    if out.exists() and out.resolve() == path.resolve():
        raise UsageError(f"{out} is the adapter itself", "choose another name")
    header = _gguf_base(base) if base is not None and not _is_folder_model(base) else None
    if kind == "gguf" and header is None:
        raise UsageError(
            "to write GGUF takes the base model as GGUF, for its tensors' names and numbers of heads",
            "give it: --base MODEL",
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
            help="Short name, .gguf file (which is unpacked), folder, or org/name of the hub.",
            metavar="MODEL",
        ),
    ],
    adapter: Annotated[
        str, typer.Option("--adapter", help="The adapter, and optionally its scale.", metavar="PATH[=SCALE]")
    ],
    out: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.", metavar="OUT")],
) -> None:
    """Write a model as a folder of safetensors with an adapter added to its weights."""
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
    """The model as a folder of safetensors, and its header where it is a GGUF model, which is unpacked."""
    from emlocal.models.unpacked import unpack

    if _is_folder_model(model):  # of any kind: nothing runs it here
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
                f"{out} is no GGUF adapter, and --force replaces nothing else: {why.message}",
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
    # For what is told here the order of rows does not matter, so no base is needed.
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
    """Whether it fits, and why not. Raises only for what is wrong with `base` itself."""
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
