"""Chat templates: a model's own Jinja program that turns messages into its prompt, run in a sandbox.

A template comes out of a downloaded file, so it is treated as hostile: no attribute tricks (Jinja's immutable
sandbox), and bounds on time, output and memory. The environment is the one that the Hugging Face templates
are written for: trim_blocks, lstrip_blocks, loop controls, `raise_exception`, `strftime_now`, `tojson`.
"""

import datetime
import json
import sys
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import FrameType
from typing import Any, NoReturn

from emlocal.errors import ModelError, UsageError

MAX_SECONDS = 2.0
MAX_CHARACTERS = 4_000_000
MAX_OPERAND = 1_000_000  # of `*`, `**` and `%`, with which a few characters make gigabytes
_PADDING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map"})
_PADDING_FILTERS = ("center", "format", "indent", "wordwrap", "urlize", "pprint", "xmlattr")

Message = Mapping[str, str]


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
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as why:
        raise ModelError(f"the model's chat template fails: {why}", "use --raw to go without it") from why
    except (MemoryError, RecursionError) as why:
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
            for operand in (left, right):
                size = abs(operand) if isinstance(operand, int | float) else len(operand)
                if size > MAX_OPERAND or (operator == "%" and isinstance(left, str)):
                    raise _Exceeded(f"an operand of {operator} is too large")
            return super().call_binop(context, operator, left, right)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            padding = isinstance(obj, str) and attr in _PADDING
            return not padding and super().is_safe_attribute(obj, attr, value)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], cache_size=0
    )
    for name in _PADDING_FILTERS:
        del environment.filters[name]
    del environment.globals["lipsum"]
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)  # local time
    return environment.from_string(template)


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
        self._memory = _peak_memory() + 1_000_000_000
        self._outer = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._outer)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > self._until:
            raise _Exceeded(f"it took more than {self._seconds:g} seconds")
        if _peak_memory() > self._memory:
            raise _Exceeded("it took more than 1 GB of memory")
        return self._trace if frame.f_code.co_filename == "<template>" else None


def _peak_memory() -> int:
    """Bytes; 0 where the system does not tell (Windows: the time bound serves alone)."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
