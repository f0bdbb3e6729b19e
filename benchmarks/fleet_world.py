"""What a modelled fleet stands on: a virtual clock, servers with queues, and the pages they keep.

A call to storage is a list of charges, one after the other: an operation of the metadata server, or
bytes of the data servers. Each waits its turn in the server's queue. What a call answers is what
was there when it began. Nothing fails and nothing hangs.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import count
from typing import Final

from ucm.store.blocks.keys import Key
from ucm.store.tiers.posix.recall import Recall
from ucm.store.tiers.tier import (
    ABSENT,
    HIT,
    PageRead,
    Staged,
    Tier,
    TierNamespace,
    leading_by_order,
)

# The clock of a model must not be at zero: scores may lie before the start.
BEGIN_NS: Final = 1_700_000_000 * 10**9

# Operations of the metadata server, as the Posix tier's system calls on a filesystem whose clients
# remember absences. What it looks up to know the mount again is in every client's cache.
_OPERATIONS: Final = {
    "probe hit": 1,  # lstat
    "probe miss": 1,  # lstat
    "listed": 1,  # its directory, so that a client asks for that anew (revalidate.py)
    "to be made": 1,  # the name, so that it is looked up where it is kept
    "open": 1,
    "publish": 4,  # is it there already; created; its times; renamed
    "touch": 2,  # stat, utime
    "doubt": 3,  # utime of directories
    "recheck": 3,  # the directory is listed; lstat; open
    "looked at": 1,  # lstat, by reclaim
    "unlink": 1,
}
# What is printed, of which charges.
KINDS: Final = ("probe hit", "probe miss", "poll", "open", "touch", "publish", "recheck", "reclaim")


@dataclass(frozen=True)
class Charge:
    """`operations` of the metadata server, counted as `kind`, or `nbytes` of the data servers."""

    kind: str
    operations: int = 0
    nbytes: int = 0


class World:
    """The clock. Calls are made in the order of their times."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._numbers = count()
        self._calls: list[tuple[float, int, Callable[[], object]]] = []

    def clock(self) -> float:
        return self.now_s

    def later(self, pause_s: float, call: Callable[[], object]) -> None:
        heappush(self._calls, (self.now_s + max(0.0, pause_s), next(self._numbers), call))

    def step(self) -> bool:
        """False when nothing is left to do."""
        if not self._calls:
            return False
        self.now_s, _, call = heappop(self._calls)
        call()
        return True


class Server:
    """One queue, `per_s` of work, and an answer `latency_s` after a turn ends. `name` is for
    people."""

    def __init__(self, world: World, name: str, *, per_s: float, latency_s: float) -> None:
        self._world, self.name = world, name
        self._per_s, self._latency_s = per_s, latency_s
        self._free_s = 0.0
        self.work = 0.0

    def serve(self, work: float, then: Callable[[], None]) -> None:
        self.work += work
        self._free_s = max(self._world.now_s, self._free_s) + work / self._per_s
        self._world.later(self._free_s + self._latency_s - self._world.now_s, then)

    def utilisation(self, seconds: float) -> float:
        """By all that it was given: more than 1 is more than it could do."""
        return self.work / self._per_s / seconds


@dataclass
class Filesystem:
    """The servers, and what is stored: of each page whether it is no tail, and its score."""

    world: World
    metadata: Server
    data: Server
    pages: dict[Key, tuple[bool, int]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    bytes_moved: int = 0

    def now_ns(self) -> int:
        return BEGIN_NS + int(self.world.now_s * 1e9)

    def pay(self, charges: Sequence[Charge], then: Callable[[], None]) -> None:
        """One after the other."""
        left = deque(charges)

        def go_on() -> None:
            if not left:
                then()
                return
            charge = left.popleft()
            if charge.nbytes:
                self.bytes_moved += charge.nbytes
                self.data.serve(charge.nbytes, go_on)
            else:
                self.counts[charge.kind] += charge.operations
                self.metadata.serve(charge.operations, go_on)

        go_on()


class FleetTier(Tier):
    """One node's view of the filesystem. What its calls cost lies in `charges` until it is taken.
    `exact`: it asks for each page by itself, as files were asked for once."""

    def __init__(self, filesystem: Filesystem, *, exact: bool = False) -> None:
        self.filesystem = filesystem
        self._exact = exact
        self._recall = Recall(1 << 16)
        self.charges: list[Charge] = []

    @property
    def name(self) -> str:
        return "posix"

    def take_charges(self) -> list[Charge]:
        taken, self.charges = self.charges, []
        return taken

    def _charge(self, *operations: str, kind: str = "") -> None:
        for name in operations:
            self.charges.append(Charge(kind or name, _OPERATIONS[name]))

    def _is_there(self, key: Key, *, kind: str = "") -> bool:
        is_there = key in self.filesystem.pages
        self._charge("probe hit" if is_there else "probe miss", kind=kind)
        return is_there

    def contains(self, namespace: TierNamespace, keys: Sequence[Key]) -> int:
        for i, key in enumerate(keys):
            if not self._is_there(key):
                self._charge("listed", "to be made", kind="probe miss")
                return i
        return len(keys)

    def leads_to(self, namespace: TierNamespace, keys: Sequence[Key], *, now: bool = False) -> int:
        if self._exact:
            return super().leads_to(namespace, keys, now=now)
        kind = "poll" if now else ""
        leading = leading_by_order(len(keys), lambda i: self._is_there(keys[i], kind=kind))
        if leading < len(keys):
            self._charge("listed", "to be made", kind=kind or "probe miss")
        return leading

    def contains_now(self, namespace: TierNamespace, key: Key) -> bool:
        self._charge("listed", kind="poll")
        is_there = self._is_there(key, kind="poll")
        if not is_there:
            self._charge("to be made", kind="poll")
        return is_there

    def doubt(self, namespace: TierNamespace, key: Key) -> None:
        self._charge("doubt", kind="poll")

    def holds(self, namespace: TierNamespace, key: Key) -> bool:
        self._charge("recheck")
        return key in self.filesystem.pages

    def read(self, namespace: TierNamespace, key: Key, page: memoryview) -> PageRead:
        self._charge("open")
        if key not in self.filesystem.pages:
            return ABSENT
        self.charges.append(Charge("read", nbytes=namespace.page_bytes))
        return HIT

    def stage(
        self, namespace: TierNamespace, key: Key, page: memoryview, *, num_tokens: int
    ) -> Staged | None:
        self._charge("publish")
        if key in self.filesystem.pages:
            return None
        self.charges.append(Charge("write", nbytes=namespace.page_bytes))
        return Staged(namespace, key, "")

    def publish(self, staged: Staged) -> None:
        score_ns = self._recall.first_score_ns(staged.key, self.filesystem.now_ns())
        self.filesystem.pages[staged.key] = (True, score_ns)

    def discard(self, staged: Staged) -> None:
        pass

    def asked(self, keys: Sequence[Key]) -> None:
        self._recall.use(keys, self.filesystem.now_ns())

    def touch(self, namespace: TierNamespace, keys: Sequence[Key]) -> None:
        for key in keys:
            stored = self.filesystem.pages.get(key)
            if stored is not None:
                self._charge("touch")
                score_ns = self._recall.used_score_ns(key, stored[1], self.filesystem.now_ns())
                self.filesystem.pages[key] = (stored[0], score_ns or stored[1])

    def open_namespace(self, namespace: TierNamespace) -> None:
        pass

    def read_manifest(self, fingerprint: bytes) -> bytes | None:
        return None

    def close(self) -> None:
        pass


class FleetPool:
    """Threads of a node: each does one call at a time, the urgent ones first."""

    num_overdue = 0
    stalled = False

    def __init__(self, filesystem: Filesystem, tier: FleetTier, num_threads: int) -> None:
        self.num_threads = num_threads
        self._filesystem, self._tier = filesystem, tier
        self._free = num_threads
        self._urgent: deque[tuple[Callable[[], object], Callable[[object], None]]] = deque()
        self._others: deque[tuple[Callable[[], object], Callable[[object], None]]] = deque()

    @property
    def depth(self) -> int:
        return len(self._urgent) + len(self._others) + self.num_threads - self._free

    def submit(
        self,
        call: Callable[[], object],
        on_done: Callable[[object], None],
        *,
        on_overdue: Callable[[], None] | None = None,
        urgent: bool = False,
    ) -> None:
        (self._urgent if urgent else self._others).append((call, on_done))
        # A thread is another one's: nobody hears of the end in the call that begins it.
        self._filesystem.world.later(0.0, self._begin)

    def _begin(self) -> None:
        if not self._free or not (self._urgent or self._others):
            return
        call, on_done = (self._urgent or self._others).popleft()
        self._free -= 1
        result = call()
        self._filesystem.pay(self._tier.take_charges(), partial(self._end, on_done, result))
        self._begin()

    def _end(self, on_done: Callable[[object], None], result: object) -> None:
        self._free += 1
        on_done(result)
        self._begin()

    def tick(self) -> None:
        pass

    def give_back_queue(self, *, urgent: bool) -> None:
        pass
