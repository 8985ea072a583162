"""Chat templates: a model's own Jinja program that turns messages into its prompt, run in a sandbox.

A template comes out of a downloaded file, so it is treated as hostile: no attribute tricks (Jinja's immutable
sandbox), and bounds on time, output and memory. The environment is the one that the Hugging Face templates
are written for: trim_blocks, lstrip_blocks, loop controls, `raise_exception`, `strftime_now`, `tojson`.
"""

import datetime
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from emlocal.errors import ModelError, UsageError

MAX_SECONDS = 2.0
MAX_CHARACTERS = 4_000_000
MAX_MEMORY = 200_000_000  # bytes beyond what the process holds
MAX_OPERAND = 1_000_000  # of `*`, `**` and `%`, with which a few characters make gigabytes
# One call of each can take minutes or gigabytes; the deadline looks between calls and would come too late.
_PADDING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "format_map", "translate", "encode"})
_PADDING_FILTERS = ("center", "format", "indent", "wordwrap", "urlize", "pprint", "xmlattr")
_SLOW_FILTERS = ("batch", "round", "slice", "sum")

Message = Mapping[str, str]
_STATM = Path("/proc/self/statm")  # pages that this process holds, on Linux
_FAULTS = (TypeError, ValueError, LookupError, ArithmeticError, MemoryError, RecursionError)
"""What a template can raise beside Jinja's own."""


def prepare(template: str | None) -> None:
    """Compile a template before it is needed. Whatever is wrong with it, `render` says."""
    import jinja2

    with suppress(jinja2.TemplateError, *_FAULTS):
        if template is not None:
            _compiled(template)


def render(
    template: str, messages: Sequence[Message], *, bos: str = "", eos: str = "", **variables: Any
) -> str:
    """The prompt for these messages, ending where the assistant is to speak.

    Args:
        template: the Jinja text of `tokenizer.chat_template`.
        messages: {"role": "system" | "user" | "assistant", "content": text}.
        variables: what else the template may look at (`enable_thinking=False`, say).
    Raises:
        UsageError: the template refuses these messages (a system message where it knows none, say).
        ModelError: the template is broken, or exceeds the bounds.
    """
    import jinja2

    values = {"bos_token": bos, "eos_token": eos, "add_generation_prompt": True, **variables}
    limit = MAX_CHARACTERS + 2 * sum(len(m["content"]) for m in messages)
    try:
        compiled = _compiled(template)
        with _Deadline(MAX_SECONDS):
            parts, size = [], 0
            for part in compiled.generate(messages=messages, **values):
                parts.append(part)
                size += len(part)
                if size > limit:
                    raise _Exceeded(f"more than {limit:,} characters")
            return "".join(parts)
    except _Exceeded as why:
        raise ModelError(
            f"the model's chat template was stopped: {why}", "use --raw to go without it"
        ) from why
    except _Refused as why:
        raise UsageError(f"the model's chat template refuses this conversation: {why}") from why
    except (jinja2.TemplateError, *_FAULTS) as why:
        raise ModelError(f"the model's chat template fails: {why}", "use --raw to go without it") from why


class _Refused(Exception):  # noqa: N818
    """The template called raise_exception."""


class _Exceeded(Exception):  # noqa: N818
    """A bound was exceeded."""


def _refuse(message: str) -> NoReturn:
    raise _Refused(message)


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
            if isinstance(text, str) and name == "replace":
                return _replace(text, *args, **kwargs)
            if isinstance(text, str) and name == "join":
                return _join(args[0], text)
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


_WIDE = re.compile(r"\d{4}|\{[^}]*\{")  # a width of 1,000 or more, or one that is itself an argument


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


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """JSON as it is; Jinja's own escapes <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=min(indent, 16) if indent else None)


class _Deadline:
    """Raises _Exceeded in the code inside once time or memory are spent.

    A trace function sees each line of the compiled template and each Python call, so that no loop escapes
    it, without a thread or a signal. Memory is looked at because text doubled in a loop fills it before the
    time is up.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        self._until = time.monotonic() + self._seconds
        self._statm = os.open(_STATM, os.O_RDONLY) if _STATM.exists() else None
        self._memory = _memory(self._statm) + MAX_MEMORY
        self._outer = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._outer)
        if self._statm is not None:
            os.close(self._statm)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > self._until:
            raise _Exceeded(f"it took more than {self._seconds:g} seconds")
        if _memory(self._statm) > self._memory:
            raise _Exceeded(f"it took more than {MAX_MEMORY / 1e6:,.0f} MB of memory")
        return self._trace if frame.f_code.co_filename == "<template>" else None


def _memory(statm: int | None) -> int:
    """Bytes; 0 where the system does not tell (Windows: the time bound serves alone).

    `statm`: an open file of Linux, whose peak begins with that of the process that started this one. It is
    kept open because to open it takes ten times as long as to read it, and each template line asks.
    """
    if sys.platform == "win32":
        return 0
    import resource

    if statm is not None:
        return int(os.pread(statm, 100, 0).split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
