"""Lines of a file from anywhere, one at a time and none longer than memory should bear."""

import codecs
from collections.abc import Iterator
from typing import BinaryIO

MAX_LINE_BYTES = 64 << 20
TOO_LONG = f"the line has more than {MAX_LINE_BYTES:,} bytes"


def numbered_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, the line with its end); None in place of one longer than MAX_LINE_BYTES.

    A byte order mark at the beginning is no part of the first line.
    """
    number = 0
    while raw := stream.readline(MAX_LINE_BYTES):
        number += 1
        if len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(MAX_LINE_BYTES)
            yield number, None
        else:
            yield number, raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
