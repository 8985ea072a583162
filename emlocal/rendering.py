"""Answers as people see them: coloured by entropy, traced to a file, as a line or JSON, or side by side."""

import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from emlocal import console
from emlocal.backends.base import Backend
from emlocal.em.scores import Scores
from emlocal.errors import EmlocalError
from emlocal.files import atomic_writer
from emlocal.generation import Completion
from emlocal.generation.sample import EntropySummary, complete_json, reasoning_json, summarize
from emlocal.methods import Outcome
from emlocal.methods.confidence import METHOD, Confidence, raw_confidence
from emlocal.methods.scoring import scores_json
from emlocal.sampling import Draw
from emlocal.settings.constraint import Constraint
from emlocal.text import CONTROLS, change, counted

if TYPE_CHECKING:
    from rich.text import Text

_ENOUGH_TO_TIME = 16  # tokens
# Upper bounds in nats and 256-colour codes: from sure to guessing.
_BANDS = ((0.1, 250), (0.5, 114), (1.0, 185), (2.0, 215), (float("inf"), 203))


def coloured(text: str, entropy: float) -> str:
    """Returns `text` with the escape codes for the colour of its entropy (nats)."""
    code = next(code for bound, code in _BANDS if entropy <= bound)
    return f"\x1b[38;5;{code}m{text}\x1b[0m"


def legend() -> "Text":
    """Returns a legend of the colours of `coloured`, for stderr, whose console shows no raw escape codes."""
    from rich.text import Text

    bounds = ["≤ 0.1", "≤ 0.5", "≤ 1", "≤ 2", "> 2 nats"]
    shown = [(f"  {bound}", f"color({code})") for (_, code), bound in zip(_BANDS, bounds, strict=True)]
    return Text.assemble("entropy before EM:", *shown)


def stats_line(
    outcome: Outcome, seed: int, context: int, *, em: bool, confidence: Confidence | None = None
) -> str:
    """Returns one line: tokens, speed, entropy, the effect of EM, the ending, and the method's own facts.

    The confidence is added if it is calibrated or the method's own.
    """
    timings = outcome.timings
    entropy = summarize([d for c in outcome.completions for d in c.draws])
    cached = f", {timings.cached_tokens} cached" if timings.cached_tokens else ""
    read = timings.prompt_tokens - timings.cached_tokens
    # a handful of tokens says nothing about the speed
    speed = f", {rate(read, timings.prompt_seconds)} tok/s" if read >= _ENOUGH_TO_TIME else ""
    thoughts = sum(c.reasoning_tokens for c in outcome.completions)
    thinking = f" ({thoughts:,} of thoughts)" if thoughts else ""
    parts = [
        f"prompt {counted(timings.prompt_tokens, 'token')}{cached}{speed}",
        f"answer {counted(outcome.generated_tokens, 'token')}{thinking},"
        f" {rate(timings.generated_tokens, timings.generation_seconds)} tok/s",
        entropy_text(entropy, em),
    ]
    endings = Counter(_ending(c, context) for c in outcome.completions)
    drawn = len(outcome.completions)
    parts.append(
        ", ".join(f"{n:,} of {drawn:,} samples {text}" if drawn > 1 else text for text, n in endings.items())
    )
    parts += outcome.said or [
        f"{name} {'none' if value is None else value}" for name, value in outcome.fields.items()
    ]
    if says_enough(confidence):
        parts.append(confidence_text(confidence))
    parts.append(f"seed {seed}")
    return " · ".join(parts)


def entropy_text(entropy: EntropySummary, em: bool) -> str:
    """Returns the mean entropy of an answer's tokens and, with `em`, what EM did to it."""
    text = f"entropy {change(entropy.before, entropy.after, em)} nats"
    return (
        f"{text} (EM touched {entropy.touched:.0%} of tokens, changed {entropy.changed:.0%})" if em else text
    )


def says_enough(confidence: Confidence | None) -> TypeGuard[Confidence]:
    """Returns whether a confidence belongs beside each answer: it is calibrated, or the method's own."""
    return confidence is not None and (confidence.calibrated or confidence.source == METHOD)


def confidence_text(confidence: Confidence) -> str:
    """Returns the text "confidence 0.83", and its source if it is not calibrated."""
    what = {METHOD: "the method's own"}.get(confidence.source, f"from {confidence.source}")
    return f"confidence {confidence.value:.2f}" + (
        "" if confidence.calibrated else f" ({what}, not calibrated)"
    )


def scores_text(found: Scores | None) -> str:
    """Returns one line with an answer's scores; "" without any, as for an answer without tokens."""
    if found is None:
        return ""
    own = "" if found.answer_entropy is None else f", of the final answer {found.answer_entropy:.2f}"
    return (
        f"entropy: mean {found.mean_entropy:.2f}{own}, highest window {found.window_entropy:.2f},"
        f" end {found.tail_entropy:.2f}, largest {found.largest_entropy:.2f} nats;"
        f" {found.unsure:.0%} of tokens uncertain; log-probability {found.log_probability:.1f}"
        f" ({found.mean_log_probability:.2f} per token)"
    )


def _ending(completion: Completion, context: int) -> str:
    incomplete = completion.complete is False
    if completion.reasoning_tokens and completion.finish_reason == "length" and not completion.text:
        cut = f"cut off in its thoughts at --max-tokens {len(completion.tokens)}"
        return f"no answer: {cut} (--think-budget N ends them earlier)"
    if completion.finish_reason == "length":
        end = f"cut off at --max-tokens {len(completion.tokens)}"
        return f"{end}: the text does not meet its constraint" if incomplete else end
    if completion.finish_reason == "context":
        return f"cut off: the context of {context:,} tokens is full (set a larger --context)"
    if completion.stop is not None:
        end = f"stopped before {completion.stop!r}"
        return f"{end}: the text does not meet its constraint" if incomplete else end
    return {"stop": "finished", "cancelled": "stopped by Ctrl-C"}[completion.finish_reason]


def check_whole(
    completions: Sequence[Completion], constraint: Constraint | None, context: int, *, quiet: bool
) -> None:
    """Reports answers that are not whole. Nothing is cut off silently, with --quiet neither.

    With `quiet` a warning says what else the line of statistics says. Raises EmlocalError if an answer does
    not meet its constraint: whoever reads the answer relies on its form.
    """
    unmet = [c for c in completions if c.complete is False and c.finish_reason != "cancelled"]
    if unmet and constraint is not None:
        n, one = len(unmet), unmet[0]
        said = (
            "the answer does not match"
            if len(completions) == 1
            else f"{n:,} of {len(completions):,} answers do not match"
        )
        fixes = {"length": "set a larger --max-tokens", "context": "set a larger --context"}
        raise EmlocalError(
            f"{said} {constraint.what}: {_ending(replace(one, complete=None), context)}",
            fixes.get(one.finish_reason, "leave out --stop"),
        )
    cut = [c for c in completions if c.finish_reason in ("length", "context")]
    if cut and quiet:
        many = f"{len(cut):,} of {len(completions):,} answers: " if len(completions) > 1 else "the answer is "
        console.warn(f"{many}{_ending(cut[0], context)}")


def rate(tokens: int, seconds: float) -> str:
    """Returns tokens per second, for people."""
    return f"{tokens / seconds:.1f}" if seconds > 0 else "–"


def as_json(
    backend: Backend,
    outcome: Outcome,
    seed: int,
    collected: bool,
    sure: Callable[[Outcome], Confidence | None] = raw_confidence,
) -> dict[str, Any]:
    """Returns the object that `--json` prints.

    One answer is flat, several are in `completions`. With `collected`, the method's answer is flat and all
    samples are in `samples`. `sure` computes the confidence of an outcome.
    """
    timings = outcome.timings
    shared = {
        "model": backend.info.name,
        "backend": backend.name,
        "seed": seed,
        "prompt_tokens": timings.prompt_tokens,
        "cached_tokens": timings.cached_tokens,
        "timings": {
            "prompt_seconds": round(timings.prompt_seconds, 4),
            "generation_seconds": round(timings.generation_seconds, 4),
            "generated_tokens": timings.generated_tokens,
        },
    }
    answers = [_answer_json(c) for c in outcome.completions]
    if len(answers) == 1:
        rounds = {"rounds": [*outcome.drafts]} if outcome.drafts else {}
        return answers[0] | _sure_json(sure(outcome)) | shared | dict(outcome.fields) | rounds
    if collected:
        own = answers[outcome.index] | _sure_json(sure(outcome))
        return own | shared | dict(outcome.fields) | {"samples": answers}
    each = [sure(replace(outcome, completions=[c], index=0)) for c in outcome.completions]
    alone = [answer | _sure_json(one) for answer, one in zip(answers, each, strict=True)]
    return {"completions": alone} | shared


def _sure_json(confidence: Confidence | None) -> dict[str, Any]:
    return {} if confidence is None else confidence.as_json()


def _answer_json(completion: Completion) -> dict[str, Any]:
    return {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "stop": completion.stop,
        **complete_json(completion),
        **reasoning_json(completion),
        "completion_tokens": len(completion.tokens),
        "entropy": summarize(completion.draws).as_json(),
        "scores": scores_json(completion),
    }


class Trace:
    """A writer of one JSON line for each token."""

    def __init__(self, file: Any, backend: Backend) -> None:
        self._file = file
        self._backend = backend
        self._counts: dict[int, int] = {}

    def add(self, sample: int, draw: Draw) -> None:
        """Writes a token as it is drawn. `text` is its own bytes; half characters are replaced."""
        index = self._counts[sample] = self._counts.get(sample, -1) + 1
        text = self._backend.token_bytes(draw.token).decode(errors="replace")
        line = {"sample": sample, "index": index, "text": text, **draw._asdict()}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def add_all(self, answers: Sequence[Completion]) -> None:
        """Writes all tokens of whole answers."""
        for answer in answers:
            for draw in answer.draws:
                self.add(answer.sample, draw)


@contextmanager
def trace_to(path: Path | None, backend: Backend) -> Iterator[Trace | None]:
    """Yields a Trace into `path`, which appears when the block ends; None for no path."""
    if path is None:
        yield None
        return
    with atomic_writer(path.expanduser()) as file:
        yield Trace(file, backend)


class AnswerWriter:
    """A writer that streams an answer to stdout: in colour if asked and possible, wrapped on a terminal.

    It wraps at words. The last word waits for the next piece, so that it can move to the next line whole.
    """

    def __init__(self, show_entropy: bool, *, thoughts: bool = False) -> None:
        self._show_thoughts = thoughts and sys.stderr.isatty()
        self._thinking = False  # the last piece was a thought
        self.colours = show_entropy and console.colours_allowed(sys.stdout)
        self._terminal = sys.stdout.isatty()
        self._word: list[tuple[str, float]] = []  # pieces of the current word
        self._gap = ""  # the white space before the next word
        self._column = 0
        self._begun = False  # something of the answer is shown
        if show_entropy:
            if self.colours:
                console.err().print(legend(), highlight=False)
            else:
                why = "NO_COLOR or TERM=dumb is set" if self._terminal else "stdout is not a terminal"
                console.note(f"{why}, so the answer has no colours")

    def thought(self, text: str) -> None:
        """Shows a piece of a thought, dim, on stderr; nothing if stderr is not a terminal."""
        if text and self._show_thoughts:
            console.dim(text.translate(CONTROLS))
            self._thinking = True

    def piece(self, text: str, entropy: float) -> None:
        """Shows the text that one token made certain."""
        self._begun = self._begun or bool(text)
        if text and self._thinking:
            console.dim("\n\n")
            self._thinking = False
        if not self._terminal:
            console.write(text)
            return
        for part in re.split(r"(\s+)", text.translate(CONTROLS)):
            if part.isspace():
                self._end_word()
                self._gap += part
            elif part:
                self._end_gap()
                self._word.append((part, entropy))

    def break_off(self) -> None:
        """Ends the line of an answer that failed, if anything is on it."""
        if self._begun:
            self.end()

    def end(self) -> None:
        """Shows the text that is held back, and ends the line."""
        self._begun = False
        self._end_word()
        self._end_gap()
        console.write("\n")
        self._column = 0

    def _end_word(self) -> None:
        width = sum(_width(text) for text, _ in self._word)
        columns = shutil.get_terminal_size().columns
        if 0 < self._column < columns < self._column + width and width < columns:
            console.write("\n")
            self._column = 0
        for text, entropy in self._word:
            console.write(coloured(text, entropy) if self.colours else text)
        filled = self._column + width
        # at the end of a full line the cursor stays on that line
        self._column = filled if filled <= columns else filled % columns
        self._word = []

    def _end_gap(self) -> None:
        """Writes the white space between two words, once all of it is known."""
        space, self._gap = self._gap, ""
        if not space:
            return
        if "\n" in space:
            self._column = 0
            space_width = len(space) - space.rindex("\n") - 1
        else:
            space_width = len(space.expandtabs())
        if self._column + space_width >= shutil.get_terminal_size().columns:
            space, space_width, self._column = "\n", 0, 0
        console.write(space)
        self._column += space_width


def _width(text: str) -> int:
    """Returns the columns that a text takes on a terminal; wide characters take two."""
    from prompt_toolkit.utils import get_cwidth

    return get_cwidth(text)


def parting(off: Completion, on: Completion) -> int | None:
    """Returns the index of the first token that differs; None if the answers are the same."""
    first = [draw.token for draw in off.draws]
    second = [draw.token for draw in on.draws]
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return i
    return None if len(first) == len(second) else min(len(first), len(second))


def show_comparison(off: Completion, on: Completion, backend: Backend) -> None:
    """Prints both answers on stdout, each under a heading, and on stderr where they begin to differ."""
    for title, answer in (("EM off", off), ("EM on", on)):
        entropy = summarize(answer.draws)
        nats = change(entropy.before, entropy.after, answer is on)
        console.heading(f"{title}: {counted(entropy.tokens, 'token')}, entropy {nats} nats")
        writer = AnswerWriter(show_entropy=False)
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
    return f"they differ {before}: EM off {says(off)}, EM on {says(on)}"
