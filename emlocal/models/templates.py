"""Chat templates: a model's own Jinja program that turns messages into its prompt.

A template comes out of a downloaded file, so it is treated as hostile: it is rendered in a process of its own
with bounds on time, output and memory, which stays from turn to turn (template_process.py). Templates that
are known by their digest (known_templates.toml) are rendered here: somebody has read them, and they end.

The process for chat templates from strangers, as the one who asks sees it: ask, wait, end it in time.
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

_START_SECONDS = 60.0  # a cold disk; ordinarily it takes a twentieth of a second
_POLL_SECONDS = 0.02  # how soon Ctrl-C ends a template
_BYTES_A_SECOND = 20_000_000  # of a long conversation, on its way to the process and back
_AT_ONCE = 32_000  # bytes that a pipe takes while the process is starting
_BOOT = "import sys; sys.path += sys.argv[1:]; from emlocal.models.template_worker import main; main()"


class TemplateProcess:
    """A process that renders templates: started when it is needed, replaced when it has ended.

    It ends with this one, also by kill -9: its input ends then, and while a template runs it has an alarm. It
    inherits neither memory nor open files, and Ctrl-C does not reach it. Several threads take turns.
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
        ] = []  # what it has still to say: that it is ready (None), has compiled one
        self._ended_for = ""

    @property
    def pid(self) -> int | None:
        """Of the process that is there, if one is."""
        return self._process.pid if self._process else None

    def prepare(self, template: str) -> None:
        """Start the process and let it compile a template, without waiting. What fails, `ask` says."""
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
        """What comes of {"template", "messages", "values"}.

        Raises EmlocalError where the process cannot be started, CancelledError where `interruptible` was
        asked to stop.
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
                    "end other programs or raise the limits (ulimit -a), or use --raw to go without it",
                ) from why
            except BaseException:  # what it says next would be taken for the answer to another question
                self._end()
                raise
            if outcome[0] == "stopped":
                self._end()  # memory that was full is in pieces: the next template would lack it
            return outcome

    def _outcome(self, line: bytes, template: str) -> Outcome:
        if not self._is_ready():
            if self._owed[:1] == [template]:  # it never came out of compiling it
                return self._end_of_template()
            self._end()
            if not self._is_ready():
                raise OSError(f"it ended with code {self._end()}")
        return self._exchange(line, MAX_SECONDS + len(line) / _BYTES_A_SECOND) or self._end_of_template()

    def close(self) -> None:
        """End the process. The next question starts another."""
        with self._lock:
            self._end()

    def _is_ready(self) -> bool:
        """Start the process where there is none, and hear what it owes. False: it has ended meanwhile."""
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
            raise OSError("Python does not know its own program")
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
        """Send a line, and hear one; None: the process ended, or was too slow. Raises CancelledError."""
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
        if self._ended_for:  # just as it answered
            self._end()
        return kind, text

    def _write(self, line: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended, and so has what it says
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def _watch(self, process: "subprocess.Popen[bytes]", answered: threading.Event, until: float) -> None:
        """End the process where there is no answer in time, or nobody wants it any more."""
        while not answered.wait(_POLL_SECONDS):
            if stop_requested() or time.monotonic() > until:
                self._ended_for = "stop" if stop_requested() else "time"
                process.kill()
                return

    def _end_of_template(self) -> Outcome:
        """What to say of a template in which the process ended."""
        code = self._end()
        if self._ended_for == "time" or (sys.platform != "win32" and code == -signal.SIGALRM):
            return "stopped", f"it took more than {MAX_SECONDS:g} seconds"
        return "stopped", f"its process ended with code {code}"

    def _end(self) -> int:
        """End the process and return its exit code; 0 where there is none."""
        process, self._process, self._owed = self._process, None, []
        if process is None:
            return 0
        assert process.stdin is not None
        assert process.stdout is not None
        process.kill()
        with suppress(OSError):  # what it was never sent
            process.stdin.close()
        process.stdout.close()
        return process.wait()

    def _leave_to_the_parent(self) -> None:
        """After a fork: the child's ends of the pipes would keep the process alive without its parent."""
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                # not the buffer: it would write what another thread had begun to write
                pipe.raw.close()  # type: ignore[attr-defined]
        self._reset()


def _line(asked: Mapping[str, Any]) -> bytes:
    return json.dumps({**asked, "seconds": MAX_SECONDS}).encode() + b"\n"


def _places() -> list[str]:
    """The folders with the packages that the process needs, without importing them here."""
    specs = [find_spec(name) for name in ("emlocal", "jinja2", "markupsafe")]
    return list(dict.fromkeys(str(Path(spec.origin).parent.parent) for spec in specs if spec and spec.origin))


Message = Mapping[str, str]
_RAW = "use --raw to go without it"
_process = TemplateProcess()


def is_known(template: str) -> bool:
    """Whether this is, but for a newline at its end, a template that has been read."""
    return digest(template) in _known()


@lru_cache(maxsize=4)
def digest(template: str) -> str:
    """The name of a template in known_templates.toml. Jinja drops one newline at the end itself."""
    text = template.removesuffix("\n").encode(errors="surrogatepass")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


@cache
def _known() -> frozenset[str]:
    import tomllib

    with Path(__file__).with_name("known_templates.toml").open("rb") as file:
        return frozenset(entry["digest"] for entry in tomllib.load(file)["template"])


def start_process(template: str | None) -> None:
    """Start what a stranger's template needs, as early as it is known: it takes a while. Raises nothing."""
    if template is not None and not is_known(template):
        _process.prepare(template)


def prepare(template: str | None) -> None:
    """Compile a known template before it is needed. Raises nothing."""
    if template is not None and is_known(template):
        prepared(template)


def render(
    template: str, messages: Sequence[Message], *, bos: str = "", eos: str = "", **variables: Any
) -> str:
    """The prompt for these messages, ending where the assistant is to speak.

    Args:
        template: the Jinja text of `tokenizer.chat_template`.
        messages: {"role": "system" | "user" | "assistant", "content": text}.
        variables: what else the template may look at (`enable_thinking=False`, say); values that JSON has.
    Raises:
        UsageError: the template refuses these messages (a system message where it knows none, say).
        ModelError: the template is broken, or exceeds the bounds.
        EmlocalError: the template's process cannot be started.
        CancelledError: Ctrl-C or SIGTERM asked a block of `interruptible` to stop.
    """
    values = {"bos_token": bos, "eos_token": eos, "add_generation_prompt": True, **variables}
    said = [dict(message) for message in messages]
    if is_known(template):
        kind, text = rendered(template, said, values)
    else:
        kind, text = _process.ask({"template": template, "messages": said, "values": values})
    if kind == "text":
        return text
    if kind == "refused":
        raise UsageError(f"the model's chat template refuses this conversation: {text}")
    if kind == "stopped":
        raise ModelError(f"the model's chat template was stopped: {text}", _RAW)
    raise ModelError(f"the model's chat template fails: {text}", _RAW)
