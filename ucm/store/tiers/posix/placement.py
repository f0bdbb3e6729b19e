"""On which storage backend a key lives.

With several backends on the one that scores highest for it (rendezvous hashing over the backends'
ids): adding one moves only the keys that it takes.

A backend whose id is not known yet, because it hangs or was never there since this process started,
costs the others nothing that is read: a key that lives on one of those has its highest score there
among any of them that are known. Nothing is written until all ids were known once: pages of the
missing one would go to others, where nobody finds them once it is back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final

from xxhash import xxh3_64_intdigest

from ucm.errors import TierError
from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key
from ucm.store.tiers.posix.backend import Backend
from ucm.store.tiers.posix.os_errors import READ_ONLY_ERRNOS

# How long a write waits for the one that opens its backend.
_OPENING_S: Final = 5.0


class Placement:
    """Of one process. Ids don't change once they are known, so neither do places once all are.

    Only `open` waits for a backend that hangs. Whoever else would need its id does without while
    somebody is looking for it: at most one thread per backend hangs for an id. What is to be
    written waits a while for it: at the first start of all the id is made while pages come already.
    """

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._backends = backends
        self._looking = [threading.Lock() for _ in backends]
        # Ids and indexes of the backends, once all are known.
        self._all: list[tuple[int, int]] = []

    def lane_of(self, key: Key) -> int:
        """The index of the backend of `key`, by what is known: no I/O."""
        known = self._known() if len(self._backends) > 1 else []
        return _highest(key, known) if known else 0

    def of(self, key: Key) -> Backend | None:
        """The backend of `key`, by what is known; None while nothing is. Raises TierError."""
        if len(self._backends) == 1:
            return self._backends[0]
        error = None if self._known() else self._look_for_all()
        known = self._checked()
        if not known and error is not None:
            raise error
        return self._backends[_highest(key, known)] if known else None

    def to_write(self, key: Key) -> Backend:
        """Raises TierError if it isn't the one that was opened."""
        error = self._look_for_all() if self.unknown() else None
        if error is not None:
            raise error
        backend = self.of(key)
        unknown = [self._backends[lane].path for lane in self.unknown()]
        if backend is None or unknown:
            raise TierError(
                f"{', '.join(unknown)}: not seen since this node cache started, so nobody knows "
                f"which pages belong there, and nothing is written to any storage backend: mount "
                f"it, or make it with `ucm init`, or take it off storage_backends",
                reason=Outcome.IO_ERROR,
            )
        if backend.identity.id is None:
            lane = self._backends.index(backend)
            if self._looking[lane].acquire(timeout=_OPENING_S):
                self._looking[lane].release()
            refused = self.look_for(lane)
            if refused is not None:
                raise refused
        backend.identity.check()
        return backend

    def unknown(self) -> list[int]:
        """Indexes of the backends whose ids are needed and not known."""
        if self._all or len(self._backends) == 1:
            return []
        return [i for i, backend in enumerate(self._backends) if backend.identity.id is None]

    def open(self, lane: int) -> None:
        """Makes the backend if need be, and can be. Raises TierError."""
        backend = self._backends[lane]
        with self._looking[lane]:
            unless_read_only(backend.open)
        backend.say_rights()
        self._checked()

    def look_for(self, lane: int) -> TierError | None:
        """Whether the backend's id can be known by now. Makes nothing but what `open` was to make
        and could not; returns why that is refused, if it is. Raises TierError."""
        backend = self._backends[lane]
        if backend.identity.id is None and self._looking[lane].acquire(blocking=False):
            try:
                if backend.identity.look() is None:
                    return unless_read_only(backend.open_again)
            finally:
                self._looking[lane].release()
        return None

    def _look_for_all(self) -> TierError | None:
        return for_all(range(len(self._backends)), self.look_for)

    def _known(self) -> list[tuple[int, int]]:
        if self._all:
            return self._all
        ids = [(backend.identity.id, i) for i, backend in enumerate(self._backends)]
        return [(each, i) for each, i in ids if each is not None]

    def _checked(self) -> list[tuple[int, int]]:
        """`_known`. Raises TierError if two are the same."""
        if self._all:
            return self._all
        known = self._known()
        by_id: dict[int, Backend] = {}
        for each, i in known:
            backend = self._backends[i]
            if each in by_id:
                raise TierError(
                    f"{backend.path} and {by_id[each].path} are the same storage backend, or "
                    f"one is a copy of the other; list it once",
                    reason=Outcome.CORRUPT,
                )
            by_id[each] = backend
        if len(known) == len(self._backends):
            self._all = known
        return known


def _highest(key: Key, known: Sequence[tuple[int, int]]) -> int:
    return max(known, key=lambda each: xxh3_64_intdigest(key, each[0]))[1]


def for_all(lanes: Iterable[int], act: Callable[[int], object]) -> TierError | None:
    """Acts on each, whatever becomes of the others. Returns the first one's error."""
    errors = [error for lane in lanes if (error := _error_of(partial(act, lane))) is not None]
    return errors[0] if errors else None


def _error_of(act: Callable[[], object]) -> TierError | None:
    try:
        act()
    except TierError as error:
        return error
    return None


def unless_read_only(write: Callable[[], object]) -> TierError | None:
    """A read-only mount is fine: what others wrote can be read. What may not be read either says
    so at the first read. Returns what it is refused by."""
    try:
        write()
    except TierError as error:
        cause = error.__cause__
        if not (isinstance(cause, OSError) and cause.errno in READ_ONLY_ERRNOS):
            raise
        return error
    return None
