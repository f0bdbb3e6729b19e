"""How long storage has worked for each lookup.

Only time in which pages are being read for it counts, not that in which it waits for pages that
somebody still computes. Lookups of one client that are read for at the same time share it: what
ten take together is the time of ten, not ten times that of all. So bytes by these seconds are what
storage gives this client, however many lookups it has open.
"""

from __future__ import annotations

from collections.abc import Callable

from ucm.store.node.lookup_state import LookupJob
from ucm.store.node.sessions import Session


class SharedTime:
    """A clock that runs at 1 / n of the real one while n share it."""

    def __init__(self) -> None:
        self.num_sharing = 0
        self._now_s = 0.0
        self._at_s = 0.0

    def at(self, real_s: float) -> float:
        """What it shows. `real_s` never goes back."""
        if self.num_sharing:
            self._now_s += (real_s - self._at_s) / self.num_sharing
        self._at_s = real_s
        return self._now_s


class ReadTimes:
    """Owned by the event loop's thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._shared: dict[Session, SharedTime] = {}
        self._since_s: dict[LookupJob, float] = {}

    def begin(self, job: LookupJob) -> None:
        """Its first read begins, or the first after a pause."""
        if job not in self._since_s:
            shared = self._shared.setdefault(job.connection.session, SharedTime())
            self._since_s[job] = shared.at(self._clock())
            shared.num_sharing += 1

    def end(self, job: LookupJob) -> None:
        """Nothing is read for it now, or nobody waits for that any more."""
        since_s = self._since_s.pop(job, None)
        if since_s is None:
            return
        session = job.connection.session
        shared = self._shared[session]
        job.read_s += shared.at(self._clock()) - since_s
        shared.num_sharing -= 1
        if not shared.num_sharing:
            del self._shared[session]
