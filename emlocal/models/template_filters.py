"""Jinja's filters and operators for templates from strangers, with bounds on what a call can make.

Each returns the same as Jinja's own. If the result would exceed a bound, it raises Exceeded at once; the
limits of the process (template_worker.py) would stop it later. Filters that no chat template needs raise
only when they are called, because a template may name one in a macro that it never uses.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

MAX_CHARACTERS = 4_000_000
MAX_OPERAND = 1_000_000
"""The largest operand of `*`, `**` and `%`, which make gigabytes from a few characters.

Also the most steps of `sum` over lists.
"""
MAX_WIDTH = 1000
"""The most columns of a padded field, and the most decimals of a rounded number."""
PADDING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "format_map", "translate", "encode"})
REFUSED = ("wordwrap", "urlize", "pprint", "xmlattr")
"""Filters that a template may name but not call."""
_WIDE = re.compile(r"\d{4}|\{[^}]*\{")  # a width of 1,000 or more, or one that is itself an argument
_WIDE_PERCENT = re.compile(r"%(\([^)]*\))?[-+ #0]*(\*|\d*\.\*|\d{4}|\d*\.\d{4})")


class Exceeded(Exception):  # noqa: N818
    """Raised when a bound is exceeded."""


def check_operands(operator: str, left: Any, right: Any) -> None:
    """Raises Exceeded if `left operator right` would be too large, for `*`, `**` and `%`."""
    if operator == "%" and isinstance(left, str):
        check_percent(left)
        return
    sizes = [_size(operand) for operand in (left, right)]
    plain = all(isinstance(o, int | float) for o in (left, right))
    too_large = max(sizes) > MAX_OPERAND
    too_large |= operator == "*" and not plain and sizes[0] * sizes[1] > MAX_OPERAND
    too_large |= operator == "**" and sizes[1] > MAX_WIDTH
    if too_large:
        raise Exceeded(f"an operand of {operator} is too large")


def _size(operand: Any) -> float:
    if isinstance(operand, int | float):
        return abs(operand)
    return len(operand) if isinstance(operand, str | bytes | Sequence | Mapping) else 0


def check_percent(form: str) -> None:
    """Raises Exceeded for a printf-style format with a width of 1,000 or more, or an argument as width."""
    if _WIDE_PERCENT.search(form):
        raise Exceeded("a format is too wide")


def is_wide(form: str) -> bool:
    """Whether a format of `str.format` has a width of 1,000 or more, or an argument as width."""
    return _WIDE.search(form) is not None


def replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    """Works like str.replace. Raises Exceeded if the result would be too long."""
    text, pattern, by = str(value), str(old), str(new)
    found = text.count(pattern)
    if count is not None and count >= 0:
        found = min(found, count)
    if len(text) + found * len(by) > MAX_CHARACTERS:
        raise Exceeded("replace makes too much text")
    return text.replace(pattern, by, found)


def join(parts: Any, between: Any = "") -> str:
    """Works like str.join. Raises Exceeded if the result would be too long."""
    texts, separator = [str(part) for part in parts], str(between)
    if sum(map(len, texts)) + len(texts) * len(separator) > MAX_CHARACTERS:
        raise Exceeded("join makes too much text")
    return separator.join(texts)


def join_filter(value: Any, d: Any = "", attribute: str | None = None) -> str:
    """Works like Jinja's join. `attribute`: the attribute of each item to join."""
    if attribute is not None:
        value = [item[attribute] if isinstance(item, Mapping) else item for item in value]
    return join(value, d)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Returns plain JSON; Jinja's own filter escapes <, > and & for HTML."""
    between, after = separators or ("," if indent is not None else ", ", ": ")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent[:16] if isinstance(indent, str) else min(indent, 16) if indent is not None else None,
        separators=(between[:16], after[:16]),
        sort_keys=sort_keys,
    )


def center(value: Any, width: int = 80) -> str:
    """Works like str.center, up to MAX_WIDTH columns."""
    if width > MAX_WIDTH:
        raise Exceeded(f"{width:,} columns are too wide")
    return str(value).center(width)


def _lines_filter(own: Callable[..., Any]) -> Callable[..., Any]:
    def indent(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> Any:
        text = str(s)
        size = len(width) if isinstance(width, str) else max(width, 0)
        if size > MAX_CHARACTERS or len(text) + (len(text.splitlines()) + 1) * size > MAX_CHARACTERS:
            raise Exceeded("indent makes too much text")
        return own(text, width, first, blank)

    return indent


def _round_filter(own: Callable[..., Any]) -> Callable[..., Any]:
    def rounded(value: Any, precision: int = 0, method: str = "common") -> Any:
        if abs(precision) > MAX_WIDTH:
            raise Exceeded("round has too many decimals")
        return own(value, precision, method)

    return rounded


def batch(value: Iterable[Any], linecount: int, fill_with: Any = None) -> Iterator[list[Any]]:
    """Yields lists of `linecount` items, like Jinja's batch; the last one is filled up."""
    if linecount > MAX_OPERAND and fill_with is not None:
        raise Exceeded("batch makes too many items")
    items = list(value)
    size = max(linecount, 1)
    for start in range(0, len(items), size):
        part = items[start : start + size]
        yield part if fill_with is None else part + [fill_with] * (size - len(part))


def slices(value: Iterable[Any], slices: int, fill_with: Any = None) -> Iterator[list[Any]]:
    """Yields this many lists, like Jinja's slice; the first ones have one item more than the others."""
    if slices > MAX_OPERAND:
        raise Exceeded("slice makes too many items")
    items = list(value)
    size, longer = divmod(len(items), slices)
    start = 0
    for number in range(slices):
        end = start + size + (number < longer)
        filled = [fill_with] if fill_with is not None and number >= longer else []
        yield items[start:end] + filled
        start = end


def _sum_filter(own: Callable[..., Any]) -> Callable[..., Any]:
    from jinja2 import pass_environment

    @pass_environment
    def summed(environment: Any, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
        if isinstance(start, int | float):
            return own(environment, iterable, attribute, start)
        items = list(iterable)
        sizes = sum(_size(own(environment, [item], attribute, start)) for item in items[:MAX_WIDTH])
        if len(items) > MAX_WIDTH or len(items) * sizes > MAX_OPERAND:  # each step copies what is there
            raise Exceeded("sum adds too many lists")
        return own(environment, items, attribute, start)

    return summed


def format_filter(value: Any, *args: Any, **kwargs: Any) -> str:
    """Works like Jinja's format, which is `%`."""
    from jinja2.exceptions import FilterArgumentError

    if args and kwargs:
        raise FilterArgumentError("can't handle positional and keyword arguments at the same time")
    form = str(value)
    check_percent(form)
    return form % (kwargs or args)


def _refused(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise Exceeded(f"the filter {name} is not available")

    return refuse


def bounded(own: Mapping[str, Callable[..., Any]]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yields (name, filter) to replace Jinja's. `own`: Jinja's filters by name."""
    for name in REFUSED:
        yield name, _refused(name)
    yield "replace", replace
    yield "join", join_filter
    yield "tojson", to_json
    yield "center", center
    yield "format", format_filter
    yield "indent", _lines_filter(own["indent"])
    yield "round", _round_filter(own["round"])
    yield "sum", _sum_filter(own["sum"])
    yield "batch", batch
    yield "slice", slices
