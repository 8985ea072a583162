"""Linux's system calls by name (tests/data/system_calls.tsv), and the sandbox's filter run in Python."""

import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

ALLOW, EPERM, ENOSYS, KILL = "allow", "EPERM", "ENOSYS", "kill"
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_RETURNS = {0x7FFF0000: ALLOW, 0x00050001: EPERM, 0x00050026: ENOSYS, 0x80000000: KILL}


class SystemCall(NamedTuple):
    """A line of the table."""

    name: str
    x86_64: int | None
    aarch64: int | None
    expected: str
    """allowed, arguments, refused, unknown."""

    def number(self, machine: str) -> int | None:
        return {"x86_64": self.x86_64, "aarch64": self.aarch64}[machine]


@cache
def table() -> list[SystemCall]:
    text = Path(__file__).parents[1].joinpath("data", "system_calls.tsv").read_text(encoding="utf-8")
    fields = (line.split("\t") for line in text.splitlines() if not line.startswith("#"))
    return [
        SystemCall(name, *(None if n == "-" else int(n) for n in numbers), expected)
        for name, *numbers, expected in fields
    ]


@cache
def numbers(machine: str) -> dict[str, int]:
    """Returns the numbers of an architecture's system calls, by name."""
    return {call.name: n for call in table() if (n := call.number(machine)) is not None}


def verdict(filter_: Sequence[bytes], architecture: int, number: int, arguments: Sequence[int] = ()) -> str:
    """Returns the kernel's verdict on a call: number, architecture, address and six 64-bit arguments."""
    padded = [argument & (2**64 - 1) for argument in (*arguments, *[0] * (6 - len(arguments)))]
    data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, architecture, 0, *padded)
    accumulator, at = 0, 0
    while True:
        code, over, not_over, value = struct.unpack("=HBBI", filter_[at])
        at += 1
        if code == 0x20:
            accumulator = struct.unpack_from("<I", data, value)[0]
        elif code == 0x06:
            return _RETURNS[value]
        else:
            holds = {
                0x15: accumulator == value,
                0x35: accumulator >= value,
                0x45: bool(accumulator & value),
            }[code]
            at += over if holds else not_over
