"""Settings in TOML files: the config file, and those of training runs."""

from pathlib import Path
from typing import Any

from emlocal.errors import UsageError
from emlocal.models.paths import config_dir
from emlocal.settings.engine import ENGINE
from emlocal.settings.resolve import GENERATION, check_switches
from emlocal.settings.table import KEYS, Table


def config_path() -> Path:
    """Where the config file is, or would be."""
    return config_dir() / "config.toml"


def read_config() -> dict[str, Any]:
    """The config file's settings: of model and engine, sampling and EM; none where there is no such file.

    Raises UsageError, naming file and key.
    """
    path = config_path()
    if not path.exists():
        return {}
    config = read_settings(path, ENGINE | GENERATION)
    try:
        check_switches(config, KEYS)
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}", error.hint) from None
    return config


def read_settings(path: Path, table: Table) -> dict[str, Any]:
    """The settings in a TOML file, named like their flags without dashes.

    Raises UsageError, naming file and key: there is no such file, it cannot be read, or a setting in it is
    unknown, of the wrong kind or out of range.
    """
    import tomllib  # most people have no such file

    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}", "give a TOML file: --config run.toml") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as why:
        raise UsageError(f"{path} cannot be read: {why}") from why
    try:
        return table.read(values, KEYS)
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}", error.hint) from None
