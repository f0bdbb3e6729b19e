"""One node at a time reclaims a backend: a lease by a file, with a heartbeat.

The file says who holds it: a process, a word that nobody else has, and a number that grows with
each beat. It is made with a hard link, which fails if it is there, and renewed by a rename over it.
No lock of the filesystem's is used: several don't share them between nodes.

Somebody else may take it over when its holder can be seen to be dead, or when it has not changed
for `stale_s` while it was watched. That compares no clocks, so it does not matter whether they
agree; who has just come watches first. One that can't be read, because storage has torn it, is
taken back by its holder with its next beat, and by others when two beats have not changed it: no
live holder leaves it so. Two that take it over in one moment both write; the later
one's word stays, and the other sees that at its next beat. Until then both reclaim, which is
harmless: a file goes once, and what is deleted may be a little more than was needed.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from ucm.errors import TierError
from ucm.store.processes import Process, is_running, this_process
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.os_errors import unless_full
from ucm.store.tiers.posix.rights import UMASK_DECIDES, FileRights
from ucm.store.tiers.posix.small_files import link_small, read_small, write_small
from ucm.store.tiers.posix.writers import Fate, fate

# More than one, as a newer version's note may be one that this one can't read.
_TORN_BEATS = 2


class LeaseNote(msgspec.Struct, frozen=True):
    """The file's content."""

    host: str
    world: str
    pid: int
    began: int
    deletes: bool
    token: str
    beat: int

    @property
    def process(self) -> Process:
        return Process(self.host, self.world, self.pid, self.began)


@dataclass
class ReclaimLease:
    """Of one backend, for one thread. Calls raise OSError and TierError; whoever gets one does not
    hold it."""

    stale_s: float
    # A live holder renews it as often.
    heartbeat_s: float
    deletes: bool = True
    rights: FileRights = UMASK_DECIDES
    here: Process = field(default_factory=this_process)
    is_running: Callable[[int, int], bool | None] = is_running
    clock: Callable[[], float] = time.monotonic
    is_held: bool = False
    _token: str = field(default_factory=lambda: secrets.token_hex(8))
    _beat: int = 0
    # The last content that could be read.
    _was_mine: bool = False
    # The content that was seen last, and since when.
    _seen: bytes | None = None
    _seen_since_s: float = 0.0

    def hold(self, root: int) -> bool:
        """Takes it if it is to be had, and renews it. `root` is a descriptor of the backend."""
        found = read_small(root, paths.RECLAIM_LEASE)
        if found is None:
            self.is_held = self._make(root)
        elif self._is_mine(found) or self._may_take_over(found):
            self.is_held = self._renew(root)
        else:
            self.is_held = False
        if self.is_held or found is None or _parse(found) is not None:
            self._was_mine = self.is_held
        return self.is_held

    def still_held(self, root: int) -> bool:
        """Whether nobody has taken it over. Writes nothing."""
        found = read_small(root, paths.RECLAIM_LEASE)
        self.is_held = self.is_held and found is not None and self._is_mine(found)
        return self.is_held

    def release(self, root: int) -> None:
        with suppress(OSError, TierError):
            if self.still_held(root):
                os.unlink(paths.RECLAIM_LEASE, dir_fd=root)
        self.is_held = False

    def _make(self, root: int) -> bool:
        with unless_full():
            return link_small(root, paths.RECLAIM_LEASE, self._note(), self.rights)
        return True  # nobody can take it, and somebody has to make room

    def _renew(self, root: int) -> bool:
        with unless_full():
            write_small(root, paths.RECLAIM_LEASE, self._note(), self.rights)
            found = read_small(root, paths.RECLAIM_LEASE)
            return found is not None and self._is_mine(found)
        return True

    def _may_take_over(self, found: bytes) -> bool:
        note = _parse(found)
        if note is None:
            # Who takes one over writes what can be read.
            after_s = min(self.stale_s, _TORN_BEATS * self.heartbeat_s)
            return self._was_mine or self._has_settled(found, after_s)
        if self.deletes and not note.deletes:
            return True  # it only counts what is stored
        seen = fate(note.process, here=self.here, is_running=self.is_running)
        return seen is Fate.DEAD or self._has_settled(found, self.stale_s)

    def _has_settled(self, found: bytes, after_s: float) -> bool:
        """It has not changed for so long."""
        if found != self._seen:
            self._seen, self._seen_since_s = found, self.clock()
        return self.clock() - self._seen_since_s >= after_s

    def _is_mine(self, found: bytes) -> bool:
        note = _parse(found)
        return note is not None and note.token == self._token

    def _note(self) -> bytes:
        self._beat += 1
        here = self.here
        return msgspec.json.encode(
            LeaseNote(
                here.host, here.world, here.pid, here.began, self.deletes, self._token, self._beat
            )
        )


def holder_in(content: bytes | None) -> str:
    """Who holds a lease by its file's content, for people."""
    note = _parse(content) if content is not None else None
    return "somebody else" if note is None else f"process {note.pid} on {note.host}"


def _parse(content: bytes) -> LeaseNote | None:
    try:
        return msgspec.json.decode(content, type=LeaseNote)
    except msgspec.DecodeError:
        return None
