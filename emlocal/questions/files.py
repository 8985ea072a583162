"""The rows of question files: JSONL, JSON, CSV, TSV, parquet; each may be packed with gzip.

JSONL is read line by line, and only by its callers (`emlocal.text.numbered_lines`): they differ in what a bad
line does. The other formats come from `rows`. A byte order mark is skipped.
"""

import codecs
import csv
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast, get_args

from emlocal.errors import EmlocalError, UsageError
from emlocal.text import MAX_LINE_BYTES, TOO_LONG, numbered_lines, parse_json

Form = Literal["jsonl", "json", "csv", "tsv", "parquet"]
FORMS: tuple[Form, ...] = get_args(Form)
LARGEST = 256 << 20
"""Maximum size in bytes, unpacked, of a file that is read whole: JSON, and the files of `eval`.

Memory holds it about three times.
"""
NUMBERED: Mapping[Form, str] = {
    "jsonl": "line",
    "json": "item",
    "csv": "line",
    "tsv": "line",
    "parquet": "row",
}
"""What the number of a row counts."""
_CONVERSATIONS = ("messages", "conversations")
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def form_of(name: str | Path) -> Form | None:
    """Returns the format that a file's name stands for; None if it stands for none. Case does not count."""
    path = Path(name)
    path = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    suffix = path.suffix.lower().removeprefix(".")
    return "jsonl" if suffix == "ndjson" else next((form for form in FORMS if form == suffix), None)


def opened(path: Path) -> BinaryIO:
    """Opens a file for reading; one that begins as gzip does is unpacked as it is read.

    A pipe is not looked into. Raises OSError, and UsageError for a file in UTF-16.
    """
    file = path.open("rb")
    try:
        begins = file.read(2) if file.seekable() else b""
        if begins in _UTF_16:
            raise UsageError(f"{path} is UTF-16 text", f"iconv -f UTF-16 -t UTF-8 {path} > FILE")
        if file.seekable():
            file.seek(0)
        return cast(BinaryIO, gzip.GzipFile(fileobj=file)) if begins == b"\x1f\x8b" else file
    except BaseException:
        file.close()
        raise


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns the faults of a file into a UsageError that names it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, ValueError, csv.Error) as why:
        raise UsageError(f"{name} cannot be read: {why}", "correct it there, or save the file again") from why
    except OSError as why:
        raise EmlocalError(f"cannot read {name}: {why.strerror or why}") from why


def whole(stream: BinaryIO) -> bytes:
    """Returns all of a file. Counts first, and raises ValueError if it has more than LARGEST bytes."""
    size = 0
    while chunk := stream.read(1 << 20):
        size += len(chunk)
        if size > LARGEST:
            raise ValueError(f"it unpacks to more than {LARGEST >> 20} MiB")
    stream.seek(0)
    return stream.read()


def is_by_lines(stream: BinaryIO, form: Form | None) -> bool:
    """Whether a file has a JSON object on each line.

    Many files named .json do. Such a file is JSONL unless it is a list, a table, or one object over several
    lines. The stream is set back to its start; one that cannot be is JSONL.
    """
    if form != "json":
        return form in ("jsonl", None)
    if not stream.seekable():
        return True
    begins = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    stream.seek(0)
    if begins.startswith(b"["):
        return False
    first = next((raw for _, raw in numbered_lines(stream) if raw is None or raw.strip()), None)
    last = not stream.read(1)
    stream.seek(0)
    if first is None:
        return True
    try:
        value = parse_json(first)
    except ValueError:
        return first.strip() == b"{" or first.rstrip().endswith((b"{", b"[", b","))
    return not (last and _is_table(value))


def rows(stream: BinaryIO, form: Form) -> Iterator[tuple[int, Any]]:
    """Yields the rows with their numbers from 1; see NUMBERED. Empty cells of tables are null.

    Raises ValueError or csv.Error for a file of another form; EmlocalError without pyarrow.
    """
    if form == "json":
        yield from enumerate(listed(parse_json(whole(stream).removeprefix(codecs.BOM_UTF8))), 1)
    elif form == "parquet":
        yield from enumerate(_of_parquet(stream), 1)
    else:
        yield from _of_table(stream, "\t" if form == "tsv" else ",")


def listed(value: Any) -> list[Any]:
    """Returns the rows of a list, of a table or of one object.

    A table is stored by columns: an object of {row: value} objects, or of lists. Raises ValueError.
    """
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise ValueError(  # noqa: TRY004 (a fault of the file)
            "it is not a list of JSON objects"
        )
    if not _is_table(value):
        return [value]
    if all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    keys = list(next(iter(value.values())))
    return [{name: column.get(key) for name, column in value.items()} for key in keys]


def _is_table(value: Any) -> bool:
    if not isinstance(value, dict) or not value:
        return False
    said = [value.get(name) for name in _CONVERSATIONS]
    if any(isinstance(turns, list) and turns and isinstance(turns[0], dict) for turns in said):
        return False  # one conversation
    columns = value.values()
    return any(all(isinstance(column, kind) for column in columns) for kind in (list, dict))


def _of_table(stream: BinaryIO, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(MAX_LINE_BYTES)
    cells = csv.reader(_decoded(stream), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for row in cells:
            at, line = line, cells.line_num + 1
            if not any(cell.strip() for cell in row):
                continue
            if header is None:
                header = [name.strip() for name in row]
                if twice := next((name for name in header if header.count(name) > 1), None):
                    raise ValueError(f"two columns have the name {twice!r}")
                continue
            if len(row) > len(header):
                raise ValueError(f"line {at:,} has {len(row)} cells; the first line names {len(header)}")
            row += [""] * (len(header) - len(row))
            yield at, {name: _cell(name, cell) for name, cell in zip(header, row, strict=True)}
    except csv.Error as why:
        raise ValueError(f"line {line:,}: {why}") from None


def _decoded(stream: BinaryIO) -> Iterator[str]:
    for number, raw in numbered_lines(stream):
        if raw is None:
            raise ValueError(f"line {number:,}: {TOO_LONG}")
        try:
            yield raw.decode()
        except UnicodeDecodeError as why:
            said = f"line {number:,}: byte 0x{raw[why.start]:02x} is not UTF-8"
            raise ValueError(said) from None


def _cell(name: str, text: str) -> Any:
    """Returns the value of a cell: null if it is empty; a column of conversations has JSON."""
    if not text.strip():
        return None
    if name in (*_CONVERSATIONS, "prompt") and text.lstrip().startswith("[{"):
        try:
            return parse_json(text)
        except ValueError:
            return text
    return text


def _of_parquet(stream: BinaryIO) -> Iterator[Any]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as why:
        raise EmlocalError("reading parquet files needs the package pyarrow", "pip install pyarrow") from why
    source = io.BytesIO(whole(stream))
    for group in parquet.ParquetFile(source).iter_batches():
        yield from group.to_pylist()


def text_of_cell(value: Any) -> Any:
    """Returns the value that a cell's text stands for: "0.5" is 0.5, "true" is true."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, bool | int | float) else value
