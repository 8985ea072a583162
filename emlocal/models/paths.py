"""Where emlocal keeps its own files. Models of the hub are not here: those stay in the Hugging Face cache."""

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """What can be fetched again: the starter model, weights converted for engines. EMLOCAL_CACHE_DIR."""
    return _chosen("EMLOCAL_CACHE_DIR") or platformdirs.user_cache_path("emlocal", appauthor=False)


def config_dir() -> Path:
    """What people write: config.toml. EMLOCAL_CONFIG_DIR."""
    return _chosen("EMLOCAL_CONFIG_DIR") or platformdirs.user_config_path("emlocal", appauthor=False)


def data_dir() -> Path:
    """What emlocal writes and nothing can bring back: conversations, adapters. EMLOCAL_DATA_DIR."""
    return _chosen("EMLOCAL_DATA_DIR") or platformdirs.user_data_path("emlocal", appauthor=False)


def _chosen(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value).expanduser() if value else None
