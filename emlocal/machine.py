"""Facts about this machine: its system, processor and memory, and how to install software.

It needs neither an engine nor numpy. A fact that cannot be found is None or empty, never a guess. Install
lines are for pasting: they name this very Python, because a bare `pip` may belong to another one.
"""

import ctypes
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from emlocal.models.memory import available

# Features that decide how fast a CPU engine can be, in the spelling of Linux's /proc/cpuinfo and of people.
_LINUX_FEATURES = {
    "sse4_2": "SSE4.2",
    "avx": "AVX",
    "f16c": "F16C",
    "fma": "FMA",
    "avx2": "AVX2",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16",
    "asimd": "NEON",
    "asimddp": "DOTPROD",
    "i8mm": "I8MM",
    "sve": "SVE",
}
_MACOS_FEATURES = {
    "hw.optional.avx1_0": "AVX",
    "hw.optional.avx2_0": "AVX2",
    "hw.optional.avx512f": "AVX512",
    "hw.optional.neon": "NEON",
    "hw.optional.arm.FEAT_DotProd": "DOTPROD",
    "hw.optional.arm.FEAT_I8MM": "I8MM",
}
_WINDOWS_FEATURES = {38: "SSE4.2", 39: "AVX", 40: "AVX2", 41: "AVX512", 19: "NEON", 43: "DOTPROD"}


@dataclass(frozen=True)
class CPU:
    """The processor."""

    model: str
    architecture: str
    logical: int
    usable: int
    """Logical cores that this process may run on."""
    physical: int
    """Physical cores within affinity and container quota: the number of emlocal's threads."""
    features: tuple[str, ...]


def physical_cores() -> int:
    """Returns the number of physical cores (on Apple Silicon: performance cores) that this process may use.

    The process's affinity and cgroup quota limit it. A CPU engine takes that many threads: decoding is bound
    by memory bandwidth, and a second thread on a core only adds contention.
    """
    if sys.platform == "darwin":
        cores = _sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu") or (os.cpu_count() or 1)
    elif sys.platform == "linux":
        cores = _linux_cores()
    else:
        cores = (os.cpu_count() or 2) // 2
    return max(1, cores)


def _linux_cores() -> int:
    usable = os.sched_getaffinity(0)
    siblings = set()
    for cpu in usable:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(topology.read_text().strip() if topology.exists() else str(cpu))
    return min(len(siblings), _cgroup_quota() or len(siblings))


def _cgroup_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Returns the whole CPUs that this process's control groups grant (a container's --cpus); None for all.

    Version 1 mounts each controller in a folder of its own, version 2 mounts all in one. Both may exist.
    """
    quotas = []
    for line in own.read_text("ascii").splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for top in {root / controllers, root / "cpu"} if controllers else (root,):
            group = top / path.lstrip("/")
            # Inside a container the path may be the host's; then the quota is at the top.
            for folder in (group, *(p for p in group.parents if p.is_relative_to(top))):
                quotas.append(_version_1(folder) if controllers else _version_2(folder))
    granted = [quota for quota in quotas if quota is not None]
    return max(1, int(min(granted))) if granted else None


def _version_1(folder: Path) -> float | None:
    """Returns the CPUs that one group of cgroup v1 grants; None for all."""
    quota, period = folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"
    if not quota.is_file() or not period.is_file() or int(quota.read_text("ascii")) < 0:
        return None
    return int(quota.read_text("ascii")) / int(period.read_text("ascii"))


def _version_2(folder: Path) -> float | None:
    """Returns the CPUs that one group of cgroup v2 grants; None for all."""
    limit = folder / "cpu.max"
    if not limit.is_file():
        return None
    quota, period = limit.read_text("ascii").split()
    return None if quota == "max" else int(quota) / int(period)


def _sysctl(name: str) -> int:
    return int(_output("/usr/sbin/sysctl", "-n", name) or 0)


def cpu() -> CPU:
    """Returns the facts about this machine's processor."""
    logical = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if platform.system() == "Linux" else logical
    return CPU(_cpu_model(), platform.machine(), logical, usable, physical_cores(), _features())


def system_name() -> str:
    """Returns the operating system's name and version, as its makers write them."""
    if platform.system() == "Linux":
        try:
            name = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
        except OSError:
            name = "Linux"
        return f"{name}, Linux {platform.release()}"
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return f"{platform.system()} {platform.release()} ({platform.version()})"


def container() -> str | None:
    """Returns the kind of container that this runs in; None outside one, or if it cannot be told."""
    if platform.system() != "Linux":
        return None
    if Path("/.dockerenv").exists():
        return "docker"
    if Path("/run/.containerenv").exists():
        return "podman"
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        return "kubernetes"
    version = Path("/proc/version")
    return "WSL" if version.is_file() and "microsoft" in version.read_text("utf-8").lower() else None


def memory_total() -> int | None:
    """Returns the bytes of memory in the machine; None if unknown."""
    if platform.system() == "Linux":
        found = re.search(r"^MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text("ascii"), re.M)
        return int(found[1]) * 1024 if found else None
    if platform.system() == "Darwin":
        return _sysctl("hw.memsize") or None
    return None


def memory_available() -> int:
    """Returns the bytes that a new process may use now, within its container's limits."""
    return available()


def resident_bytes() -> int | None:
    """Returns the bytes of this process that are in memory now; None if unknown."""
    if platform.system() == "Linux":
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if platform.system() == "Darwin":
        return int(_output("/bin/ps", "-o", "rss=", "-p", str(os.getpid())) or 0) * 1024 or None
    return None


def peak_memory() -> int:
    """Returns the most bytes that this process had in main memory at once; 0 if the system does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def describe() -> dict[str, object]:
    """Returns the few facts about the machine that belong beside a measured number."""
    processor = cpu()
    return {
        "system": system_name(),
        "cpu": processor.model,
        "architecture": processor.architecture,
        "logical_cores": processor.logical,
        "physical_cores": processor.physical,
        "features": list(processor.features),
        "memory_bytes": memory_total(),
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    if platform.system() == "Linux":
        text = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
        found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.M)
        return found[1].strip() if found else _lscpu_model()
    if platform.system() == "Darwin":
        return _output("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string") or "unknown"
    return os.environ.get("PROCESSOR_IDENTIFIER") or platform.processor() or "unknown"


def _lscpu_model() -> str:
    """Returns the processor's name from lscpu: on ARM, /proc/cpuinfo has numbers instead of names."""
    found = re.search(r"^Model name:\s*(.+)$", _output("lscpu"), re.M)
    return found[1].strip() if found else "unknown"


def _features() -> tuple[str, ...]:
    if platform.system() == "Linux":
        text = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
        found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.M)
        has = set(found[1].split()) if found else set()
        return tuple(name for flag, name in _LINUX_FEATURES.items() if flag in has)
    if platform.system() == "Darwin":
        return tuple(n for key, n in _MACOS_FEATURES.items() if _output("/usr/sbin/sysctl", "-n", key) == "1")
    if platform.system() == "Windows":
        present = ctypes.windll.kernel32.IsProcessorFeaturePresent  # type: ignore[attr-defined]
        return tuple(name for number, name in _WINDOWS_FEATURES.items() if present(number))
    return ()


def _output(*command: str) -> str:
    """Returns the output of a system command; "" if the command is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


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
    """Returns this system's key in the tables of packages; None for a system that they lack."""
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
    """Returns the commands that install a C++ compiler: this system's if it is known, otherwise all."""
    family = system_family()
    if family is not None:
        return [_COMPILERS[family]]
    return [f"{system}: {command}" for system, command in _COMPILERS.items()]


def openmp_line() -> str | None:
    """Returns the command that installs the OpenMP library for llama.cpp's wheels here; None if unknown."""
    return _OPENMP.get(system_family() or "")


def compilers() -> list[str]:
    """Returns the paths of the C++ compiler and of cmake, if found."""
    if sys.platform == "darwin" and not _has_xcode_tools():
        return []  # /usr/bin/c++ is a stub there, which asks to install the tools
    found = [shutil.which(name) for name in ("c++", "g++", "clang++", "cl")]
    first = next((path for path in found if path), None)
    return [first, *filter(None, [shutil.which("cmake")])] if first else []


def _has_xcode_tools() -> bool:
    return subprocess.run(["/usr/bin/xcode-select", "-p"], capture_output=True, check=False).returncode == 0


def environment() -> str:
    """Returns the kind of Python environment that this is."""
    prefix = Path(sys.prefix)
    if "pipx" in prefix.parts:
        return "pipx"
    if prefix.parent.name == "tools" and prefix.parent.parent.name == "uv":
        return "uv tool"
    if (prefix / "conda-meta").is_dir():
        return "conda"
    return "virtual environment" if sys.prefix != sys.base_prefix else "system Python"


def installer() -> list[str]:
    """Returns the command that installs packages into this environment."""
    if environment() == "pipx":
        return ["pipx", "runpip", Path(sys.prefix).name, "install"]
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install"]
    if shutil.which("uv"):
        return ["uv", "pip", "install", "--python", sys.executable]
    return [sys.executable, "-m", "pip", "install"]


def line(command: list[str]) -> str:
    """Returns a command as a line to type in this system's shell."""
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)
