"""The node cache's threads: the only ones that touch storage, in a bounded number.

`IoPool` runs blocking tier calls on daemon threads and reports back on the event loop. A call
that runs longer than `timeout_s` is *overdue*: it can't be ended (a hung NFS read sleeps
uninterruptibly), so its owner is told at once and again when it really returns. A pool in which
half the threads are overdue is *stalled*; callers then do without storage instead of queueing, and
what a pool of reads had queued before is given back as timed out.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol

from ucm.errors import TierError, UcmError
from ucm.outcome import Outcome


class Loop(Protocol):
    """The part of an asyncio loop that the pool needs."""

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: object) -> object: ...


class LanePool(Protocol):
    """What the core asks of its threads. See `IoPool` for who calls what where."""

    num_threads: int

    @property
    def depth(self) -> int: ...
    @property
    def num_overdue(self) -> int: ...
    @property
    def stalled(self) -> bool: ...
    def submit(
        self,
        call: Callable[[], object],
        on_done: Callable[[object], None],
        *,
        on_overdue: Callable[[], None] | None = None,
        urgent: bool = False,
    ) -> None: ...
    def tick(self) -> None: ...
    def give_back_queue(self, *, urgent: bool) -> None: ...


class IoJob:
    """One blocking call. Owned by the pool from `submit` until its `on_done` was called."""

    __slots__ = ("call", "on_done", "on_overdue", "overdue", "started_s", "urgent")

    def __init__(
        self,
        call: Callable[[], object],
        on_done: Callable[[object], None],
        on_overdue: Callable[[], None] | None,
        urgent: bool,
    ) -> None:
        self.call = call
        self.urgent = urgent
        self.on_done = on_done
        self.on_overdue = on_overdue
        self.started_s: float | None = None
        self.overdue = False


class IoPool:
    """`num_threads` daemon threads over one queue.

    `submit` and `tick` belong to the loop's thread; callbacks run there too. A call's `UcmError`
    is handed to `on_done` in place of a result; any other exception becomes a TierError with
    its type and text, because one odd file must not end a thread.
    """

    def __init__(
        self,
        name: str,
        *,
        loop: Loop,
        num_threads: int,
        timeout_s: float,
        keeps_queue_when_stalled: bool,
    ) -> None:
        self.num_threads = num_threads
        self._loop = loop
        self._timeout_s = timeout_s
        self._keeps_queue_when_stalled = keeps_queue_when_stalled
        # One word per job, or None to leave; the jobs themselves lie in two queues.
        self._words: SimpleQueue[bool | None] = SimpleQueue()
        self._urgent: deque[IoJob] = deque()
        self._others: deque[IoJob] = deque()
        # A job is unclaimed until a thread, or `tick`, has popped it; one `pop` has one winner.
        self._unclaimed: dict[IoJob, IoJob] = {}
        self._running: set[IoJob] = set()
        self._done: deque[tuple[IoJob, object]] = deque()
        self._is_waking_loop = False
        self._num_queued = 0
        self._num_overdue = 0
        for i in range(num_threads):
            threading.Thread(target=self._work, name=f"ucm-{name}-{i}", daemon=True).start()

    @property
    def depth(self) -> int:
        """Calls submitted and not yet returned."""
        return self._num_queued

    @property
    def num_overdue(self) -> int:
        return self._num_overdue

    @property
    def stalled(self) -> bool:
        return self.num_overdue * 2 >= self.num_threads

    def submit(
        self,
        call: Callable[[], object],
        on_done: Callable[[object], None],
        *,
        on_overdue: Callable[[], None] | None = None,
        urgent: bool = False,
    ) -> None:
        """Queues a call; an `urgent` one goes before those that are not."""
        job = IoJob(call, on_done, on_overdue, urgent)
        self._num_queued += 1
        self._running.add(job)
        self._unclaimed[job] = job
        (self._urgent if urgent else self._others).append(job)
        self._words.put(True)

    def tick(self) -> None:
        """Finds calls that have become overdue. Called a few times a second."""
        now_s = time.monotonic()
        for job in list(self._running):
            started_s = job.started_s
            if started_s is None or job.overdue or now_s - started_s < self._timeout_s:
                continue
            job.overdue = True
            self._num_overdue += 1
            if job.on_overdue is not None:
                job.on_overdue()
        if self.stalled and not self._keeps_queue_when_stalled:
            self.give_back_queue(urgent=True)

    def give_back_queue(self, *, urgent: bool) -> None:
        """What no thread has begun ends now, as timed out; what is urgent if that is asked for."""
        late = TierError("storage hangs: not started in time", reason=Outcome.TIMEOUT)
        for job in list(self._unclaimed):
            if job.urgent <= urgent and self._unclaimed.pop(job, None) is not None:
                self._finish(job, late)

    def close(self) -> None:
        """Asks the threads to leave after what is queued. Doesn't wait: one may hang."""
        for _ in range(self.num_threads):
            self._words.put(None)

    def _work(self) -> None:
        while self._words.get() is not None:
            job = self._next()
            if self._unclaimed.pop(job, None) is None:
                continue
            job.started_s = time.monotonic()
            result: object
            try:
                result = job.call()
            except UcmError as error:
                result = error
            except Exception as error:  # noqa: BLE001 - one odd file must not end a thread
                result = TierError(f"{type(error).__name__}: {error}", reason=Outcome.IO_ERROR)
            self._done.append((job, result))
            # One wake-up for whatever has ended until the loop gets to it: a wake-up per page is a
            # system call and a fight for the GIL, and cost a third of the speed of 256 KiB pages.
            # The flag is cleared before the queue is emptied, so none is left lying.
            if not self._is_waking_loop:
                self._is_waking_loop = True
                try:
                    self._loop.call_soon_threadsafe(self._finish_done)
                except RuntimeError:
                    return  # the loop has closed: the process is leaving

    def _next(self) -> IoJob:
        try:
            return self._urgent.popleft()
        except IndexError:
            return self._others.popleft()

    def _finish_done(self) -> None:
        self._is_waking_loop = False
        while self._done:
            self._finish(*self._done.popleft())

    def _finish(self, job: IoJob, result: object) -> None:
        self._num_queued -= 1
        self._num_overdue -= job.overdue
        self._running.discard(job)
        job.on_done(result)


def error_reason(error: object) -> Outcome:
    """Why a call into the tier failed, as lookups and counters call it."""
    return error.reason if isinstance(error, TierError) else Outcome.IO_ERROR
