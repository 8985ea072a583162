"""The small files of a Hugging Face model folder, read within bounds."""

import json
from pathlib import Path
from typing import Any

from emlocal.errors import ModelError

MAX_JSON_BYTES = 256 << 20  # the largest tokenizer.json known (Gemma 3) has 33 MB
MAX_TEMPLATE_BYTES = 1 << 20


def read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    """A JSON table; empty if the file is not there and not required. Raises ModelError."""
    if not required and not path.is_file():
        return {}
    try:
        table = json.loads(_read(path, MAX_JSON_BYTES))
    except (ValueError, RecursionError):
        raise ModelError(f"{path} is not JSON", hint="get the file again") from None
    if not isinstance(table, dict):
        raise ModelError(f"{path} is not a JSON table", hint="get the file again")
    return table


def read_chat_template(folder: Path) -> str | None:
    """chat_template.jinja, else the `chat_template` (the one called "default", of several) of
    tokenizer_config.json. Raises ModelError for one of more than 1 MiB."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read(path, MAX_TEMPLATE_BYTES).decode("utf-8", "replace") or None
    said = read_json(folder / "tokenizer_config.json", required=False).get("chat_template")
    if isinstance(said, list):
        named = {t.get("name"): t.get("template") for t in said if isinstance(t, dict)}
        said = named.get("default")
    if not isinstance(said, str):
        return None
    if len(said) > MAX_TEMPLATE_BYTES:
        raise ModelError(
            f"the chat template of {folder} has {len(said):,} characters", hint="use another model"
        )
    return said or None


def _read(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise ModelError(f"{path.parent} has no {path.name}", hint="get that file too") from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > most:
        raise ModelError(f"{path} has more than {most:,} bytes, which is not read", hint="get the file again")
    return data
