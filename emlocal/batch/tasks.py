"""The lines of a batch on their way to rows: their keys, which are done, and the order of the rows.

Whoever answers the lines, an engine here or a server elsewhere, takes them from `Tasks` and gives rows back.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from emlocal.batch.keys import Keys, Places
from emlocal.batch.lines import BadLine, Item, Row, digest, error_row
from emlocal.errors import UsageError
from emlocal.generation.prompt import with_system
from emlocal.models.templates import Message
from emlocal.settings import Plan
from emlocal.text import harmless

AHEAD = 1024
"""With `ordered`, how many rows may wait for an earlier one before the run stops taking lines."""

_MOST_NAMES, _LONGEST_NAME = 5, 40  # of fields in a note


@dataclass
class Tally:
    """Counts of the lines so far."""

    answered: int = 0
    errors: int = 0
    skipped: int = 0
    """Lines whose row already was in the output."""
    cut_off: int = 0
    """Answers that --max-tokens or the context ended."""
    abstained: int = 0
    """Answers that were withheld because their confidence was too low."""
    votes_lost: int = 0
    """Votes in which no sample contained an answer."""


@dataclass
class Task:
    """A line in progress."""

    key: str
    custom_id: str | None
    line: int
    order: int
    error: str = ""
    too_long: bool = False
    """Whether the error is that the prompt does not fit the context."""
    plan: Plan | None = None
    extra: dict[str, object] = field(default_factory=dict)
    tools: tuple[str, ...] = ()
    """The names of those that were offered."""
    raw: bool = False
    """Whether the line asked for a completion of a text."""


class Tasks:
    """The lines of one run, and its rows."""

    def __init__(
        self,
        lines: Iterable[Item | BadLine],
        *,
        fingerprint: str,
        openai: bool = False,
        ordered: bool = False,
        done: Keys | None = None,
        places: Places | None = None,
    ) -> None:
        """Takes the lines from the first.

        `fingerprint` identifies what makes two runs differ beside their lines. `done` and `places`: see
        `Batch`.
        """
        self.tally = Tally()
        self.ordered = ordered
        self._lines = iter(lines)
        self._fingerprint = fingerprint
        self._openai = openai
        self._done = done
        self._places = places
        self._seen = Keys()
        self._ready: deque[Row] = deque()
        self._taken = self._given = 0
        self._held: dict[int, Row] = {}  # with `ordered`: rows that wait for earlier ones

    def _take(self) -> tuple[Task, Item | BadLine] | None:
        """Returns the next line that has no row yet, or None: at the end, or while others wait for a row."""
        while not (self.ordered and self._taken - self._given > AHEAD):
            line = next(self._lines, None)
            if line is None:
                return None
            task = self._task(line)
            if self._places is not None:
                self._places.add(task.key)
            if self._done is not None and task.key in self._done:
                self.tally.skipped += 1
                continue
            self._taken += 1
            return task, line
        return None  # the row that all others wait for is still in progress

    def _task(self, line: Item | BadLine) -> Task:
        """Returns the line's task with its key. A custom_id that was used before makes it an error."""
        bad = isinstance(line, BadLine)
        content = line.content if isinstance(line, BadLine) else line.content()
        named = line.custom_id if line.custom_id is not None and not bad else None
        own = digest("bad" if bad else "line", content)[:16]
        times = self._seen.add(f"id {named}" if named is not None else f"content {own}")
        custom_id = named if named is not None else own if times == 1 else f"{own}-{times}"
        # A given custom_id may equal the hash that names the same content without a custom_id. The second of
        # those two lines gets a key of its own. All other keys are as in earlier versions, so their outputs
        # resume.
        twin = (f"id {own}" if named is None else f"content {own}") if custom_id == own else None
        both = ("given" if named is not None else "made",) if twin is not None and twin in self._seen else ()
        key = digest(custom_id, content, str(times), self._fingerprint, *both)
        task = Task(key, line.custom_id if bad else custom_id, line.line, self._taken)
        if isinstance(line, BadLine):
            task.error = line.message
        elif named is not None and times > 1:
            task.error = f"the custom_id {named!r} repeats that of an earlier line"
        return task

    def _failed(self, task: Task, why: str) -> None:
        self.tally.errors += 1
        self._give(task, error_row(task.key, task.custom_id, task.line, why, openai=self._openai))

    def _give(self, task: Task, row: Row) -> None:
        """Releases a row; with `ordered`, only after all rows before it."""
        if not self.ordered:
            self._ready.append(row)
            return
        self._held[task.order] = row
        while self._given in self._held:
            self._given += 1
            self._ready.append(self._held.pop(self._given - 1))


def noting_own_fields(
    lines: Iterable[Item | BadLine], note: Callable[[str], None]
) -> Iterator[Item | BadLine]:
    """Passes lines on. At the first one with fields of its own, notes that the rows will not have them."""
    said = False
    for line in lines:
        if not said and isinstance(line, Item) and line.extra:
            said = True
            names = ", ".join(harmless(name)[:_LONGEST_NAME] for name in [*line.extra][:_MOST_NAMES])
            more = f" and {len(line.extra) - _MOST_NAMES:,} more" if len(line.extra) > _MOST_NAMES else ""
            named = "; an id called custom_id names the row" if "id" in line.extra else ""
            note(f"the rows leave out the lines' own {names}{more} (add --keep to copy them{named})")
        yield line


def said_in(line: Item, *, system: str | None, raw: bool) -> str | Sequence[Message]:
    """Returns a line's prompt as it is sent: the text itself, or messages for a chat template.

    Args:
        system: the run's system message; the line's own one is stronger.
        raw: whether the run sends all prompts without a template.
    Raises UsageError for a raw prompt with something that only a template can show.
    """
    if line.messages is None and (line.raw or raw):
        if line.tools:
            raise UsageError(
                "tools go through the chat template, and this prompt is raw", "leave out raw or the tools"
            )
        if line.system is not None:
            raise UsageError(
                "system goes through the chat template, and this prompt is raw",
                "write its text into the prompt",
            )
        return line.prompt or ""
    messages = line.messages or ({"role": "user", "content": line.prompt or ""},)
    return with_system(messages, system if line.system is None else line.system)
