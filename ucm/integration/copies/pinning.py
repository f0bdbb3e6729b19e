"""Makes the slots' memory fast to copy to and from, in the background: one thread per rank.

Where memory is pinned for an accelerator:

* Nothing before `allow`, which is the engine's first step. While an engine starts it captures its
  graphs, and a registration meanwhile, on any thread, is refused or spoils the capture.
* In pieces, on a grid over the arena, with a pause after each that is a multiple of what it took: a
  registration keeps the process's other calls into the driver out, so the forward pass's launches
  get in between and have most of the time.
* A refusal is no verdict: what could not be pinned is tried again, ever more seldom, for as long as
  the arena is open. Until then copies of that part go through a pinned ring.

On the CPU there is no such hurry to avoid: the page table is filled at once, by a thread that gives
way to everybody.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass

from ucm.integration.copies.arena import Arena
from ucm.store.node.memory import give_way

logger = logging.getLogger(__name__)

PIECE_BYTES = 64 << 20
_PAUSES_PER_PIECE = 3
_MIN_PAUSE_S, _MAX_PAUSE_S = 0.005, 1.0
_FIRST_RETRY_S, _MAX_RETRY_S = 1.0, 60.0
_WARN_EVERY_S = 600.0


@dataclass(frozen=True)
class _Extent:
    arena: Arena
    start: int
    end: int


class Preparer(threading.Thread):
    """`pins`: for an accelerator. `piece_bytes` 0 there: nothing is ever pinned. Invariant: an
    extent that was added is in `_extents`, or in hand, until it is prepared or its arena closes."""

    def __init__(
        self,
        *,
        pins: bool,
        piece_bytes: int = PIECE_BYTES,
        first_retry_s: float = _FIRST_RETRY_S,
    ) -> None:
        super().__init__(name="ucm-prepare", daemon=True)
        self._pins = pins
        self._piece_bytes = piece_bytes
        self._first_retry_s = self._retry_s = first_retry_s
        self._warned_s = -_WARN_EVERY_S
        # Guards what follows.
        self._cond = threading.Condition()
        self._extents: deque[_Extent] = deque()
        self._allowed = not pins
        self._stopped = False

    def add(self, arena: Arena, start: int, nbytes: int) -> None:
        with self._cond:
            if self._stopped or (self._pins and not self._piece_bytes):
                return
            self._extents.append(_Extent(arena, start, start + nbytes))
            self._cond.notify_all()

    def allow(self) -> None:
        """The engine has begun to serve."""
        if not self._allowed:
            with self._cond:
                self._allowed = True
                self._cond.notify_all()

    def stop(self) -> None:
        """Returns at once; a call into the driver that is under way ends by itself."""
        with self._cond:
            self._stopped = True
            self._extents.clear()
            self._cond.notify_all()

    def run(self) -> None:
        if not self._pins:
            give_way()  # but not where others may wait for the accelerator's driver meanwhile
        while (extent := self._next()) is not None:
            try:
                pause_s = self._prepare(extent)
            except Exception:
                logger.exception("memory of the node cache can't be prepared for fast copies")
                pause_s = self._later(extent)
            self._rest(pause_s)

    def _next(self) -> _Extent | None:
        """None: stopped."""
        with self._cond:
            while not self._stopped:
                while self._extents and self._extents[0].arena.closed:
                    self._extents.popleft()
                if self._extents and self._allowed:
                    return self._extents.popleft()
                self._cond.wait()
        return None

    def _prepare(self, extent: _Extent) -> float:
        """A piece of it; the rest goes back to the front. How long to rest."""
        piece_bytes = self._piece_bytes or PIECE_BYTES
        cut = min(extent.end, (extent.start // piece_bytes + 1) * piece_bytes)
        started_s = time.monotonic()
        refused = extent.arena.prepare(extent.start, cut - extent.start)
        took_s = time.monotonic() - started_s
        if refused:
            self._warn(cut - extent.start, refused)
            return self._later(extent)
        self._retry_s = self._first_retry_s
        if cut < extent.end:
            self._put_back(_Extent(extent.arena, cut, extent.end))
        if not self._pins:
            return 0.0
        return min(max(_PAUSES_PER_PIECE * took_s, _MIN_PAUSE_S), _MAX_PAUSE_S)

    def _later(self, extent: _Extent) -> float:
        self._put_back(extent)
        pause_s, self._retry_s = self._retry_s, min(2 * self._retry_s, _MAX_RETRY_S)
        return pause_s

    def _put_back(self, extent: _Extent) -> None:
        with self._cond:
            if not self._stopped:
                self._extents.appendleft(extent)

    def _rest(self, pause_s: float) -> None:
        with self._cond:
            self._cond.wait_for(lambda: self._stopped, pause_s)

    def _warn(self, nbytes: int, refused: str) -> None:
        now_s = time.monotonic()
        if now_s - self._warned_s >= _WARN_EVERY_S:
            self._warned_s = now_s
            logger.warning(
                "the accelerator's driver does not pin %d MiB of the node cache's memory now (%s):"
                " until it does, copies of that part go through a pinned ring, which is slower;"
                " tried again in %.0f s and later",
                -(-nbytes >> 20),
                refused,
                self._retry_s,
            )
