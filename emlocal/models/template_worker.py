"""The process that renders untrusted chat templates, and the environment that all templates are rendered in.

The process reads a line of JSON and writes one (see `main`). It imports Jinja and nothing else that is
large. Some single calls never end, such as comparing lists that share their parts, and nothing inside the
process can stop them. So the system sets limits: memory while a template runs, and an alarm. `templates.py`
starts the process, and ends it when the time is up.

The environment is the one that the Hugging Face templates are written for: trim_blocks, lstrip_blocks, loop
controls, `{% generation %}`, `raise_exception`, `strftime_now`, `tojson`. It is Jinja's immutable sandbox: no
attribute tricks. Calls that make gigabytes from a few characters are refused at once (template_filters.py),
because the limits act later.
"""

import datetime
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import FrameType
from typing import Any, NoReturn

from emlocal.models.template_filters import (
    MAX_CHARACTERS,
    PADDING,
    Exceeded,
    bounded,
    check_operands,
    is_wide,
    join,
    replace,
)

MAX_SECONDS = 2.0
MAX_MEMORY = 200_000_000  # bytes that the process may hold, and _BYTES_A_CHARACTER for the conversation
MAX_MESSAGE = 300  # characters of what a template or its failure says
_PROGRAM = 15_000_000  # bytes of Python itself, which is no data and does not count for the system
_BYTES_A_CHARACTER = 16  # twice its length may be written, is held as pieces and as a whole, of 4 bytes each

Outcome = tuple[str, str]
"""("text", the prompt), or ("refused" | "stopped" | "failed", the reason in one short line)."""


def main() -> None:
    """Answers lines until stdin ends.

    In: {"template", "messages", "values", "seconds"}; or {"template", "seconds"} for a template to compile
    before it is needed. Out: an Outcome for each, and one before them, when the process is ready.
    """
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    import jinja2.sandbox  # noqa: F401 (not within the first template's time)

    _say(("text", "ready"))
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        with _alarm(asked["seconds"] + 1.0):
            with _memory(_characters(asked)):
                outcome = _worked_on(asked)
            _say(outcome)


def _worked_on(asked: Mapping[str, Any]) -> Outcome:
    if "messages" not in asked:
        return prepared(asked["template"])
    return rendered(asked["template"], asked["messages"], asked["values"])


def _say(outcome: Outcome) -> None:
    sys.stdout.buffer.write(json.dumps(outcome, ensure_ascii=False).encode() + b"\n")
    sys.stdout.buffer.flush()


def _characters(asked: Mapping[str, Any]) -> int:
    return length(asked.get("messages")) + length(asked.get("values"))


def length(value: Any) -> int:
    """Returns the number of characters of all texts in a JSON value, at any depth."""
    found, left = 0, [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            found += len(one)
        elif isinstance(one, Mapping):
            left += [*one.keys(), *one.values()]
        elif isinstance(one, Sequence):
            left += one
    return found


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Ends this process if the block takes longer, because the process that asks may be gone."""
    if sys.platform == "win32":
        import faulthandler

        faulthandler.dump_traceback_later(seconds, exit=True)
        yield
        faulthandler.cancel_dump_traceback_later()
    else:
        import signal

        signal.setitimer(signal.ITIMER_REAL, seconds)  # its default action does not need Python's help
        yield
        signal.setitimer(signal.ITIMER_REAL, 0.0)


@contextmanager
def _memory(characters: int) -> Iterator[None]:
    """Raises MemoryError if this process grows beyond the limit for a conversation of this length.

    `characters` is that length. macOS has the system's limit but does not enforce it, so there the memory is
    checked between the template's lines. Windows has no such limit; the time bound serves alone.
    """
    most = MAX_MEMORY + _BYTES_A_CHARACTER * characters
    if sys.platform == "win32":
        yield
    elif sys.platform == "darwin":
        with watched(most):
            yield
    else:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        finite = [limit for limit in (soft, hard, most - _PROGRAM) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min(finite), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextmanager
def watched(most: int) -> Iterator[None]:
    """Raises MemoryError at the next line of a template once this process has used more than `most` bytes."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024

    def look(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != "<template>":
            return None
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit > most:
            raise MemoryError
        return look

    outer = sys.gettrace()
    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(outer)


def prepared(template: str) -> Outcome:
    """Compiles a template before it is needed. `rendered` reports its faults."""
    return _outcome(lambda: _compiled(template) and "")


def rendered(template: str, messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> Outcome:
    """Returns the outcome of a template in this process. It bounds the text, but not time and memory."""
    limit = MAX_CHARACTERS + 2 * (length(messages) + length(values))

    def text() -> str:
        parts, size = [], 0
        for part in _compiled(template).generate(messages=messages, **values):
            parts.append(part)
            size += len(part)
            if size > limit:
                raise Exceeded(f"more than {limit:,} characters")
        whole = "".join(parts)
        whole.encode()  # half a character ("\\ud800") has no bytes, and therefore no tokens
        return whole

    return _outcome(text)


def _outcome(work: Callable[[], str]) -> Outcome:
    """Returns the result of `work`, or its error in words."""
    try:
        return "text", work()
    except Exceeded as why:
        return "stopped", _line(why)
    except _Refused as why:
        return "refused", _line(why)
    except MemoryError:
        return "stopped", f"it needed more than {MAX_MEMORY / 1e6:,.0f} MB of memory"
    except Exception as why:  # noqa: BLE001 (a stranger's program can make anything fail, in any way)
        return "failed", _line(why)


def _line(why: Exception) -> str:
    """Returns an error's text as one line that any terminal takes."""
    words = " ".join(str(why)[: 4 * MAX_MESSAGE].split()) or type(why).__name__
    shown = "".join(c if c.isprintable() else "\ufffd" for c in words)
    return shown if len(shown) <= MAX_MESSAGE else shown[: MAX_MESSAGE - 1] + "…"


class _Refused(Exception):  # noqa: N818
    """Raised when the template calls raise_exception."""


def _refuse(message: object) -> NoReturn:
    raise _Refused(str(message))


@lru_cache(maxsize=4)
def _compiled(template: str) -> Any:
    """Returns the template, compiled in an environment of its own."""
    from jinja2 import nodes, sandbox
    from jinja2.ext import Extension

    class Environment(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            check_operands(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            padding = isinstance(obj, str) and attr in PADDING
            raw = isinstance(obj, int | float | bytes)
            return not padding and not raw and super().is_safe_attribute(obj, attr, value)

        def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
            form = super().wrap_str_format(value)
            if form is not None and (is_wide(getattr(value, "__self__", "")) or value.__name__ in PADDING):
                raise Exceeded("a format is too wide")
            return form

        def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
            text, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
            if not isinstance(text, str) or name not in ("replace", "join"):
                return super().call(context, obj, *args, **kwargs)
            for own in ("_loop_vars", "_block_vars"):  # Jinja's, for functions that take a context
                kwargs.pop(own, None)
            return replace(text, *args, **kwargs) if name == "replace" else join(args[0], text)

    class Generation(Extension):
        """A block {% generation %} … {% endgeneration %}, which marks answers in training: here its body."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("said"), [], [], body).set_lineno(line)

        def said(self, caller: Callable[[], str]) -> str:
            return caller()

    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", Generation],
        cache_size=0,
    )
    environment.filters.update(bounded(environment.filters))
    del environment.globals["lipsum"]
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)  # local time
    return environment.from_string(template)
