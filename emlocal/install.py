"""How software gets onto this machine: the Python environment, its installer, the compiler's package.

Install lines are meant to be pasted: they name this very Python where a bare `pip` could be another one's.
"""

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

_COMPILERS = {
    "Debian, Ubuntu": "sudo apt-get install build-essential cmake",
    "Fedora, RHEL": "sudo dnf install gcc-c++ cmake",
    "Arch": "sudo pacman -S base-devel cmake",
    "Alpine": "sudo apk add build-base cmake",
    "macOS": "xcode-select --install",
    "Windows": "Visual Studio Build Tools with C++: winget install Microsoft.VisualStudio.2022.BuildTools",
}
_FAMILIES = {
    "debian": "Debian, Ubuntu",
    "ubuntu": "Debian, Ubuntu",
    "fedora": "Fedora, RHEL",
    "rhel": "Fedora, RHEL",
    "arch": "Arch",
    "alpine": "Alpine",
}
_OPENMP = {
    "Debian, Ubuntu": "sudo apt-get install libgomp1",
    "Fedora, RHEL": "sudo dnf install libgomp",
    "Arch": "sudo pacman -S gcc-libs",
    "Alpine": "sudo apk add libgomp",
}


def system_family() -> str | None:
    """The key of this machine's system in the tables of packages; None for a system they do not have."""
    if sys.platform == "darwin":
        return "macOS"
    if sys.platform == "win32":
        return "Windows"
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return None
    names = [release.get("ID", ""), *release.get("ID_LIKE", "").split()]
    return next((_FAMILIES[name] for name in names if name in _FAMILIES), None)


def compiler_lines() -> list[str]:
    """How a C++ compiler is installed: this machine's line alone where its system is known, else all."""
    family = system_family()
    if family is not None:
        return [_COMPILERS[family]]
    return [f"{system}: {command}" for system, command in _COMPILERS.items()]


def openmp_line() -> str | None:
    """How the OpenMP library that wheels of llama.cpp need is installed here."""
    return _OPENMP.get(system_family() or "")


def compilers() -> list[str]:
    """The C++ compilers and build tools that are found, as paths."""
    if sys.platform == "darwin" and not _has_xcode_tools():
        return []  # /usr/bin/c++ is a stub there, which asks to install the tools
    found = [shutil.which(name) for name in ("c++", "g++", "clang++", "cl")]
    first = next((path for path in found if path), None)
    return [first, *filter(None, [shutil.which("cmake")])] if first else []


def _has_xcode_tools() -> bool:
    return subprocess.run(["/usr/bin/xcode-select", "-p"], capture_output=True, check=False).returncode == 0


def environment() -> str:
    """What kind of Python environment this is."""
    prefix = Path(sys.prefix)
    if "pipx" in prefix.parts:
        return "pipx"
    if prefix.parent.name == "tools" and prefix.parent.parent.name == "uv":
        return "uv tool"
    if (prefix / "conda-meta").is_dir():
        return "conda"
    return "virtual environment" if sys.prefix != sys.base_prefix else "system Python"


def installer() -> list[str]:
    """The command that installs packages into this environment."""
    if environment() == "pipx":
        return ["pipx", "runpip", Path(sys.prefix).name, "install"]
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install"]
    if shutil.which("uv"):
        return ["uv", "pip", "install", "--python", sys.executable]
    return [sys.executable, "-m", "pip", "install"]


def line(command: list[str]) -> str:
    """A command as it is typed here."""
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)
