"""Runs a program in a new interpreter that is locked in, and returns the result."""

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Literal

from emlocal.errors import EmlocalError
from emlocal.sandbox import landlock, seccomp
from emlocal.text import parse_json

Ending = Literal["passed", "failed", "time", "killed"]
_INSIDE = Path(__file__).with_name("inside.py")
_START_SECONDS = 5.0  # for starting the interpreter, in addition to the program's own time
_REPORT_BYTES = 1 << 16  # a pipe's capacity; a program that writes more waits until its time is up
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
"""The environment: nothing of the user's own, and libraries are told not to start threads."""


@dataclass(frozen=True)
class Limits:
    """Limits of time and memory for a program."""

    seconds: float = 10.0
    """Processor time. The limit on the clock is twice as much, since others may use the processor too."""
    memory: int = 2 << 30
    """Bytes of address space; numpy and scipy take about 0.5 GB of it."""


@dataclass(frozen=True)
class Outcome:
    """The result of running a program."""

    ending: Ending
    detail: str = ""
    """The error that it raised, or the signal that ended it."""

    @property
    def passed(self) -> bool:
        """Whether the program ran to its end and raised nothing."""
        return self.ending == "passed"


def check_containment() -> None:
    """Raises EmlocalError on systems that cannot contain programs. Programs do not run there."""
    if not seccomp.known() or landlock.abi() < landlock.OLDEST_ABI:
        raise EmlocalError(
            "this system cannot contain generated code: that needs Linux 6.2 or newer with"
            " Landlock, on x86-64"
            " or ARM64",
            "run code tasks in a virtual machine or a container with such a kernel",
        )


@dataclass(frozen=True)
class Calls:
    """A function of a program, and the arguments to call it with."""

    function: str
    inputs: Sequence[str]
    """Literals of tuples, each the arguments of one call."""
    seconds: float = 1.0
    """Processor time for each call."""


def run(program: str, limits: Limits = Limits()) -> Outcome:
    """Runs a Python program in the sandbox. It can read Python and its packages, and write nothing.

    Raises EmlocalError if the program cannot be contained, or the interpreter does not start.
    """
    secret = secrets.token_hex(16)
    code, report, clock = _run({"secret": secret, "program": program}, limits)
    if clock:
        return Outcome("time", f"ended after {_on_the_clock(limits):g} s")
    return _outcome(code, report, secret, limits)


def results(program: str, calls: Calls, limits: Limits = Limits()) -> list[str]:
    """Runs a Python program in the sandbox, calls its function, and returns a text for each call.

    The text is "returns " with the value as `canonical` writes it, "raises " with the exception's type, or
    "out of time". It is "ended" for the call at which the program ended and for all calls after it. Strings
    hash the same each time, and `random` begins the same. Raises EmlocalError as `run` does.
    """
    secret = secrets.token_hex(16)
    asked = {
        "secret": secret,
        "program": program,
        "calls": {"function": calls.function, "inputs": [*calls.inputs], "seconds": calls.seconds},
    }
    code, report, clock = _run(asked, limits)
    found = [str(said["result"]) for said in _own(report, secret) if "result" in said][: len(calls.inputs)]
    end = "out of time" if clock or code == -signal.SIGXCPU else "ended"
    return found + [end] * (len(calls.inputs) - len(found))


def _on_the_clock(limits: Limits) -> float:
    return 2 * limits.seconds + _START_SECONDS


def _run(asked: Mapping[str, object], limits: Limits) -> tuple[int, bytes, bool]:
    """Returns the interpreter's exit code, its report, and whether the clock ended it."""
    check_containment()
    reading, writing = os.pipe()
    try:
        arguments = [
            str(_INSIDE),
            str(writing),
            str(ceil(limits.seconds)),
            str(limits.memory),
            str(os.getpid()),
        ]
        clock = False
        with subprocess.Popen(
            [sys.executable, "-s", "-P", *arguments],  # like -I, but with the variables, which are all ours
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,  # messages from before the program, which has no stderr
            pass_fds=(writing,),
            env=_ENVIRONMENT | ({"PYTHONHASHSEED": "0"} if "calls" in asked else {}),
            cwd="/",
            start_new_session=True,
        ) as process:
            said = b""
            try:
                _, said = process.communicate(json.dumps(asked).encode(), timeout=_on_the_clock(limits))
            except subprocess.TimeoutExpired:
                clock = True
            finally:
                if process.poll() is None:  # also after Ctrl-C
                    process.kill()
        os.close(writing)
        writing = -1
        ready, _, report = os.read(reading, _REPORT_BYTES).partition(b"\n")
        if ready != b"ready" and not clock:
            raise EmlocalError(
                "the interpreter for generated code did not start:"
                f" {_last_line(said) or f'exit code {process.returncode}'}"
            )
        return process.returncode, report, clock
    finally:
        os.close(reading)
        if writing >= 0:
            os.close(writing)


def _last_line(said: bytes) -> str:
    return said.decode(errors="replace").strip().rpartition("\n")[2]


def _outcome(code: int, report: bytes, secret: str, limits: Limits) -> Outcome:
    if code == -signal.SIGXCPU:
        return Outcome("time", f"ended after {limits.seconds:g} s of the processor")
    if code < 0:
        return Outcome("killed", f"ended by signal {-code}")
    try:
        said = json.loads(report)
        if said["secret"] != secret:
            return Outcome("failed", "the program wrote its own report")
        return Outcome("passed") if said["error"] is None else Outcome("failed", str(said["error"]))
    except (ValueError, KeyError, TypeError):
        return Outcome("failed", f"exited early, with exit code {code}")


def _own(report: bytes, secret: str) -> Iterator[dict[str, object]]:
    """Yields the reports that carry the secret; the program can write to the same pipe."""
    for line in report.split(b"\n"):
        try:
            said = parse_json(line)
        except ValueError:
            continue
        if isinstance(said, dict) and said.get("secret") == secret:
            yield said
