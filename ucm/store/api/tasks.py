"""A handle for what a user of the store API has under way.

A task ends once, well or badly, and then touches no memory of its user any more.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from ucm.errors import UcmError


class Task:
    """For `UcmPipelineStore.wait` and `check`, from any thread. The store's thread ends it."""

    def __init__(self, timeout_s: float) -> None:
        """It begins now; `began_s` and `deadline_s` are by time.monotonic()."""
        self.timeout_s = timeout_s
        self.began_s = time.monotonic()
        self.deadline_s = self.began_s + timeout_s
        # What a task that times out was waiting for, for people.
        self.waits_for = "the node cache"
        # What its steps have returned, once it has ended well.
        self.result: Any = None
        self._ended = threading.Event()
        self._error: UcmError | None = None

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Whether the task has ended by then. Raises what it failed with."""
        ended = self._ended.wait(timeout_s)
        if self._error is not None:
            raise self._error
        return ended

    def finish(self, result: object) -> None:
        self.result = result
        self._ended.set()

    def fail(self, error: UcmError) -> None:
        self._error = error
        self._ended.set()
