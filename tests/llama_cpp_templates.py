"""The chat templates in llama.cpp's source, out of the source archive of the installed llama-cpp-python.

Nothing of it is in this repository: the archive (77 MB) is fetched once, and its templates are kept in
~/.cache/emlocal-tests.
"""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

CACHE = Path.home() / ".cache" / "emlocal-tests"


def templates() -> dict[str, str]:
    """Template by the name of its file. Raises CalledProcessError where the archive cannot be fetched."""
    if find_spec("llama_cpp") is None or find_spec("pip") is None:
        pytest.skip("needs llama-cpp-python and pip")
    wanted = version("llama-cpp-python")
    folder = CACHE / f"llama-cpp-python-{wanted}-templates"
    if not folder.exists():
        _fetch(wanted, folder)
    return {path.name: path.read_text("utf-8") for path in sorted(folder.glob("*.jinja"))}


def _fetch(wanted: str, folder: Path) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        here = Path(name)
        command = ["download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", name]
        asked = f"llama-cpp-python=={wanted}"
        subprocess.run([sys.executable, "-m", "pip", "--quiet", *command, asked], check=True)
        unpacked = here / "templates"
        unpacked.mkdir()
        with tarfile.open(next(here.glob("*.tar.gz"))) as archive:
            for member in archive:
                path = Path(member.name)
                if member.isfile() and path.suffix == ".jinja" and path.parent.name == "templates":
                    file = archive.extractfile(member)
                    assert file is not None
                    (unpacked / path.name).write_bytes(file.read())
        try:
            unpacked.rename(folder)
        except OSError:  # another process was faster
            assert folder.exists()
