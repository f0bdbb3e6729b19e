"""A tier in a dict: the reference that the contract is tried on, and storage that never fails."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence

from ucm.errors import TierError
from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key
from ucm.store.blocks.page_layout import PAGE_ALIGNMENT_BYTES, padded_bytes
from ucm.store.tiers.tier import ABSENT, HIT, PageRead, ReadStatus, Staged, Tier, TierNamespace

_ZEROS = bytes(PAGE_ALIGNMENT_BYTES)


class MemoryTier(Tier):
    """A tier in a dict: the reference for tests, and storage for those who want none.

    Unbounded. One lock guards both dicts; pages are copied outside of it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._manifests: dict[bytes, bytes] = {}
        self._pages: dict[tuple[bytes, Key], bytes] = {}
        self._staged: dict[str, bytes] = {}
        self._tickets = itertools.count()

    @property
    def name(self) -> str:
        return "memory"

    def open_namespace(self, namespace: TierNamespace) -> None:
        with self._lock:
            manifest = self._manifests.setdefault(namespace.fingerprint, namespace.manifest_json)
        if manifest != namespace.manifest_json:
            raise TierError(
                f"namespace {namespace.fingerprint.hex()}: another manifest is already there",
                reason=Outcome.CORRUPT,
            )

    def contains(self, namespace: TierNamespace, keys: Sequence[Key]) -> int:
        with self._lock:
            present = [(namespace.fingerprint, key) in self._pages for key in keys]
        return present.index(False) if False in present else len(present)

    def read_manifest(self, fingerprint: bytes) -> bytes | None:
        with self._lock:
            return self._manifests.get(fingerprint)

    def read(self, namespace: TierNamespace, key: Key, page: memoryview) -> PageRead:
        assert len(page) == padded_bytes(namespace.page_bytes)
        with self._lock:
            stored = self._pages.get((namespace.fingerprint, key))
        if stored is None:
            return ABSENT
        if len(stored) != namespace.page_bytes:
            with self._lock:
                self._pages.pop((namespace.fingerprint, key), None)
            return PageRead(
                ReadStatus.CORRUPT, f"{len(stored)} bytes, expected {namespace.page_bytes}"
            )
        page[: namespace.page_bytes] = stored
        page[namespace.page_bytes :] = _ZEROS[: len(page) - namespace.page_bytes]
        return HIT

    def stage(
        self, namespace: TierNamespace, key: Key, page: memoryview, *, num_tokens: int
    ) -> Staged | None:
        assert len(page) == padded_bytes(namespace.page_bytes)
        assert num_tokens > 0
        if self.contains(namespace, [key]):
            return None
        copy = bytes(page[: namespace.page_bytes])
        with self._lock:
            ticket = str(next(self._tickets))
            self._staged[ticket] = copy
        return Staged(namespace, key, ticket)

    def publish(self, staged: Staged) -> None:
        with self._lock:
            page = self._staged.pop(staged.ticket, None)
            if page is not None:
                self._pages[staged.namespace.fingerprint, staged.key] = page
        if page is None:
            raise TierError(f"key {staged.key.hex()}: not staged any more", reason=Outcome.IO_ERROR)

    def discard(self, staged: Staged) -> None:
        with self._lock:
            self._staged.pop(staged.ticket, None)

    def close(self) -> None:
        with self._lock:
            self._pages.clear()
            self._staged.clear()
