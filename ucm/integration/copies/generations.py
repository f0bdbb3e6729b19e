"""The memory that a rank copies from and to: that of the current node cache, and of earlier ones.

Filled by the link's thread, used by the rank's. Making it fast is a third thread's (`pinning.py`).
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Iterable
from typing import Any

from ucm.integration.copies.arena import Arena
from ucm.integration.copies.jobs import CopyJob
from ucm.integration.copies.pinning import PIECE_BYTES, Preparer
from ucm.store.client.rank_link import MemoryTaker
from ucm.store.node.memory import keep_out_of_core_dumps
from ucm.store.node.protocol import Welcome


class Memories(MemoryTaker):
    """The memory of the current node cache, and of earlier ones that may still be needed: until the
    scheduler side has gone on to a later generation, and the jobs in them have ended.

    The lock guards everything.
    """

    def __init__(self, device: Any, *, pin_piece_bytes: int = PIECE_BYTES) -> None:
        self._device = device
        self._preparer = Preparer(pins=device.type != "cpu", piece_bytes=pin_piece_bytes)
        self._preparer.start()
        self._lock = threading.Lock()
        self._arenas: dict[int, Arena] = {}
        self._jobs: dict[int, int] = {}
        self._planned_from: float = 0

    def memory_arrived(self, generation: int, memory_fd: int, welcome: Welcome) -> None:
        with self._lock:
            known = self._arenas.get(generation)
        if known is not None and known.name == welcome.arena:
            return  # only the connection is new
        mapped = mmap.mmap(memory_fd, welcome.capacity_bytes)
        keep_out_of_core_dumps(mapped)
        arena = Arena(mapped, device=self._device, name=welcome.arena)
        with self._lock:
            replaced = self._arenas.pop(generation, None)
            self._arenas[generation] = arena
        if replaced is not None:
            replaced.close()

    def memory_in_use(self, generation: int, offset: int, nbytes: int) -> None:
        with self._lock:
            arena = self._arenas.get(generation)
        if arena is not None:
            # Takes long, and this thread has a connection to watch.
            self._preparer.add(arena, offset, nbytes)

    def first_step(self) -> None:
        """The engine serves: its graphs are captured, and memory may be pinned."""
        self._preparer.allow()

    def is_used(self, generation: int) -> bool:
        with self._lock:
            return generation >= self._planned_from or generation in self._jobs.values()

    def planned_from(self, generation: int) -> None:
        """No job for an earlier generation will come any more."""
        if generation != self._planned_from:
            self._planned_from = generation
            self._close_unused()

    def begin(self, job: CopyJob) -> Arena | None:
        """The memory for this job, kept until `ended`. None: this rank doesn't have it."""
        with self._lock:
            arena = self._arenas.get(job.generation)
            if arena is not None:
                self._jobs[job.job_id] = job.generation
            return arena

    def ended(self, job_ids: Iterable[int]) -> None:
        with self._lock:
            generations = {self._jobs.pop(job_id, self._planned_from) for job_id in job_ids}
        if any(generation < self._planned_from for generation in generations):
            self._close_unused()

    def close(self) -> None:
        """No job will come any more. Waits for those that run, bounded."""
        self._preparer.stop()
        with self._lock:
            self._planned_from = math.inf
            arenas = list(self._arenas.values())
            self._arenas.clear()
        for arena in arenas:
            arena.close()

    def _close_unused(self) -> None:
        with self._lock:
            used = set(self._jobs.values())
            past = [g for g in self._arenas if g < self._planned_from and g not in used]
            unused = [self._arenas.pop(generation) for generation in past]
        for arena in unused:
            # Unpinning takes long, and this may be the thread of the forward pass.
            threading.Thread(target=arena.close, name="ucm-unmap", daemon=True).start()
