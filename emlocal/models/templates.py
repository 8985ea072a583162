"""Chat templates: a model's own Jinja program that turns messages into its prompt.

A template comes from a downloaded file, so it is treated as hostile. It is rendered in a process of its own,
with bounds on time, output and memory; the process stays from turn to turn (template_worker.py). Templates
that are known by their digest (known_templates.toml) are rendered in this process: somebody has read them,
and they end.

`TemplateProcess` is that process from the caller's side: ask, wait, end it in time.
"""

import atexit
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from emlocal.cancel import stop_requested
from emlocal.errors import CancelledError, EmlocalError, ModelError, UsageError
from emlocal.models.template_worker import MAX_SECONDS, Outcome, prepared, rendered

_START_SECONDS = 60.0  # for a cold disk; usually it takes a twentieth of a second
_POLL_SECONDS = 0.02  # how soon Ctrl-C ends a template
_BYTES_A_SECOND = 20_000_000  # of a long conversation, on its way to the process and back
_AT_ONCE = 32_000  # bytes that a pipe takes while the process is starting
_BOOT = "import sys; sys.path += sys.argv[1:]; from emlocal.models.template_worker import main; main()"


class TemplateProcess:
    """A process that renders templates.

    It starts when it is needed, and a new one replaces it after it ended.

    It ends with this process, also after kill -9: its input ends then, and while a template runs it has an
    alarm. It inherits neither memory nor open files, and Ctrl-C does not reach it. Several threads take
    turns.
    """

    def __init__(self) -> None:
        self._reset()
        atexit.register(self.close)
        if sys.platform != "win32":
            os.register_at_fork(after_in_child=self._leave_to_the_parent)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owed: list[
            str | None
        ] = []  # outstanding outcomes: that it is ready (None), or has compiled a template
        self._ended_for = ""

    @property
    def pid(self) -> int | None:
        """The process id, or None if no process runs."""
        return self._process.pid if self._process else None

    def prepare(self, template: str) -> None:
        """Starts the process and lets it compile a template, without waiting. `ask` reports failures."""
        line = _line({"template": template})
        with self._lock:
            try:
                self._start()
            except OSError:
                return
            if len(line) <= _AT_ONCE:
                self._write(line)
                self._owed.append(template)

    def ask(self, asked: Mapping[str, Any]) -> Outcome:
        """Returns the outcome for {"template", "messages", "values"}.

        Raises EmlocalError if the process cannot be started, and CancelledError if a block of `interruptible`
        was asked to stop.
        """
        line = _line(asked)
        with self._lock:
            try:
                outcome = self._outcome(line, str(asked["template"]))
            except (OSError, RuntimeError) as why:  # RuntimeError: no more threads
                self._end()
                said = why.strerror if isinstance(why, OSError) and why.strerror else why
                raise EmlocalError(
                    f"the process for the model's chat template cannot be started: {said}",
                    "end other programs, raise the limits (ulimit -a), or skip the template with --raw",
                ) from why
            except BaseException:  # its next outcome would be taken for the answer to another question
                self._end()
                raise
            if outcome[0] == "stopped":
                self._end()  # full memory leaves fragments, which the next template would lack
            return outcome

    def _outcome(self, line: bytes, template: str) -> Outcome:
        if not self._is_ready():
            if self._owed[:1] == [template]:  # it never finished compiling this template
                return self._end_of_template()
            self._end()
            if not self._is_ready():
                raise OSError(f"it ended with code {self._end()}")
        return self._exchange(line, MAX_SECONDS + len(line) / _BYTES_A_SECOND) or self._end_of_template()

    def close(self) -> None:
        """Ends the process. The next question starts another."""
        with self._lock:
            self._end()

    def _is_ready(self) -> bool:
        """Starts the process if there is none, and reads its outstanding outcomes.

        False: it has ended meanwhile.
        """
        self._start()
        while self._owed:
            if self._exchange(b"", _START_SECONDS if self._owed[0] is None else MAX_SECONDS) is None:
                return False
            self._owed.pop(0)
        return True

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._end()
        if not sys.executable:
            raise OSError("sys.executable is not set")
        # -I and -S: nothing of this folder, of variables or of a site's start-up files runs there
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _BOOT, *_places()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is for us; a session of its own would wait longer for a busy processor
        )
        self._owed = [None]

    def _exchange(self, line: bytes, seconds: float) -> Outcome | None:
        """Sends a line and reads one. None: the process ended, or was too slow. Raises CancelledError."""
        assert self._process is not None
        assert self._process.stdout is not None
        self._ended_for = ""
        answered = threading.Event()
        watch = threading.Thread(
            target=self._watch, args=(self._process, answered, time.monotonic() + seconds), daemon=True
        )
        watch.start()
        try:
            self._write(line)
            said = self._process.stdout.readline()
        finally:
            answered.set()
            watch.join()
        if self._ended_for == "stop":
            raise CancelledError
        if not said.endswith(b"\n"):
            return None
        kind, text = json.loads(said)
        if self._ended_for:  # the answer came just then
            self._end()
        return kind, text

    def _write(self, line: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(OSError):  # the process has ended, which the reader will see
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def _watch(self, process: "subprocess.Popen[bytes]", answered: threading.Event, until: float) -> None:
        """Ends the process if its answer is late, or if nobody wants it any more."""
        while not answered.wait(_POLL_SECONDS):
            if stop_requested() or time.monotonic() > until:
                self._ended_for = "stop" if stop_requested() else "time"
                process.kill()
                return

    def _end_of_template(self) -> Outcome:
        """Returns the outcome of a template in which the process ended."""
        code = self._end()
        if self._ended_for == "time" or (sys.platform != "win32" and code == -signal.SIGALRM):
            return "stopped", f"it took more than {MAX_SECONDS:g} seconds"
        return "stopped", f"its process ended with code {code}"

    def _end(self) -> int:
        """Ends the process and returns its exit code; 0 if there is none."""
        process, self._process, self._owed = self._process, None, []
        if process is None:
            return 0
        assert process.stdin is not None
        assert process.stdout is not None
        process.kill()
        with suppress(OSError):  # it may have unsent data
            process.stdin.close()
        process.stdout.close()
        return process.wait()

    def _leave_to_the_parent(self) -> None:
        """Closes the child's ends of the pipes after a fork.

        They would keep the process alive without its parent.
        """
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                # not the buffer: it would write what another thread had begun to write
                pipe.raw.close()  # type: ignore[attr-defined]
        self._reset()


def _line(asked: Mapping[str, Any]) -> bytes:
    return json.dumps({**asked, "seconds": MAX_SECONDS}).encode() + b"\n"


def _places() -> list[str]:
    """Returns the folders with the packages that the process needs, without importing them here."""
    specs = [find_spec(name) for name in ("emlocal", "jinja2", "markupsafe")]
    return list(dict.fromkeys(str(Path(spec.origin).parent.parent) for spec in specs if spec and spec.origin))


Message = Mapping[str, Any]
"""A table with "role" and "content"; "tool_calls", "tool_call_id" and "name" may stand beside them.

The content is a text, a list of parts ({"type": "text", "text": …}), or None beside tool calls.
"""
_RAW = "skip the template with --raw"
_process = TemplateProcess()


def is_known(template: str) -> bool:
    """Returns whether somebody has read this template; a newline at its end does not count."""
    return digest(template) in _known()


@lru_cache(maxsize=4)
def digest(template: str) -> str:
    """Returns a template's name in known_templates.toml. Jinja itself drops one newline at the end."""
    text = template.removesuffix("\n").encode(errors="surrogatepass")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


@cache
def _known() -> frozenset[str]:
    import tomllib

    with Path(__file__).with_name("known_templates.toml").open("rb") as file:
        return frozenset(entry["digest"] for entry in tomllib.load(file)["template"])


def start_process(template: str | None) -> None:
    """Starts the process for an untrusted template early, because that takes a while. Raises nothing."""
    if template is not None and not is_known(template):
        _process.prepare(template)


def prepare(template: str | None) -> None:
    """Compiles a known template before it is needed. Raises nothing."""
    if template is not None and is_known(template):
        prepared(template)


def render(
    template: str,
    messages: Sequence[Message],
    *,
    bos: str = "",
    eos: str = "",
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """Returns the prompt for these messages, up to where the assistant's answer begins.

    Args:
        template: the Jinja text of `tokenizer.chat_template`.
        tools: what the model may call, as OpenAI's API has it.
        variables: what else the template may look at (`enable_thinking=False`, say); values that JSON has.
            `add_generation_prompt=False` leaves out the beginning of the assistant's turn.
    Raises:
        UsageError: the template refuses these messages (a system message, say, if it has no place for one).
        ModelError: the template is broken, or exceeds the bounds.
        EmlocalError: the template's process cannot be started.
        CancelledError: Ctrl-C or SIGTERM asked a block of `interruptible` to stop.
    """
    kind, text = outcome(template, messages, bos=bos, eos=eos, tools=tools, **variables)
    if kind == "text":
        return text
    if kind == "refused":
        raise UsageError(f"the model's chat template refuses this conversation: {text}")
    if kind == "stopped":
        raise ModelError(f"the model's chat template was stopped: {text}", _RAW)
    raise ModelError(f"the model's chat template fails: {text}", _RAW)


def outcome(
    template: str,
    messages: Sequence[Message],
    *,
    bos: str = "",
    eos: str = "",
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> Outcome:
    """The same, where a template that refuses or fails is an answer too.

    Raises EmlocalError, CancelledError.
    """
    given = None if tools is None else [*tools]
    values = {"bos_token": bos, "eos_token": eos, "add_generation_prompt": True}
    values |= {"tools": given, "documents": None, **variables}  # None, not undefined, as in transformers
    said = [dict(message) for message in messages]
    if is_known(template):
        return rendered(template, said, values)
    return _process.ask({"template": template, "messages": said, "values": values})
