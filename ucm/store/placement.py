"""On which storage backend a key lives.

With several backends on the one that scores highest for it (rendezvous hashing over the backends'
ids): adding one moves only the keys that it takes.
"""

from __future__ import annotations

from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

from ucm.errors import TierError
from ucm.store.backend import Backend
from ucm.store.keys import Key


class Placement:
    """Of one process. Ids don't change once they are known, so neither do places."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._backends = backends
        self._by_id: list[tuple[int, Backend]] | None = None

    def of(self, key: Key) -> Backend | None:
        """The backend of `key`; None while nothing was ever stored on several backends."""
        if len(self._backends) == 1:
            return self._backends[0]
        by_id = self._by_id or self.identify()
        if not by_id:
            return None
        return max(by_id, key=lambda each: xxh3_64_intdigest(key, each[0]))[1]

    def to_write(self, key: Key) -> Backend:
        """Raises TierError if it isn't the one that was opened."""
        backend = self.of(key)
        if backend is None:
            for each in self._backends:
                each.identity.check()
            raise TierError(f"{self._backends[0].path}: its id comes and goes", reason="io_error")
        backend.identity.check()
        return backend

    def identify(self) -> list[tuple[int, Backend]] | None:
        """Reads every backend's id; None if one has none. All must be known before any key has a
        place. Raises TierError."""
        by_id: dict[int, Backend] = {}
        for backend in self._backends:
            backend_id = backend.identity.id
            if backend_id is None:
                backend_id = backend.identity.look()
            if backend_id is None:
                return None
            if backend_id in by_id:
                raise TierError(
                    f"{backend.path} and {by_id[backend_id].path} are the same storage backend, or "
                    f"one is a copy of the other; list it once",
                    reason="corrupt",
                )
            by_id[backend_id] = backend
        self._by_id = list(by_id.items())
        return self._by_id
