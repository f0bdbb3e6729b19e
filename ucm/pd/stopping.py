"""The end of the proxy: who still has a request in it, and what becomes of those in the end.

    serves ──told to stop──► drains: nothing new, what runs goes on ──time is up──► all are told

Nobody is left without a word: a stream ends with an error event, any other request with a 503.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from ucm.pd.trace import RequestTrace


class Stopping:
    """Owned by the event loop's thread."""

    def __init__(self) -> None:
        self.has_begun = False
        self._running: dict[asyncio.Task[object], RequestTrace] = {}
        self._is_drained = asyncio.Event()
        self._is_drained.set()

    @contextmanager
    def running(self, trace: RequestTrace) -> Iterator[None]:
        """Around the request whose task this is."""
        task = asyncio.current_task()
        assert task is not None
        self._running[task] = trace
        self._is_drained.clear()
        try:
            yield
        finally:
            del self._running[task]
            if not self._running:
                self._is_drained.set()

    async def drained(self) -> None:
        """Until nothing runs."""
        await self._is_drained.wait()

    def tell_all(self) -> None:
        """Interrupts what runs: each request has then `trace.is_interrupted`, and a last word."""
        for task, trace in self._running.items():
            trace.is_interrupted = True
            task.cancel()


def go_on(trace: RequestTrace) -> bool:
    """In a handler that was cancelled: whether it was by `tell_all`, and has a last word. It is
    then not cancelled any more."""
    if not trace.is_interrupted:
        return False
    task = asyncio.current_task()
    if task is not None and hasattr(task, "uncancel"):  # Python 3.11 on
        task.uncancel()
    return True
