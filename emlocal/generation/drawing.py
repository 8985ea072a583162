"""From the rows of a pass to draws. A row that is not a distribution fails alone."""

import time
from collections.abc import Sequence
from contextlib import suppress

from emlocal.backends.base import Backend, Row
from emlocal.errors import EmlocalError, LogitsError, UsageError
from emlocal.generation.alternatives import Alternative, alternatives
from emlocal.generation.runner import Counters
from emlocal.generation.sample import Sample
from emlocal.sampling import Draw
from emlocal.sampling.draw import certain

Wanted = tuple[Sample, int, int]
"""A sample that needs a draw, the sequence with its row, and the number of tokens fed after that row."""


def drawn(backend: Backend, wanted: Sequence[Wanted], counters: Counters) -> list[Draw | EmlocalError]:
    """Draws a token for each sample, from its row. A row that is not a distribution gives an error."""
    started = time.perf_counter()
    rows = [sample.row(sequence, back) for sample, sequence, back in wanted if sample.forced is None]
    for sample, sequence, back in wanted:
        if sample.request.top:
            _note_alternatives(backend, sample, sequence, back)
    try:
        draws: list[Draw | EmlocalError] = [*backend.sample(rows)]
    except (LogitsError, UsageError):
        draws = [_draw_one(backend, row) for row in rows]
    if len(draws) < len(wanted):
        own = iter(draws)
        draws = [next(own) if each.forced is None else certain(each.forced) for each, *_ in wanted]
    counters.sampling_seconds += time.perf_counter() - started
    counters.generated_tokens += len(draws)
    return draws


def _note_alternatives(backend: Backend, sample: Sample, sequence: int, back: int) -> None:
    """Notes what else could be drawn for a sample; nothing where only one token is legal."""
    found: tuple[Alternative, ...] = ()
    if sample.forced is None:
        row, logits = sample.row(sequence, back), backend.logits(sequence, back)
        with suppress(LogitsError, UsageError):  # the draw from this row fails as well, and alone
            found = alternatives(logits, row.params, row.seen, sample.request.top, row.legal)
    sample.completion.alternatives.append(found)


def _draw_one(backend: Backend, row: Row) -> Draw | EmlocalError:
    try:
        return backend.sample([row])[0]
    except (LogitsError, UsageError) as error:  # UsageError: a bias on a token that does not exist
        return error
