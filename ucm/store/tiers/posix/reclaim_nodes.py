"""What the node caches that write into a backend say of themselves, in a file each.

A node's file is replaced with each beat in which something has changed, and often enough to be seen
to live. One that has not changed for `stale_s` while it was watched is that of a dead or hanging
node: it counts no more, and some time later its file is removed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from ucm.errors import TierError
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.grants import NodeNote
from ucm.store.tiers.posix.small_files import read_small

# More than anybody has.
_MAX_NODES = 10_000


@dataclass
class Neighbours:
    """For one thread of one node."""

    own_name: str
    stale_s: float
    clock: Callable[[], float] = time.monotonic
    # Why a file could not be read in the last look, for people; empty if all could.
    problem: str = ""
    # Of each file, the beat that was seen last, and since when.
    _seen: dict[str, tuple[int, float]] = field(default_factory=dict)

    def alive(self, root: int) -> dict[str, NodeNote]:
        """All but this one, by the names of their files. One that can't be read is left out, and
        the `problem`. Raises OSError."""
        self.problem = ""
        found = dict(self._notes(root))
        now_s = self.clock()
        self._seen = {
            name: seen
            if (seen := self._seen.get(name)) is not None and seen[0] == note.beat
            else (note.beat, now_s)
            for name, note in found.items()
        }
        for name, (_, since_s) in self._seen.items():
            if now_s - since_s >= self.stale_s:
                del found[name]
            if now_s - since_s >= 2 * self.stale_s:
                with suppress(OSError):
                    os.unlink(name, dir_fd=root)
        return found

    def _notes(self, root: int) -> Iterator[tuple[str, NodeNote]]:
        with os.scandir(root) as entries:
            names = [each.name for each in entries if paths.is_reclaim_node(each.name)]
        for name in names[:_MAX_NODES]:
            if name == self.own_name:
                continue
            try:
                if (content := read_small(root, name)) is not None:
                    yield name, msgspec.json.decode(content, type=NodeNote)
            except msgspec.DecodeError:
                continue  # of a version to come
            except TierError as error:
                self.problem = str(error)
