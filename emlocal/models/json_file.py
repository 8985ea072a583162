"""The small files of a Hugging Face model folder, read within bounds."""

import json
from pathlib import Path
from typing import Any

from emlocal.errors import ModelError
from emlocal.models.regular import read_regular

MAX_JSON_BYTES = 256 << 20  # the largest tokenizer.json known (Gemma 3) has 33 MB
MAX_TEMPLATE_BYTES = 1 << 20


def read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    """A JSON table; empty if the file is not there and not required. Raises ModelError."""
    raw = _read(path, MAX_JSON_BYTES)
    if raw is None and not required:
        return {}
    if raw is None:
        raise ModelError(f"{path.parent} has no {path.name}", hint="get that file too")
    try:
        table = json.loads(raw)
    except (ValueError, RecursionError):
        raise ModelError(f"{path} is not JSON", hint="get the file again") from None
    if not isinstance(table, dict):
        raise ModelError(f"{path} is not a JSON table", hint="get the file again")
    return table


def read_chat_template(folder: Path) -> str | None:
    """chat_template.jinja, else the `chat_template` (the one called "default", of several) of
    tokenizer_config.json. Raises ModelError for one of more than 1 MiB."""
    raw = _read(folder / "chat_template.jinja", MAX_TEMPLATE_BYTES)
    if raw is not None:
        return raw.decode("utf-8", "replace") or None
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


def _read(path: Path, most: int) -> bytes | None:
    """None where there is no such file."""
    try:
        return read_regular(path, most)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
