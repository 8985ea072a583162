"""The runner of a model with several adapters: a scheduler for each, one pass of one adapter a step.

An adapter computes for a whole pass in llama.cpp, so jobs of two adapters cannot share one. The schedulers
with work take turns, step by step: each adapter's samples advance as often as another's. Places are common:
there are never more than `parallel` samples decoded in all.
"""

from collections.abc import Callable, Mapping

from emlocal.backends.adapted import AdapterView, Adapting
from emlocal.backends.base import Backend
from emlocal.cancel import never
from emlocal.errors import UsageError
from emlocal.generation.runner import Event, Handle, Job, Runner
from emlocal.generation.scheduler import Scheduler


class AdapterRunner(Runner):
    """See the module. `Job.adapter` names the adapter; "" is the model without."""

    def __init__(self, engine: Adapting, parallel: int, adapters: Mapping[str, int]) -> None:
        """`adapters`: each adapter's number in the engine, by name."""
        super().__init__(engine.context)
        self.parallel = parallel
        self._schedulers: dict[str, Scheduler] = {}  # the one whose turn it is first
        for name, number in {"": None, **adapters}.items():
            view = AdapterView(engine, number)
            self._schedulers[name] = made = Scheduler(view, parallel)
            made.counters = self.counters
            view.make_room = self._room_maker(made)

    def _room_maker(self, asking: Scheduler) -> Callable[[], bool]:
        def make_room() -> bool:
            others = [each for each in self._schedulers.values() if each is not asking]
            most = max(others, key=lambda each: each.kept)
            if asking.kept > max(1, most.kept - 1):  # it has one to drop that it does not copy from
                return False
            return most.kept > 0 and most.make_room()

        return make_room

    def _of(self, job: Job) -> Scheduler:
        found = self._schedulers.get(job.adapter)
        if found is None:
            raise UsageError(f"there is no adapter {job.adapter}")
        return found

    def submit(self, job: Job) -> Handle:
        return self._of(job).submit(job)

    def check(self, job: Job) -> None:
        self._of(job).check(job)

    def cancel(self, handle: Handle) -> list[Event]:
        return self._of(handle.job).cancel(handle)

    def step(self, cancelled: Callable[[], bool] = never) -> list[Event]:
        decoded = sum(each.decoded for each in self._schedulers.values())
        for name, each in [*self._schedulers.items()]:
            each.parallel = self.parallel - (decoded - each.decoded)
            if not each.idle and (each.decoded or each.parallel > 0):
                self._schedulers[name] = self._schedulers.pop(name)  # behind all others
                return each.step(cancelled)
        return []

    @property
    def free(self) -> int:
        return max(0, self.parallel - sum(each.held for each in self._schedulers.values()))

    @property
    def idle(self) -> bool:
        return all(each.idle for each in self._schedulers.values())

    def forget(self) -> None:
        for each in self._schedulers.values():
            each.forget()

    def close(self) -> None:
        for each in self._schedulers.values():
            each.close()


def runner_of(backend: Backend, parallel: int, adapters: Mapping[str, int]) -> Runner:
    """Returns the runner over an engine, with these adapters if there are any."""
    if not adapters:
        return Scheduler(backend, parallel)
    assert isinstance(backend, Adapting)
    return AdapterRunner(backend, parallel, adapters)
