"""Texts for values, equal for equal values, to compare what programs return.

Two values of Python's plain types have one text if Python calls them equal: 1, 1.0 and True, sets and
dictionaries in any order. Floats count to nine digits. A value that equals only itself (a function, a
generator) becomes its type's name.
Standard library only: an interpreter without emlocal imports this, and uses it on untrusted values.
"""

import hashlib
import math
import sys
from collections import deque

_DIGITS = 9
_LONGEST = 200
_PLAIN_BITS = 4096  # Python refuses to write longer numbers in decimal


def canonical(value: object) -> str:
    """Returns the text of a value.

    It takes as much time and memory as the value needs, and raises what the value's own methods raise.
    """
    if isinstance(value, int):  # bool, too
        number = int(value)
        return str(number) if number.bit_length() <= _PLAIN_BITS else hex(number)
    if isinstance(value, float):
        return _of_float(float(value))
    if isinstance(value, complex):
        real, imaginary = _of_float(value.real), _of_float(value.imag)
        return real if imaginary == "0" else f"{real}+{imaginary}j"
    if isinstance(value, str):
        return str.__repr__(value)
    if isinstance(value, bytes | bytearray):
        return repr(bytes(value))
    if isinstance(value, list):
        return f"[{', '.join(map(canonical, value))}]"
    if isinstance(value, tuple):
        return f"({''.join(f'{canonical(each)}, ' for each in value)})"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(canonical, value)))}}}" if value else "set()"
    if isinstance(value, dict):
        return f"{{{', '.join(sorted(f'{canonical(k)}: {canonical(v)}' for k, v in value.items()))}}}"
    if isinstance(value, deque):
        return f"deque{canonical(list(value))}"
    return _of_other(value)


def shortened(text: str) -> str:
    """Returns the text; a long one as its beginning and a digest."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]}… sha256 {hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()}"


def _of_float(value: float) -> str:
    """Returns a float to nine significant digits; a whole number as the integer that it equals."""
    if not math.isfinite(value):
        return str(value)
    rounded = value if abs(value) >= 10**_DIGITS else float(f"{value:.{_DIGITS}g}")
    whole = round(rounded)
    return str(whole) if whole == rounded or abs(value) >= 10**_DIGITS else repr(rounded)


def _of_other(value: object) -> str:
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        return canonical(value.item())
    if numpy is not None and isinstance(value, numpy.ndarray):
        return f"array{canonical(value.tolist())}"
    text = repr(value)
    return f"<{type(value).__name__}>" if " at 0x" in text else text
