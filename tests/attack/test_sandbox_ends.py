"""Processes that a program leaves behind when emlocal is killed, and access to a project that is a venv."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from emlocal.sandbox import landlock, run, seccomp
from emlocal.sandbox.run import Limits

pytestmark = pytest.mark.skipif(
    landlock.abi() < landlock.OLDEST_ABI or not seccomp.known(), reason="needs Landlock (Linux 6.2)"
)
REPOSITORY = Path(__file__).parents[2]
PATIENCE = 20.0  # seconds for a process to begin or end, on a busy machine

STAYS = {
    "sleeps": "import time\ntime.sleep(60)",
    "hears no signal": (
        "import signal, time\n"
        "for number in range(1, 65):\n"
        "    try:\n        signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\ntime.sleep(60)"
    ),
    "takes the signal back": (
        "import ctypes, time\nlibc = ctypes.CDLL(None)\nzero = ctypes.c_ulong(0)\n"
        "libc.prctl(1, zero, zero, zero, zero)\ntime.sleep(60)"
    ),
    "changes its user, which takes the signal back": (
        "import os, time\n"
        "for change in (os.setuid, os.seteuid, os.setgid, os.setegid):\n"
        "    try:\n        change(65534)\n"
        "    except OSError:\n        pass\n"
        "time.sleep(60)"
    ),
    "works": "while True: pass",
    "writes until nobody reads": "import os, sys\nwhile True: os.write(int(sys.argv[1]), b'x' * 4096)",
}


def alive(parent: int) -> list[int]:
    """Returns the sandboxed programs that this process started: its id is their last argument."""
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            words = folder.joinpath("cmdline").read_bytes().split(b"\0") if folder.name.isdigit() else []
            if any(word.endswith(b"sandbox/inside.py") for word in words) and str(parent).encode() in words:
                found.append(int(folder.name))
    return found


@contextmanager
def running(program: str) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a program in the sandbox."""
    code = (
        "import sys\nfrom emlocal.sandbox.run import Limits, run\n"
        "print('started', flush=True)\nrun(sys.argv[1], Limits(seconds=40))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, program], stdout=subprocess.PIPE, cwd=REPOSITORY, start_new_session=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"started\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def ends(parent: int) -> bool:
    until = time.monotonic() + PATIENCE
    while alive(parent):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("program", STAYS.values(), ids=STAYS.keys())
def test_no_program_outlives_a_kill(program: str) -> None:
    with running(program) as process:
        until = time.monotonic() + PATIENCE
        while not alive(process.pid) and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.7)  # by now it has locked itself in and does its work
        assert alive(process.pid)
        process.kill()
        assert ends(process.pid)


@pytest.mark.attack
@pytest.mark.parametrize("wait", [0.004 * i for i in range(50)])
def test_no_program_outlives_a_kill_at_any_moment_of_its_start(wait: float) -> None:
    with running(STAYS["takes the signal back"]) as process:
        time.sleep(wait)
        process.kill()
        process.wait()
        time.sleep(0.3)  # the forked process is an interpreter by now, which can be seen
        assert ends(process.pid)


def test_the_signal_cannot_be_taken_back_and_memory_not_dumped() -> None:
    program = (
        "import ctypes\nlibc = ctypes.CDLL(None)\nzero = ctypes.c_ulong(0)\nsignal = ctypes.c_int()\n"
        "assert libc.prctl(1, zero, zero, zero, zero) == -1\n"
        "assert libc.prctl(2, ctypes.byref(signal), zero, zero, zero) == 0 and signal.value == 9\n"
        "assert libc.prctl(3, zero, zero, zero, zero) == 0\n"  # not dumpable
        "assert libc.prctl(39, zero, zero, zero, zero) == 1\n"  # no new privileges
        "assert libc.prctl(21, zero, zero, zero, zero) == 2"  # seccomp, with a filter
    )
    assert run.run(program, Limits(seconds=5)) == run.Outcome("passed")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project made by `python -m venv .`, with a lib of its own, installed in editable mode."""
    folder = tmp_path_factory.mktemp("project")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "."], cwd=folder, check=True)
    for name in SECRETS:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("SECRET = 1")
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "installed.py").write_text("X = 1")
    (packages / "edited.pth").write_text(f"{folder}\n{folder / 'src'}\n")
    return folder


SECRETS = (".env", "secret.py", "src/secret.py", "lib/secret.py", "include/secret.h", "bin/deploy", ".git/x")


def said_in(project: Path, program: str) -> str:
    """Returns the result of a program that a venv's interpreter runs."""
    code = (
        f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from emlocal.errors import EmlocalError\nfrom emlocal.sandbox.run import run\n"
        "try:\n    print(run(sys.argv[1]))\nexcept EmlocalError as error:\n    print(error)"
    )
    done = subprocess.run(
        [project / "bin" / "python", "-I", "-c", code, program], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_project_that_is_a_venv_is_not_read(project: Path) -> None:
    program = (
        "import os, sys, installed\n"
        f"folder, secrets = {str(project)!r}, {SECRETS!r}\n"
        "assert sys.prefix == folder\nread = []\n"
        "for name in (*secrets, '', 'src', 'lib', '.git'):\n"
        "    try:\n"
        "        os.close(os.open(f'{folder}/{name}', os.O_RDONLY))\n"
        "        read.append(name)\n"
        "    except PermissionError:\n        pass\n"
        "assert not read, read\n"
        "try:\n    import secret\n"
        "except (ImportError, PermissionError):\n    pass\n"
        "else:\n    1 / 0"
    )
    assert said_in(project, program) == "Outcome(ending='passed', detail='')"


def test_what_packages_leave_open_is_closed(project: Path) -> None:
    """Code in .pth files runs when the interpreter starts, before the locks are set."""
    packages = next(project.glob("lib/python*/site-packages"))
    (packages / "hook.pth").write_text("import hook\n")
    (packages / "hook.py").write_text(f"import os\nos.dup2(os.open({str(project / '.env')!r}, 0), 9)")
    try:
        program = "import hook, os\ntry:\n    os.fstat(9)\nexcept OSError:\n    pass\nelse:\n    1 / 0"
        assert said_in(project, program) == "Outcome(ending='passed', detail='')"
        (packages / "hook.py").write_text(
            "import threading, time\nthreading.Thread(target=time.sleep, args=(99,), daemon=True).start()"
        )
        assert "did not start: RuntimeError: 2 threads run before the program" in said_in(project, "pass")
    finally:
        (packages / "hook.pth").unlink()
