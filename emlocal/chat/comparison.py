"""Two answers from the same draws, and where they part."""

from emlocal import console, rendering
from emlocal.backends.base import Backend
from emlocal.formatting import change, counted
from emlocal.generation import Completion
from emlocal.generation.sample import summarize


def parting(off: Completion, on: Completion) -> int | None:
    """The index of the first token that differs; None if the answers are the same."""
    first = [draw.token for draw in off.draws]
    second = [draw.token for draw in on.draws]
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return i
    return None if len(first) == len(second) else min(len(first), len(second))


def show_comparison(off: Completion, on: Completion, backend: Backend) -> None:
    """Both answers on stdout, each under a heading; where they part on stderr."""
    for title, answer in (("EM off", off), ("EM on", on)):
        entropy = summarize(answer.draws)
        nats = change(entropy.before, entropy.after, answer is on)
        console.heading(f"{title}: {counted(entropy.tokens, 'token')}, entropy {nats} nats")
        writer = rendering.AnswerWriter(show_entropy=False)
        writer.piece(answer.text.strip("\n"), 0.0)
        writer.end()
    console.note(_where(off, on, backend))


def _where(off: Completion, on: Completion, backend: Backend) -> str:
    at = parting(off, on)
    if at is None:
        return "the answers are the same"

    def says(answer: Completion) -> str:
        if at >= len(answer.draws):
            return "is cut off"
        draw = answer.draws[at]
        piece = backend.token_bytes(draw.token).decode(errors="replace")
        p = change(draw.p_before, draw.p_after, draw.steps > 0)
        return f"goes on {piece!r} (p {p})" if piece else "ends"

    before = "at the first token" if at == 0 else f"after {counted(at, 'token')}"
    return f"they part {before}: EM off {says(off)}, EM on {says(on)}"
