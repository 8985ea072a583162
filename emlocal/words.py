"""Grammar for messages."""


def counted(n: int, noun: str) -> str:
    """ "1 token", "2 tokens"; `noun` is one that takes an s."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def change(before: float, after: float, changed: bool) -> str:
    """A figure before and after EM: "1.69 → 0.22", or one number where EM did nothing."""
    return f"{before:.2f} → {after:.2f}" if changed else f"{before:.2f}"
