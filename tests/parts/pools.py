"""Threads and timers of a node cache whose calls end when the test says so, and as it says."""

from __future__ import annotations

from collections.abc import Callable

from ucm.errors import TierError
from ucm.outcome import Outcome


class HeldPool:
    """Calls end when the test says so."""

    num_threads = 4
    num_overdue = 0
    hung: tuple[()] = ()

    def __init__(self) -> None:
        self.jobs: list[tuple[Callable[[], object], Callable[[object], None], object]] = []
        self.stalled = False

    depth = property(lambda self: len(self.jobs))

    def submit(self, call, on_done, *, on_overdue=None, urgent=False) -> None:
        self.jobs.append((call, on_done, on_overdue))

    def tick(self) -> None:
        pass

    def end(self, index: int, *, error: TierError | None = None) -> None:
        call, on_done, _ = self.jobs.pop(index % len(self.jobs))
        on_done(error or _result(call))

    def end_one(self) -> None:
        self.end(0)

    def end_all(self, error: TierError | None = None) -> None:
        while self.jobs:
            self.end(0, error=error)

    def hang(self) -> None:
        """The first call is overdue, and goes on."""
        _, _, on_overdue = self.jobs[0]
        on_overdue()


class InlinePool:
    """Storage that answers at once."""

    num_threads, depth, num_overdue, stalled = 1, 0, 0, False

    def submit(self, call: Callable[[], object], on_done, *, on_overdue=None, urgent=False) -> None:
        on_done(_result(call))

    def tick(self) -> None:
        pass


class DisorderlyPool:
    """Threads whose calls end when the test says so, in the order it says."""

    num_threads = 4

    def __init__(self) -> None:
        self.jobs: list[tuple[Callable[[], object], Callable[[object], None], object]] = []
        self.hung: list[tuple[Callable[[], object], Callable[[object], None]]] = []

    depth = property(lambda self: len(self.jobs) + len(self.hung))
    num_overdue = property(lambda self: len(self.hung))
    stalled = property(lambda self: len(self.hung) * 2 >= self.num_threads)

    def submit(self, call, on_done, *, on_overdue=None, urgent=False) -> None:
        self.jobs.append((call, on_done, on_overdue))

    def tick(self) -> None:
        pass

    def end(self, index: int, *, fail: bool) -> None:
        call, on_done, _ = self.jobs.pop(index % len(self.jobs))
        on_done(
            TierError("the disk is on fire", reason=Outcome.IO_ERROR) if fail else _result(call)
        )

    def hang(self, index: int) -> None:
        call, on_done, on_overdue = self.jobs.pop(index % len(self.jobs))
        self.hung.append((call, on_done))
        if on_overdue is not None:
            on_overdue()

    def return_late(self) -> None:
        call, on_done = self.hung.pop(0)
        on_done(_result(call))


class SharedPool:
    """Another lane whose calls are among those of `pool`."""

    def __init__(self, pool: DisorderlyPool) -> None:
        self._pool = pool
        self.num_threads = pool.num_threads

    depth = property(lambda self: self._pool.depth)
    num_overdue = property(lambda self: self._pool.num_overdue)
    stalled = property(lambda self: self._pool.stalled)

    def submit(self, call, on_done, *, on_overdue=None, urgent=False) -> None:
        self._pool.submit(call, on_done, on_overdue=on_overdue, urgent=urgent)

    def tick(self) -> None:
        pass


def _result(call: Callable[[], object]) -> object:
    try:
        return call()
    except TierError as error:
        return error


class Timers:
    """Calls for later, made when the test says so, however long that is."""

    def __init__(self) -> None:
        self.waiting: list[tuple[float, Callable[[], None]]] = []

    def __call__(self, pause_s: float, call: Callable[[], None]) -> None:
        self.waiting.append((pause_s, call))

    def fire(self) -> list[float]:
        """Makes the calls that wait now. Returns for how long they were to."""
        fired, self.waiting = self.waiting, []
        for _, call in fired:
            call()
        return [pause_s for pause_s, _ in fired]
