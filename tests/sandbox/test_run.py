"""Harmful programs: each is contained, and counts as failed."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from emlocal.errors import EmlocalError
from emlocal.sandbox import landlock, run, seccomp
from emlocal.sandbox.run import Limits

pytestmark = pytest.mark.skipif(
    landlock.abi() < landlock.OLDEST_ABI or not seccomp.known(), reason="needs Landlock (Linux 6.2)"
)
SYSTEM_PYTHON = shutil.which("python3", path="/usr/bin")
REPOSITORY = Path(__file__).parents[2]
QUICK = Limits(seconds=2)
NOT_PERMITTED = "[Errno 1]"
DENIED = "[Errno 13]"


def test_a_right_program_passes() -> None:
    assert run.run("def f(x):\n    return x + 1\nassert f(1) == 2").passed


def test_numpy_and_scipy_work_inside() -> None:
    program = (
        "import numpy as np\nfrom scipy.linalg import sqrtm\nfrom scipy.integrate import solve_ivp\n"
        "assert np.allclose(sqrtm(4 * np.eye(3)), 2 * np.eye(3))\n"
        "assert np.isclose(solve_ivp(lambda t, y: y, (0, 1), [1.0], rtol=1e-8).y[0, -1], np.e)"
    )
    assert run.run(program, Limits(seconds=30)) == run.Outcome("passed")


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("assert 1 == 2, 'not so'", "AssertionError: not so"),
        ("def", "SyntaxError"),
        ("f = lambda: f()\nf()", "RecursionError"),
        ("import sys\nsys.exit(0)", "SystemExit"),
        ("import os\nos._exit(0)", "exited early, with exit code 0"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ],
)
def test_leaving_early_is_failing(program: str, said: str) -> None:
    outcome = run.run(program)
    assert outcome.ending == "failed"
    assert said in outcome.detail


@pytest.mark.parametrize(
    "call",
    [
        "fcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())",
        "fcntl.fcntl(r, 10, 9)",  # F_SETSIG
        "fcntl.fcntl(r, 15, bytes(8))",  # F_SETOWN_EX
        "fcntl.ioctl(r, 0x8901, bytes(4))",  # FIOSETOWN
        "fcntl.ioctl(r, 0x8902, bytes(4))",  # SIOCSPGRP
    ],
)
def test_the_kernel_sends_no_signals_for_it(call: str) -> None:
    """Landlock contains signals from Linux 6.12 on.

    Before that, F_SETOWN and O_ASYNC could kill any process.
    """
    outcome = run.run(f"import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_GETFL)\n{call}")
    assert outcome.ending == "failed"
    assert NOT_PERMITTED in outcome.detail


def test_a_program_ends_with_the_process_that_runs_it() -> None:
    code = (
        "from emlocal.sandbox.run import run\n"
        "print('started', flush=True)\nrun('import time; time.sleep(60)')"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=REPOSITORY)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"started\n"
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    until = time.monotonic() + 20
    while not (child := children.read_text().strip()) and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(1)  # by now it has locked itself in, and sleeps
    parent.kill()
    parent.communicate()
    while Path(f"/proc/{child}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert child
    assert not Path(f"/proc/{child}").exists()


def test_a_report_of_its_own_does_not_count() -> None:
    program = (
        'import os, sys\nos.write(int(sys.argv[1]), b\'{"secret": "guess", "error": null}\')\nos._exit(0)'
    )
    assert run.run(program) == run.Outcome("failed", "the program wrote its own report")


def test_a_crash_is_told_from_a_failure() -> None:
    assert run.run("import ctypes\nctypes.string_at(0)") == run.Outcome("killed", "ended by signal 11")


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "while True: print('x' * 100_000)",
        "import os, sys\nwhile True: os.write(int(sys.argv[1]), b'x' * 4096)",
        "import time\ntime.sleep(3600)",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    ],
)
def test_an_endless_program_is_ended(program: str) -> None:
    started = time.monotonic()
    outcome = run.run(program, Limits(seconds=1))
    assert outcome.ending in ("time", "killed")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(10 * 2**30)",
        "import mmap\nmmap.mmap(-1, 10 * 2**30)",
        "x = []\nwhile True: x.append(bytearray(2**24))",
    ],
)
def test_ten_gigabytes_are_not_to_be_had(program: str) -> None:
    outcome = run.run(program, Limits(seconds=5, memory=1 << 30))
    assert outcome.ending == "failed"
    assert "Memory" in outcome.detail or "Cannot allocate" in outcome.detail


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.system('true') and 1/0",
        "import os\nos.execv('/bin/true', ['true'])",
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
        "import os, ctypes\nif ctypes.CDLL(None, use_errno=True).syscall(435, 0, 0) != -1: 1/0\nos.fork()",
    ],
)
def test_a_fork_bomb_has_no_second_process(program: str) -> None:
    outcome = run.run(program, QUICK)
    assert outcome.ending == "failed"
    wanted = (NOT_PERMITTED, "can't start new thread", "division by zero", "Permission denied", DENIED)
    assert any(said in outcome.detail for said in wanted), outcome


@pytest.mark.parametrize(
    "attempt",
    [
        "open({path!r}, 'w')",
        "open({path!r}, 'a').write('x')",
        "os.open({path!r}, os.O_RDONLY | os.O_TRUNC)",
        "os.truncate({path!r}, 0)",
        "os.remove({path!r})",
        "os.rename({path!r}, {path!r} + '2')",
        "os.chmod({path!r}, 0)",
        "os.utime({path!r}, (0, 0))",
        "os.setxattr({path!r}, 'user.x', b'x')",
        "os.symlink({path!r}, {path!r} + '2')",
        "os.link({path!r}, {path!r} + '2')",
        "os.mkdir({path!r} + '2')",
        "open('here', 'w')",
        "open('/dev/shm/there', 'w')",
    ],
)
def test_nothing_is_written(attempt: str, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("kept")
    before = path.stat()
    outcome = run.run("import os\n" + attempt.format(path=str(path)), QUICK)
    assert outcome.ending == "failed"
    assert DENIED in outcome.detail or NOT_PERMITTED in outcome.detail, outcome
    assert path.read_text() == "kept"
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]
    assert (path.stat().st_mode, path.stat().st_mtime) == (before.st_mode, before.st_mtime)


def test_what_is_the_users_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text("secret")
    monkeypatch.setenv("TOKEN", "secret")
    for attempt in (f"open({str(secret)!r})", "open('/etc/passwd')", "open('/proc/self/environ')"):
        assert DENIED in run.run(attempt, QUICK).detail
    assert run.run("import os\nassert 'TOKEN' not in os.environ and 'HOME' not in os.environ", QUICK).passed


def test_the_network_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        port = server.getsockname()[1]
        for attempt in (
            f"socket.create_connection(('127.0.0.1', {port}))",
            "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
            "socket.socket(socket.AF_UNIX).connect('/run/docker.sock')",
            "socket.getaddrinfo('localhost', 80, 0, socket.SOCK_STREAM) and socket.socket()",
        ):
            outcome = run.run("import socket\n" + attempt, QUICK)
            assert outcome.ending == "failed"
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize(
    "attempt",
    [
        "os.kill(os.getppid(), 0)",
        "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (1, 1))",
        "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "os.memfd_create('x')",
        "resource.setrlimit(resource.RLIMIT_CPU, (3600, 3600))",
    ],
)
def test_others_are_left_alone(attempt: str) -> None:
    outcome = run.run(f"import os, resource\n{attempt}", QUICK)
    assert outcome.ending == "failed"
    assert NOT_PERMITTED in outcome.detail or "not allowed" in outcome.detail, outcome


@pytest.mark.parametrize("number", [425, 435, 437, 425 + 0x40000000])
def test_new_and_other_system_calls_do_not_exist(number: int) -> None:
    program = (
        "import ctypes, errno\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"assert libc.syscall(ctypes.c_long({number}), 0, 0, 0, 0) == -1\n"
        "assert ctypes.get_errno() == errno.ENOSYS"
    )
    assert run.run(program, QUICK) == run.Outcome("passed")


def test_nothing_is_left_open_or_running() -> None:
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before, running = len(list(Path("/proc/self/fd").iterdir())), children.read_text()
    for program in ("pass", "import time\ntime.sleep(99)", "import os\nos._exit(1)"):
        run.run(program, Limits(seconds=0.1))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert children.read_text() == running  # the template process may be among them


def test_without_containment_nothing_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(landlock, "abi", lambda: 2)
    with pytest.raises(EmlocalError, match="cannot contain generated code"):
        run.run("pass")


def test_an_interpreter_that_does_not_start_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_INSIDE", Path("/nowhere/inside.py"))
    with pytest.raises(EmlocalError, match=r"did not start: .*/nowhere/inside\.py"):
        run.run("pass")


@pytest.mark.skipif(os.getuid() != 0 or not SYSTEM_PYTHON, reason="changes user")
def test_it_holds_for_a_user_without_privileges() -> None:
    """The other tests may run as root.

    This one uses the system's Python, as root's own may be unreadable for others.
    """
    folder = Path(tempfile.mkdtemp(prefix="emlocal-test-"))
    shutil.copytree(REPOSITORY / "emlocal", folder / "emlocal")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    code = (
        f"import sys; sys.path[:0] = [{str(folder)!r}]\n"
        "from emlocal.sandbox.run import run\n"
        "assert run('assert True').passed\n"
        "for bad in ('import os; os.fork()', 'import socket; socket.socket()', 'open(\"/tmp/x\", \"w\")'):\n"
        "    assert 'Errno' in run(bad).detail"
    )
    try:
        done = subprocess.run(
            [str(SYSTEM_PYTHON), "-I", "-c", code],
            user=65534,
            group=65534,
            extra_groups=[],
            capture_output=True,
            text=True,
            cwd="/",
            check=False,
        )
    finally:
        shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
