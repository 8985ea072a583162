"""From flags, a config file and a recipe to the settings of a fine-tuning run."""

import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

from emlocal.cli.finetune_options import Recipe, TrainingOptions
from emlocal.cli.precedence import flag_names, typed, unknown_setting
from emlocal.errors import UsageError
from emlocal.training.settings import RECIPES, FineTuneSettings


def settings_of_run(flags: TrainingOptions, recipe: Recipe, config: Path | None) -> FineTuneSettings:
    """Flag > --config > recipe > default. Raises UsageError for values that cannot be meant."""
    values: dict[str, Any] = dict(RECIPES[str(recipe)].values)
    for layer in (_read(config) if config else {}, vars(flags)):
        values |= {name: value for name, value in layer.items() if value is not None}
    if isinstance(values.get("target_modules"), str):
        values["target_modules"] = tuple(
            name.strip() for name in values["target_modules"].split(",") if name.strip()
        )
    known = {f.name for f in fields(FineTuneSettings)}
    return FineTuneSettings(**{name: _plain(value) for name, value in values.items() if name in known})


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, str) else value  # a choice of the command line is a StrEnum


def _read(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, named like the flags without their dashes."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}", "give a TOML file: --config run.toml") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as why:
        raise UsageError(f"{path} cannot be read: {why}") from why
    known = flag_names(TrainingOptions)
    found = {}
    for key, value in values.items():
        if key not in known:
            raise unknown_setting(key, list(known), f"{path}: ")
        if isinstance(value, list) and known[key] == "target_modules":
            if not all(isinstance(name, str) for name in value):
                raise UsageError(f"{path}: {key} is {value!r}; it must be a list of names")
            value = ",".join(value)
        found[known[key]] = typed(TrainingOptions, known[key], value, f"{path}: {key}")
    return found
