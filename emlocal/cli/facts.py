"""What is known of one thing, a model or an adapter: as a table, or as JSON."""

import json
from collections.abc import Mapping
from typing import Any

import typer

from emlocal import console
from emlocal.formatting import human_size


def show_facts(facts: Mapping[str, Any], *, as_json: bool) -> None:
    """Print them on stdout: as a JSON object, or a line each as people read them."""
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        console.pairs((name.replace("_", " "), _plain(name, value)) for name, value in facts.items())


def _plain(name: str, value: object) -> str:
    """One fact as people read it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return human_size(value) if name.endswith("bytes") else f"{value:,}"
    if name == "sampling_in_effect" and isinstance(value, dict):
        return "\n".join(f"{k} {v['value']} ({v['from']})" for k, v in value.items())
    if isinstance(value, dict):
        return ", ".join(f"{k} {v:g}" for k, v in value.items()) or "not given"
    if isinstance(value, list):
        between = "\n" if name == "files" else ", "
        return between.join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
    return "not given" if value is None else str(value)
