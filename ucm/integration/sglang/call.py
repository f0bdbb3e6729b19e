"""The host memory of one call of SGLang's, which no thread touches after the call has returned.

SGLang gives the memory of a page to somebody else as soon as it has its answer. A copy that comes
later would land in another prompt's page, or store another prompt's bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ucm.store.api.buffers import HostRow, Row


class Call:
    """`pages[i]` is the memory of the i-th page."""

    def __init__(self, pages: Sequence[HostRow]) -> None:
        self._copied = [False] * len(pages)
        self._has_ended = False
        self._lock = threading.Lock()
        self._pages = pages

    def rows(self) -> list[Row]:
        return [_CallRow(self, number) for number in range(len(self._pages))]

    def load_from(self, number: int, address: int) -> None:
        with self._lock:
            self._check()
            self._pages[number].load_from(address)
            self._copied[number] = True

    def dump_to(self, number: int, address: int) -> None:
        with self._lock:
            self._check()
            self._pages[number].dump_to(address)

    def _check(self) -> None:
        if self._has_ended:
            raise RuntimeError("whoever asked has gone")

    def end(self) -> list[bool]:
        """Which pages were filled, up to the first that was not: SGLang stops there as well. Waits
        for a copy that is under way, of one page."""
        with self._lock:
            self._has_ended = True
            filled = [*self._copied, False].index(False)
        return [number < filled for number in range(len(self._copied))]


class _CallRow(Row):
    """For tasks of the store API."""

    def __init__(self, call: Call, number: int) -> None:
        self._call = call
        self._number = number

    def load_from(self, address: int) -> None:
        self._call.load_from(self._number, address)

    def dump_to(self, address: int) -> None:
        self._call.dump_to(self._number, address)
