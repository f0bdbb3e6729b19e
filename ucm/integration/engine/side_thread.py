"""A thread of its own for what the engine's thread must not wait for.

Adapters lie on disks that may hang, and a video takes a tenth of a second to digest. A side thread
does such work in order, one piece at a time; whoever asked looks at the answer at later steps. It
is a daemon: one that hangs keeps nobody from ending. At most `limit` pieces wait; more are refused.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class Pending(Generic[_T]):
    """Of a piece of work, when `is_ready`: its `value`, or None where it could not be done."""

    def __init__(self, *, is_ready: bool = False, value: _T | None = None) -> None:
        self._event = threading.Event()
        self.value = value
        if is_ready:
            self._event.set()

    @property
    def is_ready(self) -> bool:
        return self._event.is_set()

    def wait(self, timeout_s: float) -> bool:
        return self._event.wait(timeout_s)

    def give(self, value: _T | None) -> None:
        self.value = value
        self._event.set()


class SideThread:
    """`ask` is for the engine's thread. The thread starts with the first piece of work."""

    def __init__(self, name: str, *, limit: int = 1024) -> None:
        self._name = name
        self._limit = limit
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def ask(self, work: Callable[[], _T | None]) -> Pending[_T]:
        """What `work` returns, later. None at once where too much waits already."""
        answer: Pending[_T] = Pending()
        if self._work.qsize() >= self._limit:
            answer.give(None)
            return answer
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._work.put(lambda: _do(work, answer))
        return answer

    def close(self) -> None:
        """Drops what waits. What is being done is not waited for."""
        try:
            while True:
                self._work.get_nowait()
        except Empty:
            self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()


def _do(work: Callable[[], _T | None], answer: Pending[_T]) -> None:
    value = None
    try:
        value = work()
    except Exception:  # whatever a foreign object raises: its request goes without the store
        logger.exception("a request bypasses the store: what shaped its KV could not be named")
    finally:
        answer.give(value)
