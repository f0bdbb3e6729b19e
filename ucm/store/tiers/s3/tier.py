"""The object tier: one object per page, with the bytes that the page's file would have.

Invariants:
* An object under a page's name is complete or damaged: one PUT makes it, and replaces an older one
  as a whole. Staging makes nothing that others see; publishing is the PUT.
* A page is served only if every byte of its object was verified in this very read.
* A damaged object leaves its place before its absence is reported, so the next dump can fill it.
* No request depends on a condition, which some servers ignore, and none lists.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence

from ucm.errors import TierError
from ucm.outcome import Outcome
from ucm.store.blocks.block_bytes import (
    block_header,
    block_parts,
    check_head,
    key_id_of,
    take_page,
)
from ucm.store.blocks.blockfile import HEADER_BYTES, BlockId
from ucm.store.blocks.keys import Key
from ucm.store.blocks.page_key import PageKey
from ucm.store.blocks.page_names import MAX_MANIFEST_BYTES
from ucm.store.tiers.per_minute import PerMinute
from ucm.store.tiers.s3.bucket import Bucket, Got
from ucm.store.tiers.s3.names import Names
from ucm.store.tiers.s3.quarantine import move_aside
from ucm.store.tiers.tier import (
    ABSENT,
    HIT,
    PageRead,
    ReadStatus,
    Staged,
    Tier,
    TierNamespace,
    leading_by_order,
)


class S3Tier(Tier):
    """Does no I/O before the first call. A page that is staged is read when it is published: until
    then only its header is held here."""

    def __init__(
        self,
        bucket: Bucket,
        *,
        place: str,
        prefix: str = "",
        quarantine_per_minute: int = 6,
        page_key: PageKey | None = None,
    ) -> None:
        """`place` says for people where the objects lie."""
        self._bucket = bucket
        self._place = place
        self._page_key = page_key
        self._names = Names(prefix, page_key.id if page_key is not None else b"")
        self._moves = PerMinute(quarantine_per_minute)
        self._lock = threading.Lock()
        self._tickets = itertools.count()
        self._staged: dict[str, tuple[bytes, memoryview]] = {}
        self._has_manifest: set[bytes] = set()

    @property
    def name(self) -> str:
        return "s3"

    @property
    def lanes(self) -> Sequence[str]:
        return (self._place,)

    @property
    def is_by_request(self) -> bool:
        return True

    @property
    def publishes_abreast(self) -> bool:
        return True

    def open_namespace(self, namespace: TierNamespace) -> None:
        name = self._names.manifest(namespace.fingerprint)
        found = self._bucket.get(name, most_bytes=MAX_MANIFEST_BYTES)
        if found is None:
            # Whoever else writes it now writes the same.
            self._bucket.put_if_allowed(name, namespace.manifest_json)
        elif bytes(found.content) != namespace.manifest_json:
            raise TierError(
                f"{self._place}: {name}: differs from the manifest of this namespace; move it away",
                reason=Outcome.CORRUPT,
            )
        self._has_manifest.add(namespace.fingerprint)

    def contains(self, namespace: TierNamespace, keys: Sequence[Key]) -> int:
        for i, key in enumerate(keys):
            if self._bucket.tag(self._names.page(namespace.fingerprint, key)) is None:
                return i
        return len(keys)

    def leads_to(self, namespace: TierNamespace, keys: Sequence[Key], *, now: bool = False) -> int:
        """Two requests where all are there, one where none is."""

        def is_there(i: int) -> bool:
            return self.contains(namespace, keys[i : i + 1]) == 1

        return leading_by_order(len(keys), is_there)

    def holds(self, namespace: TierNamespace, key: Key) -> bool:
        head = self._bucket.get_head(self._names.page(namespace.fingerprint, key), HEADER_BYTES)
        if head is None:
            return False
        try:
            block = BlockId(key, namespace.fingerprint, namespace.page_bytes)
            check_head(head.content, head.size_bytes, block, key_id=key_id_of(self._page_key))
        except TierError:
            return False
        return True

    def read_manifest(self, fingerprint: bytes) -> bytes | None:
        name = self._names.manifest(fingerprint)
        found = self._bucket.get(name, most_bytes=MAX_MANIFEST_BYTES)
        return None if found is None else bytes(found.content)

    def read(self, namespace: TierNamespace, key: Key, page: memoryview) -> PageRead:
        block = BlockId(key, namespace.fingerprint, namespace.page_bytes)
        name = self._names.page(namespace.fingerprint, key)
        try:
            found = self._bucket.get(name, most_bytes=block.file_bytes)
            if found is None:
                return ABSENT
            bad = self._take(found, block, page)
            if bad is None:
                return HIT
            # Is it the object that is damaged, or what came of it?
            found = self._bucket.get(name, most_bytes=block.file_bytes)
            if found is None:
                return ABSENT
            again = self._take(found, block, page)
        except TierError as error:
            return PageRead(ReadStatus.IO_ERROR, str(error))
        where = f"{self._place}: {name}"
        if again is None:
            return PageRead(ReadStatus.HIT, f"{where}: {bad}; right when it was read once more")
        return PageRead(
            ReadStatus.CORRUPT, f"{where}: {again}; {self._move_aside(name, block, found)}"
        )

    def stage(
        self, namespace: TierNamespace, key: Key, page: memoryview, *, num_tokens: int
    ) -> Staged | None:
        if self.holds(namespace, key):
            return None
        if namespace.fingerprint not in self._has_manifest:
            # Before every page, so that none lies where nobody can explain it.
            self.open_namespace(namespace)
        block = BlockId(key, namespace.fingerprint, namespace.page_bytes)
        header = block_header(block, page, num_tokens=num_tokens, page_key=self._page_key)
        with self._lock:
            ticket = str(next(self._tickets))
            self._staged[ticket] = header, page
        return Staged(namespace, key, ticket)

    def publish(self, staged: Staged) -> None:
        namespace = staged.namespace
        name = self._names.page(namespace.fingerprint, staged.key)
        with self._lock:
            found = self._staged.pop(staged.ticket, None)
        if found is None:
            raise TierError(f"{self._place}: {name}: not staged any more", reason=Outcome.IO_ERROR)
        header, page = found
        block = BlockId(staged.key, namespace.fingerprint, namespace.page_bytes)
        self._bucket.put(name, block_parts(block, header, page))

    def discard(self, staged: Staged) -> None:
        with self._lock:
            self._staged.pop(staged.ticket, None)

    def close(self) -> None:
        with self._lock:
            self._staged.clear()

    def _take(self, found: Got, block: BlockId, page: memoryview) -> TierError | None:
        """What is wrong with it."""
        try:
            if found.size_bytes > block.file_bytes:
                check_head(found.content, found.size_bytes, block)
            take_page(found.content, block, page, page_key=self._page_key)
        except TierError as bad:
            return bad
        return None

    def _move_aside(self, name: str, block: BlockId, found: Got) -> str:
        """Returns what was done, for people."""
        if not self._moves.may():
            return (
                f"left in its place: {self._moves.most} objects were moved aside within a minute, "
                f"so it may be this node that reads badly; look at its memory and network"
            )
        to = self._names.quarantine(block.fingerprint, block.key)
        return move_aside(self._bucket, name, to, found.tag)
