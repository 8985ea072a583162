"""What a result was made with: versions, commit, machine, and the model by its hash."""

import json
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import emlocal
from emlocal.backends import ENGINES
from emlocal.backends.engine import engine
from emlocal.machine import cpu
from emlocal.text import parse_json

_ANSWERED = "made_with.jsonl"


def provenance(name: str) -> dict[str, object]:
    """Versions, commit and machine, with the engine of this name; for results.json."""
    machine = cpu()
    packages = ("numpy", *(engine(name).distributions if name in ENGINES else ()), "math-verify")
    return {
        "emlocal": emlocal.__version__,
        "commit": commit(),
        "packages": {name: found for name in packages if (found := _version(name))},
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": machine.model,
        "cores": machine.physical,
    }


def note_answering(folder: Path, method: str, made_with: Mapping[str, object]) -> None:
    """Remember in the folder of an evaluation what a method's answers are made with, from here on."""
    if answered_with(folder).get(method, [])[-1:] != [dict(made_with)]:
        with (folder / _ANSWERED).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"method": method, "made_with": made_with}, ensure_ascii=False) + "\n")


def answered_with(folder: Path) -> dict[str, list[dict[str, object]]]:
    """What each method's answers were made with, from the first on; more than one where the run went on with
    another version, or elsewhere."""
    found: dict[str, list[dict[str, object]]] = {}
    path = folder / _ANSWERED
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            value = parse_json(line)
            found.setdefault(value["method"], []).append(dict(value["made_with"]))
        except (ValueError, KeyError, TypeError):
            continue  # torn by a crash
    return found


def commit() -> str | None:
    """Of the checkout that emlocal runs from, "-dirty" where it was changed; None where there is none."""
    folder = Path(emlocal.__file__).parent
    try:
        head = _git(folder, "rev-parse", "HEAD")
        inside = _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return None
    return (head + ("-dirty" if changed else "")) if inside else None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
