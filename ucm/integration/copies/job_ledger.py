"""What is left of every copy, and for how long any was under way."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping

from ucm.integration.copies.jobs import Direction

logger = logging.getLogger(__name__)


class BusyClock:
    """For how long anything was under way. Overlapping times count once."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._num_open = 0
        self._since_s = 0.0
        self._busy_s = 0.0

    def start(self) -> None:
        if not self._num_open:
            self._since_s = self._now_s()
        self._num_open += 1

    def stop(self) -> None:
        self._num_open -= 1
        if not self._num_open:
            self._busy_s += self._now_s() - self._since_s

    def take(self) -> float:
        """Since the last call; what is under way counts up to now."""
        if self._num_open:
            now_s = self._now_s()
            self._busy_s += now_s - self._since_s
            self._since_s = now_s
        busy_s, self._busy_s = self._busy_s, 0.0
        return busy_s


class JobLedger:
    """What is left of every job. A job is one submission (its layer is None), or one per layer.

    Thread-safe, and never raises: it is told things by threads whose end nobody would see, in an
    order that is the engine's. Invariants: each layer of a job is submitted once and ends once; a
    job is either open (in `_left`) or was put into `_ended` once; a job of which any part failed is
    named as failed.
    """

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._cond = threading.Condition()
        self._left: dict[int, set[int | None]] = {}
        self._to_come: dict[int, set[int | None]] = {}
        self._clock_of: dict[int, BusyClock] = {}
        self._clocks = {direction: BusyClock(now_s) for direction in Direction}
        self._ended: list[int] = []
        self._failing: set[int] = set()
        self._failed: list[int] = []

    def begin(
        self, job_id: int, direction: Direction, layer: int | None, *, of: Iterable[int | None]
    ) -> bool:
        """One of the submissions `of` which this job is made. False: it has been submitted already,
        and this one must not be copied."""
        with self._cond:
            if job_id not in self._left:
                if job_id in self._ended:
                    return False
                self._left[job_id] = set(of)
                self._to_come[job_id] = set(self._left[job_id])
                self._clock_of[job_id] = self._clocks[direction]
                self._clocks[direction].start()
            if layer not in self._to_come[job_id]:
                return False
            self._to_come[job_id].discard(layer)
            return True

    def close_one(self, job_id: int, layer: int | None, *, ok: bool) -> None:
        with self._cond:
            left = self._left.get(job_id, set())
            if layer not in left:
                logger.error("job %d: layer %s has ended and was not under way", job_id, layer)
                return
            if not ok:
                self._failing.add(job_id)
            left.discard(layer)
            if not left:
                del self._left[job_id], self._to_come[job_id]
                self._clock_of.pop(job_id).stop()
                self._ended.append(job_id)
                self._cond.notify_all()

    def fail(self, job_ids: Iterable[int]) -> None:
        """Whatever becomes of the rest of these jobs. Jobs that have ended stay as they are."""
        with self._cond:
            self._failing.update(self._left.keys() & set(job_ids))

    def is_failing(self, job_id: int) -> bool:
        """What is left of it need not be copied."""
        with self._cond:
            return job_id in self._failing

    def take_ended(self) -> list[int]:
        with self._cond:
            ended, self._ended = self._ended, []
            self._failed += [job_id for job_id in ended if job_id in self._failing]
            self._failing.difference_update(ended)
            return ended

    def take_failed(self) -> list[int]:
        with self._cond:
            failed, self._failed = self._failed, []
            return failed

    def take_busy(self) -> Mapping[Direction, float]:
        with self._cond:
            return {direction: clock.take() for direction, clock in self._clocks.items()}

    def wait_for_news(self, timeout_s: float) -> None:
        """Until a job has ended that was not taken, or none is open, or the time is over."""
        with self._cond:
            self._cond.wait_for(lambda: self._ended or not self._left, timeout_s)

    def wait(self, job_ids: Iterable[int], *, timeout_s: float) -> list[int]:
        """Until these jobs have ended. Those that have not, when the time is over."""
        waited = set(job_ids)
        with self._cond:
            self._cond.wait_for(lambda: waited.isdisjoint(self._left), timeout_s)
            return sorted(waited & self._left.keys())

    def wait_for_all(self, *, timeout_s: float) -> None:
        with self._cond:
            self._cond.wait_for(lambda: not self._left, timeout_s)
