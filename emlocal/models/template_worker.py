"""The process in which a stranger's chat template is rendered, and the environment that all are rendered in.

A line of JSON comes in, one goes out: see `main`. The process imports Jinja and nothing else of weight. What
one call can do without end (compare lists that share their parts, say) nothing inside the process can stop,
so its limits are the system's: memory while a template runs, and an alarm. `template_process.py` starts the
process, and ends it when the time is up.

The environment is the one that the Hugging Face templates are written for: trim_blocks, lstrip_blocks, loop
controls, `raise_exception`, `strftime_now`, `tojson`. It is Jinja's immutable sandbox: no attribute tricks.
What makes gigabytes out of a few characters is refused at once, because the limits are slower to say so.
"""

import datetime
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import FrameType
from typing import Any, NoReturn

MAX_SECONDS = 2.0
MAX_CHARACTERS = 4_000_000
MAX_MEMORY = 200_000_000  # bytes that the process may hold, and _BYTES_A_CHARACTER for the conversation
MAX_OPERAND = 1_000_000  # of `*`, `**` and `%`, with which a few characters make gigabytes
MAX_MESSAGE = 300  # characters of what a template or its failure says
_PROGRAM = 15_000_000  # bytes of Python itself, which is no data and does not count for the system
_BYTES_A_CHARACTER = 16  # twice its length may be written, is held as pieces and as a whole, of 4 bytes each
_PADDING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "format_map", "translate", "encode"})
_PADDING_FILTERS = ("center", "format", "indent", "wordwrap", "urlize", "pprint", "xmlattr")
_SLOW_FILTERS = ("batch", "round", "slice", "sum")
_WIDE = re.compile(r"\d{4}|\{[^}]*\{")  # a width of 1,000 or more, or one that is itself an argument

Outcome = tuple[str, str]
"""("text", the prompt), or ("refused" | "stopped" | "failed", why, in one short line)."""


def main() -> None:
    """Answer until stdin ends.

    In: {"template", "messages", "values", "seconds"}, or {"template", "seconds"}, to be compiled before it is
    needed. Out: an Outcome for each; the first is for the start.
    """
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who asks
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
    return sum(len(message["content"]) for message in asked.get("messages", ()))


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """End this process if what is inside takes longer: the one who asked may be gone."""
    if sys.platform == "win32":
        import faulthandler

        faulthandler.dump_traceback_later(seconds, exit=True)
        yield
        faulthandler.cancel_dump_traceback_later()
    else:
        import signal

        signal.setitimer(signal.ITIMER_REAL, seconds)  # its default action needs no help of Python's
        yield
        signal.setitimer(signal.ITIMER_REAL, 0.0)


@contextmanager
def _memory(characters: int) -> Iterator[None]:
    """Raise MemoryError where this process grows beyond what a conversation of so many characters may take.

    macOS knows the limit but holds nobody to it: there memory is looked at between the template's lines.
    Windows has no such limit; the time bound serves alone.
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
    """Raise MemoryError at the next line of a template once this process has held more than so many bytes."""
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
    """Compile a template before it is needed. Whatever is wrong with it, `rendered` says."""
    return _outcome(lambda: _compiled(template) and "")


def rendered(template: str, messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> Outcome:
    """What comes of a template in this process. Its text is bounded here; time and memory are not."""
    limit = MAX_CHARACTERS + 2 * sum(len(m["content"]) for m in messages)

    def text() -> str:
        parts, size = [], 0
        for part in _compiled(template).generate(messages=messages, **values):
            parts.append(part)
            size += len(part)
            if size > limit:
                raise _Exceeded(f"more than {limit:,} characters")
        whole = "".join(parts)
        whole.encode()  # half a character ("\\ud800") has no bytes, so no tokens either
        return whole

    return _outcome(text)


def _outcome(work: Callable[[], str]) -> Outcome:
    """What work gives, or what it raises in words."""
    try:
        return "text", work()
    except _Exceeded as why:
        return "stopped", _line(why)
    except _Refused as why:
        return "refused", _line(why)
    except MemoryError:
        return "stopped", f"it took more than {MAX_MEMORY / 1e6:,.0f} MB of memory"
    except Exception as why:  # noqa: BLE001 (a stranger's program can make anything fail, in any way)
        return "failed", _line(why)


def _line(why: Exception) -> str:
    """What it says, as one line that any terminal takes."""
    words = " ".join(str(why)[: 4 * MAX_MESSAGE].split()) or type(why).__name__
    shown = "".join(c if c.isprintable() else "\ufffd" for c in words)
    return shown if len(shown) <= MAX_MESSAGE else shown[: MAX_MESSAGE - 1] + "…"


class _Refused(Exception):  # noqa: N818
    """The template called raise_exception."""


class _Exceeded(Exception):  # noqa: N818
    """A bound was exceeded."""


def _refuse(message: object) -> NoReturn:
    raise _Refused(str(message))


@lru_cache(maxsize=4)
def _compiled(template: str) -> Any:
    """The template in an environment of its own."""
    from jinja2 import sandbox

    class Environment(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [abs(o) if isinstance(o, int | float) else len(o) for o in (left, right)]
            plain = all(isinstance(o, int | float) for o in (left, right))
            too_large = max(sizes) > MAX_OPERAND or (operator == "%" and isinstance(left, str))
            too_large |= operator == "*" and not plain and sizes[0] * sizes[1] > MAX_OPERAND
            too_large |= operator == "**" and sizes[1] > 1000
            if too_large:
                raise _Exceeded(f"an operand of {operator} is too large")
            return super().call_binop(context, operator, left, right)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            padding = isinstance(obj, str) and attr in _PADDING
            raw = isinstance(obj, int | float | bytes)
            return not padding and not raw and super().is_safe_attribute(obj, attr, value)

        def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
            form = super().wrap_str_format(value)
            text = getattr(value, "__self__", "")
            if form is not None and (_WIDE.search(text) or value.__name__ in _PADDING):
                raise _Exceeded("a format is too wide")
            return form

        def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
            text, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
            if isinstance(text, str) and name in ("replace", "join"):
                for own in ("_loop_vars", "_block_vars"):  # Jinja's, for functions that take a context
                    kwargs.pop(own, None)
                return _replace(text, *args, **kwargs) if name == "replace" else _join(args[0], text)
            return super().call(context, obj, *args, **kwargs)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], cache_size=0
    )
    for name in (*_PADDING_FILTERS, *_SLOW_FILTERS):
        del environment.filters[name]
    environment.filters["replace"] = _replace
    environment.filters["join"] = _join_filter
    del environment.globals["lipsum"]
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)  # local time
    return environment.from_string(template)


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    """str.replace, once the size of what it makes is known."""
    text, pattern, by = str(value), str(old), str(new)
    found = text.count(pattern)
    if count is not None and count >= 0:
        found = min(found, count)
    if len(text) + found * len(by) > MAX_CHARACTERS:
        raise _Exceeded("replace makes too much text")
    return text.replace(pattern, by, found)


def _join(parts: Any, between: Any = "") -> str:
    """str.join, once the size of what it makes is known."""
    texts, separator = [str(part) for part in parts], str(between)
    if sum(map(len, texts)) + len(texts) * len(separator) > MAX_CHARACTERS:
        raise _Exceeded("join makes too much text")
    return separator.join(texts)


def _join_filter(value: Any, d: Any = "", attribute: str | None = None) -> str:
    """Jinja's join; `attribute` names what to take of each item."""
    if attribute is not None:
        value = [item[attribute] if isinstance(item, Mapping) else item for item in value]
    return _join(value, d)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own escapes <, > and & for HTML."""
    between, after = separators or ("," if indent else ", ", ": ")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=min(indent, 16) if indent else None,
        separators=(between[:16], after[:16]),
        sort_keys=sort_keys,
    )
