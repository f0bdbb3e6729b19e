"""The contract of a tier, the place behind the node cache.

A tier keeps one immutable page per key and namespace. It promises *right or absent*: `read`
gives the bytes that `stage` was given, or it doesn't say HIT.

Threads: every method may be called from any number of threads at once, and each may block for
as long as storage does; the node cache calls them on I/O threads only. Nothing here takes a
deadline, because a system call in a hung mount can't be given one.

Ownership: the caller owns the pages it passes. A tier touches one only until the call returns; what
is staged it may read until the call that publishes or discards it returns, and the caller keeps the
page as it is until then. What isn't kept is damaged, and never another page.

    stage ──► Staged ──publish──► visible to every reader of the storage
                 └────discard───► gone, as if it had never been

Errors: storage failures are `TierError`s; `read` puts them into its result instead, because a
page that can't be read is nothing but a shorter prefix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from ucm.store.blocks.keys import Key


@dataclass(frozen=True)
class TierNamespace:
    """What a tier must know about a namespace: its name, the size of its pages, and the manifest
    that people read. `manifest_json` is always the same for one fingerprint."""

    fingerprint: bytes
    page_bytes: int
    manifest_json: bytes


class ReadStatus(Enum):
    HIT = "hit"
    ABSENT = "absent"
    CORRUPT = "corrupt"
    IO_ERROR = "io_error"


@dataclass(frozen=True)
class PageRead:
    """`detail` says for people what was wrong; empty for HIT and ABSENT."""

    status: ReadStatus
    detail: str = ""


HIT = PageRead(ReadStatus.HIT)
ABSENT = PageRead(ReadStatus.ABSENT)


@dataclass(frozen=True)
class Staged:
    """A complete page that nobody can see yet. `ticket` is the tier's own name for it."""

    namespace: TierNamespace
    key: Key
    ticket: str


class Chore(ABC):
    """Work that goes on beside all calls, in a thread of its own that gives way to everybody. It
    may hang in storage for good, and nobody waits for it."""

    name: str

    @abstractmethod
    def run(self, on_removed: Callable[[list[Key]], None]) -> None:
        """Until `stop`. `on_removed` is told, in this thread, the pages that it took out of
        storage."""

    @abstractmethod
    def stop(self) -> None:
        """From any thread."""

    @abstractmethod
    def counters(self) -> dict[str, int]:
        """Numbers for people, by the names of the node cache's counters. From any thread."""


class Tier(ABC):
    """See the module's text for threads, ownership and errors.

    Pages are buffers of exactly `padded_bytes(page_bytes)` bytes that start on a 4096-byte
    boundary in memory, so that O_DIRECT can be used on them. The padding is written as zeros.

    Storage may have parts that hang or fail each by itself: its lanes. A call about keys of one
    lane waits for that lane only; `open_namespace` and `read_manifest` wait for all of them.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The label of its metrics, one of those that `ucm/metrics.py` has for `tier`."""

    @property
    def lanes(self) -> Sequence[str]:
        """Their names for people. Always as many; none where there is no storage (`NoTier`)."""
        return ("storage",)

    @property
    def is_by_request(self) -> bool:
        """Whether each page costs a request, however many one call is about. Who has many asks for
        them one by one: a call that goes through 64 takes as long as 64, which looks as if storage
        hung."""
        return False

    @property
    def publishes_abreast(self) -> bool:
        """Whether it is `publish` that takes the time, so that pages of one prompt are published
        side by side. Then others may see one before those before it."""
        return False

    def lane_of(self, key: Key) -> int:
        """Where `key` lies, as far as is known now. Asks no storage, and never raises."""
        return 0

    def open_lane(self, namespace: TierNamespace, lane: int) -> None:
        """`open_namespace` in one lane."""
        self.open_namespace(namespace)

    def read_manifest_in(self, lane: int, fingerprint: bytes) -> bytes | None:
        """`read_manifest` in one lane."""
        return self.read_manifest(fingerprint)

    def unknown_lanes(self) -> Sequence[int]:
        """Those that were never reached so that it isn't known what belongs there: what is read is
        right without them, and nothing can be written. Asks no storage, and never raises."""
        return ()

    def look_for_lane(self, lane: int) -> None:  # noqa: B027 few need it
        """Tries to reach a lane that is unknown. Raises TierError when storage can't tell."""

    def check_room(self, namespace: TierNamespace, lane: int) -> None:  # noqa: B027 few need it
        """Raises TierError if it can be known without writing that no page would be taken now."""

    def chores(self) -> Sequence[Chore]:
        """What it wants done in the background. Asked for once."""
        return ()

    def asked(self, keys: Sequence[Key]) -> None:  # noqa: B027 few need it
        """Somebody asks for a prompt of these blocks, in its order, whether they are there or not.
        Asks no storage, and never raises."""

    def touch(self, namespace: TierNamespace, keys: Sequence[Key]) -> None:  # noqa: B027 few need it
        """These pages are used, and are to be kept longer than others. Never raises."""

    @abstractmethod
    def open_namespace(self, namespace: TierNamespace) -> None:
        """Makes the namespace known to people and tools: its manifest is written unless it is
        there. May be repeated. No error on storage that is mounted read-only.

        Raises TierError if the manifest that is there differs, or if storage fails.
        """

    @abstractmethod
    def contains(self, namespace: TierNamespace, keys: Sequence[Key]) -> int:
        """Number of leading keys that are present.

        A page that is there but damaged may be counted: `read` decides. Where this node may
        remember absences that have ended, the first missing key is asked for as `contains_now`
        does. Raises TierError when storage can't tell.
        """

    def contains_now(self, namespace: TierNamespace, key: Key) -> bool:
        """`contains` of one key that another node may have stored just now: past whatever this
        node remembers of a name that was not there. Costs more."""
        return self.contains(namespace, [key]) == 1

    def leads_to(self, namespace: TierNamespace, keys: Sequence[Key], *, now: bool = False) -> int:
        """`contains`, or with `now` `contains_now`, for somebody who reads what is counted: `keys`
        follow each other in a prompt. Where every question is a request, one that is there may
        stand for those between the first and it, because the pages of a prompt are written in its
        order, or nearly so: reading tells where that is wrong. The first is always asked for."""
        if not now:
            return self.contains(namespace, keys)
        for i, key in enumerate(keys):
            if not self.contains_now(namespace, key):
                return i
        return len(keys)

    def doubt(self, namespace: TierNamespace, key: Key) -> None:  # noqa: B027 few need it
        """A key that was promised long ago is still not there: makes this node and others give up
        what they may remember of its absence. Changes nothing that is stored, and never raises."""

    def holds(self, namespace: TierNamespace, key: Key) -> bool:
        """Whether the page is there now, as far as its size and its header tell: what `flush`
        promises. Past whatever this node remembers. Raises TierError when storage can't tell."""
        return self.contains_now(namespace, key)

    @abstractmethod
    def read_manifest(self, fingerprint: bytes) -> bytes | None:
        """The manifest of a namespace that somebody has opened here; None if nobody has. Raises
        TierError when storage can't tell."""

    @abstractmethod
    def read(self, namespace: TierNamespace, key: Key, page: memoryview) -> PageRead:
        """Fills the writable `page`. HIT only if every byte has been verified; after any other
        result the contents of `page` are undefined.

        A damaged page is moved out of the way, so that the next writer can replace it. Never
        raises for anything that storage does.
        """

    def read_all(
        self, namespace: TierNamespace, keys: Sequence[Key], pages: Sequence[memoryview]
    ) -> list[PageRead]:
        """`read` for each, one after the other: one hand-over to an I/O thread for small pages."""
        return [self.read(namespace, key, page) for key, page in zip(keys, pages, strict=True)]

    @abstractmethod
    def stage(
        self, namespace: TierNamespace, key: Key, page: memoryview, *, num_tokens: int
    ) -> Staged | None:
        """Readies `page` for `publish`, so that nothing but becoming visible is left to do where
        storage can do that. None: the key is already there, nothing to do. Two writers may stage
        one key; the last to publish wins.

        Raises TierError; nothing is left behind then. The caller owes every Staged a `publish`
        or a `discard`.
        """

    @abstractmethod
    def publish(self, staged: Staged) -> None:
        """Makes the page visible at once and as a whole. Spends `staged`, also when it raises
        TierError: nothing is left behind then."""

    @abstractmethod
    def discard(self, staged: Staged) -> None:
        """Removes what was staged. Never raises; may be repeated, also after `publish`."""

    @abstractmethod
    def close(self) -> None:
        """Gives back what the tier holds in this process. May be repeated; no other call after."""


def held_of(tier: Tier, namespace: TierNamespace, keys: Sequence[Key]) -> list[bool]:
    """Which of `keys` storage holds, each by itself."""
    return [tier.holds(namespace, key) for key in keys]


def leading_by_order(count: int, is_there: Callable[[int], bool]) -> int:
    """How many of `count` are there, if each that is there but the first stands for those before
    it. The last is asked for next: mostly either all are there, or not even the first."""
    if not count or not is_there(0):
        return 0
    last_there, first_absent, i = 0, count, count - 1
    while first_absent - last_there > 1:
        if is_there(i):
            last_there = i
        else:
            first_absent = i
        i = (last_there + first_absent) // 2
    return last_there + 1


class NoTier(Tier):
    """No storage: the node cache's memory is all there is. It has no lane, so nobody asks it."""

    name = ""
    lanes = ()

    def open_namespace(self, namespace: TierNamespace) -> None:
        pass

    def contains(self, namespace: TierNamespace, keys: Sequence[Key]) -> int:
        return 0

    def read_manifest(self, fingerprint: bytes) -> bytes | None:
        return None

    def read(self, namespace: TierNamespace, key: Key, page: memoryview) -> PageRead:
        return ABSENT

    def stage(
        self, namespace: TierNamespace, key: Key, page: memoryview, *, num_tokens: int
    ) -> Staged | None:
        raise AssertionError("nobody writes where there is no lane")

    def publish(self, staged: Staged) -> None:
        raise AssertionError("nobody writes where there is no lane")

    def discard(self, staged: Staged) -> None:
        pass

    def close(self) -> None:
        pass
