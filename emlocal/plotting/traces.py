"""Traces of `emlocal generate`: answers token by token, with the entropy before and after EM."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from emlocal.errors import UsageError
from emlocal.generation.entropy import EntropySummary, summarize
from emlocal.plotting.reading import finite, labels, read_bytes
from emlocal.sampling import Draw
from emlocal.text import harmless
from emlocal.words import change, counted

_HINT = "give what --trace of generate wrote"


@dataclass(frozen=True)
class TracedAnswer:
    """An answer, token by token."""

    label: str
    texts: tuple[str, ...]
    draws: tuple[Draw, ...]

    @cached_property
    def summary(self) -> EntropySummary:
        """What EM did to it."""
        return summarize(self.draws)

    @property
    def changed(self) -> list[bool]:
        """By token: whether the same draw would have made another one without EM."""
        return [draw.token != draw.token_without_em for draw in self.draws]

    def describe(self) -> str:
        """Its figures in a line: "119 tokens, entropy 1.69 → 0.22 nats, EM changed 39 tokens (33 %)"."""
        found = self.summary
        touched = found.touched > 0
        said = (
            f"{counted(found.tokens, 'token')}, entropy {change(found.before, found.after, touched)} nats, "
        )
        if not touched:
            return said + "EM touched none"
        return said + f"EM touched {found.touched:.0%}, changed {sum(self.changed):,} ({found.changed:.0%})"


def read_traces(paths: Sequence[Path]) -> list[TracedAnswer]:
    """The answers of all traces, labelled by file, and by number where a file has several.

    Raises UsageError for a file that is no trace, is empty or torn; it names the line.
    """
    found = []
    for label, path in zip(labels(paths, "a trace"), paths, strict=True):
        answers = _read(path)
        for sample, (texts, draws) in sorted(answers.items()):
            name = f"{label}, answer {sample + 1}" if len(answers) > 1 else label
            found.append(TracedAnswer(name, tuple(texts), tuple(draws)))
    return found


def shown_text(text: str) -> str:
    """A token's text in one line, ∅ for none: that of the end, for example."""
    return harmless(text.replace("\n", "⏎").replace("\t", "⇥")) or "∅"


def _read(path: Path) -> dict[int, tuple[list[str], list[Draw]]]:
    """Texts and draws of a file by sample. Lines end at line feeds alone: texts may hold other separators."""
    lines = read_bytes(path).split(b"\n")
    whole = lines[-1] == b""
    if whole:
        lines.pop()
    if not lines:
        raise UsageError(f"{path} is empty: a trace has a line for each token", _HINT)
    answers: dict[int, tuple[list[str], list[Draw]]] = {}
    for number, line in enumerate(lines, 1):
        row = _row(line)
        draw = None if row is None else _draw(row)
        if row is None or draw is None:
            if number == len(lines) and answers and not whole:
                raise UsageError(
                    f"{path} is torn: its last line, {number:,}, is not whole", "write the trace again"
                )
            raise UsageError(f"{path} is no trace: line {number:,} is no token's", _HINT)
        texts, draws = answers.setdefault(row["sample"], ([], []))
        if row["index"] != len(texts):
            raise UsageError(
                f"{path}, line {number:,}: token {row['index']:,} of answer {row['sample'] + 1:,} comes after"
                f" {counted(len(texts), 'token')}; the file has lost lines, or is of several traces",
                "give each trace as a file of its own",
            )
        texts.append(row["text"])
        draws.append(draw)
    return answers


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _draw(row: dict[str, Any]) -> Draw | None:
    """The draw of a line; None where it is not what `generate` writes."""
    whole = [row.get(name) for name in ("sample", "index", "token", "steps", "token_without_em")]
    numbers = [finite(row.get(name)) for name in ("entropy_before", "entropy_after", "p_before", "p_after")]
    if not isinstance(row.get("text"), str) or not all(type(n) is int and n >= 0 for n in whole):
        return None
    if any(n is None or n < 0 for n in numbers):
        return None
    return Draw(**{name: row[name] for name in Draw._fields})
