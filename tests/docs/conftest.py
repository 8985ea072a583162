"""Separate folders for the pages' commands: they neither read nor write the user's config or cache."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from emlocal.models import starter
from emlocal.models.resolve import GGUFModel

CONFIG = "max-tokens = 32\n"
"""Limits the answers of commands that set no limit; longer ones would not change the pages much."""


@pytest.fixture(scope="session")
def home(smollm2: GGUFModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of the pages' commands: emlocal on the path, and the starter model in a fresh cache."""
    folder = tmp_path_factory.mktemp("home")
    places = {f"EMLOCAL_{name}_DIR": str(folder / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMLOCAL_CACHE_DIR", places["EMLOCAL_CACHE_DIR"])
        model = starter.starter_path()
    model.parent.mkdir(parents=True)
    shutil.copyfile(smollm2.path, model)
    (folder / "config").mkdir()
    (folder / "config" / "config.toml").write_text(CONFIG, encoding="utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return places | {"PATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "110"}


@pytest.fixture
def at_home(home: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Runs this process in that environment, in an empty folder."""
    for name, value in home.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path
