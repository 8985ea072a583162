"""Numbers and words in messages."""

from decimal import Decimal


def counted(n: int, noun: str) -> str:
    """ "1 token", "2 tokens"; `noun` is one that takes an s."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def plain(number: float) -> str:
    """A number as people write it: 0.000001 and 2, not 1e-06 and 2.0."""
    return format(Decimal(repr(number)).normalize(), "f")


def human_size(count: float) -> str:
    """Bytes as people read them, in powers of 1000: "98 MB", "4.7 GB"."""
    for unit in ("bytes", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def change(before: float, after: float, changed: bool) -> str:
    """A figure before and after EM: "1.69 → 0.22", or one number where EM did nothing."""
    return f"{before:.2f} → {after:.2f}" if changed else f"{before:.2f}"
