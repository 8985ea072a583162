"""How many sequences a batch decodes at once, on an engine whose passes take a known time."""

from collections.abc import Callable, Mapping, Sequence

import pytest

from emlocal.backends.base import Feed
from emlocal.backends.fake import FakeBackend, hashed
from emlocal.batch import forecast
from emlocal.batch.forecast import best_parallel, measure_parallel


class Timed(FakeBackend):
    """Takes as long for a pass as `seconds` says, by the number of sequences."""

    def __init__(self, seconds: Mapping[int, Sequence[float]]) -> None:
        super().__init__(hashed, sequences=20, context=1024)
        self.now = 0.0
        self._left = {n: list(times) for n, times in seconds.items()}

    def forward(self, feeds: Sequence[Feed], cancelled: Callable[[], bool] = lambda: False) -> None:
        super().forward(feeds, cancelled)
        times = self._left[len(feeds)]
        self.now += times.pop(0) if len(times) > 1 else times[0]


def chosen(monkeypatch: pytest.MonkeyPatch, seconds: Mapping[int, Sequence[float]], most: int = 16) -> int:
    backend = Timed(seconds)
    monkeypatch.setattr(forecast.time, "perf_counter", lambda: backend.now)
    return best_parallel(measure_parallel(backend, most))


GROWING = {1: [0.010], 2: [0.018], 4: [0.022], 8: [0.031], 16: [0.040]}


def test_the_fewest_near_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, GROWING) == 16
    assert chosen(monkeypatch, {**GROWING, 8: [0.022], 16: [0.043]}) == 8
    assert chosen(monkeypatch, GROWING, most=4) == 4


def test_a_program_beside_it_for_a_moment_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    disturbed = {**GROWING, 2: [0.018, 0.200, 0.018], 4: [0.3, 0.022, 0.4]}
    assert chosen(monkeypatch, disturbed) == 16
    assert chosen(monkeypatch, {**GROWING, 2: [0.2]}) == 16  # nor do two that are slower than one


def test_it_ends_when_more_do_not_help_or_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, {1: [0.010], 2: [0.030], 4: [0.090]}) == 1  # 8 would be an error here
    assert chosen(monkeypatch, {1: [0.5], 2: [0.7]}) == 2
