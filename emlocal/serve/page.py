"""The page at `/`: three files of the package, and the table of settings that the page is made from."""

import json
import math
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from emlocal.methods import HOW, METHODS
from emlocal.serve.protocol import OWNERS, House
from emlocal.settings import Setting, Table
from emlocal.settings.em import EM_STEPS, em_numbers, switch_of
from emlocal.settings.resolve import LINE

FILES: Mapping[str, tuple[str, str]] = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
"""Each path of the page, with its file and content type. The files are public: they hold no data."""
SETTINGS: Table = HOW.only("method", "samples") | LINE.without("samples") | HOW.without("samples", *OWNERS)
"""The settings of a request that the page offers."""
_METHOD_PANEL = "Method"


def page_file(path: str) -> bytes:
    """Returns the content of one of the page's files."""
    return files("emlocal.serve").joinpath("page", FILES[path][0]).read_bytes()


def settings_of_page(house: House) -> dict[str, Any]:
    """Returns the model, and the settings with their values in force, as JSON has them."""
    force = _in_force(house)
    told = [_told(known, force.get(known.name, known.default)) for known in SETTINGS.settings.values()]
    if house.adapters:
        told.insert(0, _adapters(house))
    return {"model": house.name, "models": [*house.models], "settings": told}


def _adapters(house: House) -> dict[str, Any]:
    """Returns the choice of an adapter, in the form of a setting: the field `model` of a request."""
    return {
        "name": "model",
        "kind": "choice",
        "choices": [house.name, *house.adapters],
        "help": "Answer with this adapter, or with the model without one.",
        "low": None,
        "high": None,
        "range": "",
        "default": house.name,
        "value": house.name,
        "panel": _METHOD_PANEL,
    }


def _told(known: Setting, value: Any) -> dict[str, Any]:
    """Returns one setting; `value` is what a request without it gets."""
    choices = [*METHODS] if known.name == "method" else [each for each in known.choices if each != "regex"]
    return {
        "name": known.name,
        "kind": "choice" if choices else known.kind,
        "choices": choices,
        "help": known.full_help,
        "low": _bound(known.low),
        "high": _bound(known.high),
        "range": known.described(),
        "default": _plain(known.default),
        "value": _plain(value),
        "panel": known.panel or _METHOD_PANEL,
    }


def _in_force(house: House) -> dict[str, Any]:
    """Returns the values of the server's settings, by name."""
    plan = house.settings.plan
    values = {**vars(plan), **vars(plan.params)}
    found = {known.name: values[known.field] for known in LINE.settings.values() if known.field in values}
    for step in EM_STEPS:
        is_on = isinstance(plan.params.em, step)
        found[switch_of(step).name] = is_on
        if is_on:
            found |= {name: vars(plan.params.em)[known.field] for name, known in em_numbers(step).items()}
    return {**found, **house.how}


def _bound(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """Returns a value as JSON has it."""
    return json.loads(json.dumps(value, default=str))
