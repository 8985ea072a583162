"""The server's counters, in the text format of Prometheus.

One thread writes each number: the event loop those of requests, the engine's thread those of tokens.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """Seconds, counted by bucket."""

    def __init__(self, bounds: Sequence[float] = _SECONDS) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    @property
    def count(self) -> int:
        """Number of values."""
        return sum(self._counts)

    def add(self, seconds: float) -> None:
        """Adds a value."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self.sum += seconds

    def lines(self, name: str) -> list[str]:
        """Returns the histogram's lines under this name."""
        below, lines = 0, []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            below += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {below}')
        return [*lines, f"{name}_sum {self.sum:.6f}", f"{name}_count {below}"]


class Metrics:
    """The counters of one server since its start."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        """Requests by endpoint and HTTP status; 499: the client left before the end."""
        self.first_token = Histogram()
        """Seconds from a request's arrival at the engine to its first token."""
        self.token = Histogram((0.001, 0.0025, 0.005, *_SECONDS[:9]))
        """Seconds per token after the first one; one value for each request."""
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.entropy_before = 0.0
        self.entropy_after = 0.0
        self.steps = 0
        self.cancelled = 0

    def text(self, running: int, waiting: int) -> str:
        """Returns all counters in Prometheus's text format, version 0.0.4."""
        lines: list[str] = []

        def family(name: str, kind: str, help: str, samples: Sequence[str]) -> None:
            lines.extend((f"# HELP emlocal_{name} {help}", f"# TYPE emlocal_{name} {kind}", *samples))

        def number(name: str, kind: str, help: str, value: float) -> None:
            family(
                name, kind, help, [f"emlocal_{name} {value:g}" if kind == "gauge" else _whole(name, value)]
            )

        family(
            "requests_total",
            "counter",
            "Requests by endpoint and HTTP status (499: the client left).",
            [
                f'emlocal_requests_total{{endpoint="{endpoint}",status="{status}"}} {count}'
                for (endpoint, status), count in sorted(self.requests.items())
            ],
        )
        number("requests_running", "gauge", "Requests with samples in the engine.", running)
        number("requests_waiting", "gauge", "Requests that wait for a place.", waiting)
        number("requests_cancelled_total", "counter", "Requests whose client left.", self.cancelled)
        number("prompt_tokens_total", "counter", "Prompt tokens.", self.prompt_tokens)
        number("cached_prompt_tokens_total", "counter", "Prompt tokens held already.", self.cached_tokens)
        number("generated_tokens_total", "counter", "Drawn tokens.", self.generated_tokens)
        number("engine_steps_total", "counter", "Forward passes.", self.steps)
        family(
            "first_token_seconds",
            "histogram",
            "Seconds to a request's first token.",
            self.first_token.lines("emlocal_first_token_seconds"),
        )
        family(
            "token_seconds",
            "histogram",
            "Seconds a token after the first, a value a request.",
            self.token.lines("emlocal_token_seconds"),
        )
        for when, total in (("before", self.entropy_before), ("after", self.entropy_after)):
            name = f"emlocal_entropy_{when}_nats"
            samples = [f"{name}_sum {total:.6f}", f"{name}_count {self.generated_tokens}"]
            family(f"entropy_{when}_nats", "summary", f"Entropy of the drawn rows {when} EM.", samples)
        return "\n".join(lines) + "\n"


def _whole(name: str, value: float) -> str:
    return f"emlocal_{name} {value:.0f}"
