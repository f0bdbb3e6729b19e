"""The node cache's threads: the only ones that touch storage, in a bounded number.

`IoPool` runs blocking tier calls on daemon threads and reports back on the event loop. A call
that runs longer than `timeout_s` is *overdue*: it can't be ended (a hung NFS read sleeps
uninterruptibly), so its owner is told at once and again when it really returns. A pool in which
half the threads are overdue is *stalled*; callers then do without storage instead of queueing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol

from ucm.errors import TierError, UcmError


class Loop(Protocol):
    """The part of an asyncio loop that the pool needs."""

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: object) -> object: ...


class Pool(Protocol):
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
    ) -> None: ...
    def tick(self) -> None: ...


class IoJob:
    """One blocking call. Owned by the pool from `submit` until its `on_done` was called."""

    __slots__ = ("call", "on_done", "on_overdue", "overdue", "started_s")

    def __init__(
        self,
        call: Callable[[], object],
        on_done: Callable[[object], None],
        on_overdue: Callable[[], None] | None,
    ) -> None:
        self.call = call
        self.on_done = on_done
        self.on_overdue = on_overdue
        self.started_s: float | None = None
        self.overdue = False


class IoPool:
    """`num_threads` daemon threads over one FIFO queue.

    `submit` and `tick` belong to the loop's thread; callbacks run there too. A call's `UcmError`
    is handed to `on_done` in place of a result; any other exception becomes a TierError with
    its type and text, because one odd file must not end a thread.
    """

    def __init__(self, name: str, *, loop: Loop, num_threads: int, timeout_s: float) -> None:
        self.num_threads = num_threads
        self._loop = loop
        self._timeout_s = timeout_s
        self._queue: SimpleQueue[IoJob | None] = SimpleQueue()
        self._running: set[IoJob] = set()
        self._num_queued = 0
        for i in range(num_threads):
            threading.Thread(target=self._work, name=f"ucm-{name}-{i}", daemon=True).start()

    @property
    def depth(self) -> int:
        """Calls submitted and not yet returned."""
        return self._num_queued

    @property
    def num_overdue(self) -> int:
        return sum(job.overdue for job in self._running)

    @property
    def stalled(self) -> bool:
        return self.num_overdue * 2 >= self.num_threads

    def submit(
        self,
        call: Callable[[], object],
        on_done: Callable[[object], None],
        *,
        on_overdue: Callable[[], None] | None = None,
    ) -> None:
        job = IoJob(call, on_done, on_overdue)
        self._num_queued += 1
        self._running.add(job)
        self._queue.put(job)

    def tick(self) -> None:
        """Finds calls that have become overdue. Called a few times a second."""
        now_s = time.monotonic()
        for job in list(self._running):
            started_s = job.started_s
            if started_s is None or job.overdue or now_s - started_s < self._timeout_s:
                continue
            job.overdue = True
            if job.on_overdue is not None:
                job.on_overdue()

    def close(self) -> None:
        """Asks the threads to leave after what is queued. Doesn't wait: one may hang."""
        for _ in range(self.num_threads):
            self._queue.put(None)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            job.started_s = time.monotonic()
            result: object
            try:
                result = job.call()
            except UcmError as error:
                result = error
            except Exception as error:  # noqa: BLE001 - one odd file must not end a thread
                result = TierError(f"{type(error).__name__}: {error}", reason="io_error")
            try:
                self._loop.call_soon_threadsafe(self._finish, job, result)
            except RuntimeError:
                return  # the loop has closed: the process is leaving

    def _finish(self, job: IoJob, result: object) -> None:
        self._num_queued -= 1
        self._running.discard(job)
        job.on_done(result)
