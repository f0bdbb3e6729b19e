"""The shared-filesystem tier: one file per page, on directories that every node mounts.

Invariants:
* A file under a block's name is complete or damaged, never in the making: it is written whole
  under a name of its own and then renamed. Whoever opened an older one keeps reading that.
* A block is served only if every byte of its file was verified in this very read.
* A damaged file leaves its place before its absence is reported, so the next dump can fill it.
* Nothing is fsynced: a block that a crash tears is found by its checksums, one that it loses is
  computed again.
* Nothing is written to, and nothing found in, what isn't the backend that was opened
  (lost_mount.py).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Sequence
from functools import partial

from ucm.errors import TierError
from ucm.store.blocks.blockfile import BlockId, write_block
from ucm.store.blocks.keys import Key
from ucm.store.blocks.page_key import PageKey
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.allowance import Allowance
from ucm.store.tiers.posix.backend import Backend, unlink_if_there
from ucm.store.tiers.posix.os_errors import is_gone, tier_error, translated, unless_gone
from ucm.store.tiers.posix.page_files import PageFiles
from ucm.store.tiers.posix.page_times import PageTimes
from ucm.store.tiers.posix.placement import Placement, for_all, unless_read_only
from ucm.store.tiers.posix.presence import LOOKING_UP, Presence
from ucm.store.tiers.posix.quarantine import Quarantine
from ucm.store.tiers.posix.reclaim import Reclaimer
from ucm.store.tiers.posix.rights import UMASK_DECIDES, FileRights, check_may_write
from ucm.store.tiers.posix.space import NONE_FREE, FreeSpace, SpaceReserve
from ucm.store.tiers.tier import (
    ABSENT,
    Chore,
    PageRead,
    ReadStatus,
    Staged,
    Tier,
    TierNamespace,
)

# A directory may be removed, empty as it is, between being made and being used.
_MAX_DIRECTORY_TRIES = 3


class PosixTier(Tier):
    """Does no I/O before the first call, keeps no file open between calls, and starts no thread but
    for a moment after a page for NFS (retouch.py)."""

    def __init__(
        self,
        storage_backends: Sequence[str],
        *,
        direct_io: bool = False,
        free: FreeSpace = NONE_FREE,
        quarantine_per_minute: int = 6,
        page_key: PageKey | None = None,
        rights: FileRights = UMASK_DECIDES,
    ) -> None:
        assert storage_backends
        self._page_key = page_key
        self._backends = [
            Backend(path, direct_io=direct_io, page_key=page_key, rights=rights)
            for path in storage_backends
        ]
        self._reserves = {backend: SpaceReserve(backend.path, free) for backend in self._backends}
        self._allowances = {
            backend: Allowance(backend.path, free.quotas, free.queue_pages)
            for backend in self._backends
        }
        self._rules = free.rules
        # Without a limit nobody looks at them.
        self._times = PageTimes() if free.quotas else None
        self._placement = Placement(self._backends)
        self._presence = Presence(self._placement)
        # With the generation of the backend: see Identity.
        self._has_manifest: set[tuple[Backend, int, bytes]] = set()
        self._files = PageFiles(page_key, Quarantine(quarantine_per_minute))

    @property
    def name(self) -> str:
        return "posix"

    def open_namespace(self, namespace: TierNamespace) -> None:
        error = for_all(range(len(self._backends)), partial(self.open_lane, namespace))
        if error is not None:
            raise error

    @property
    def lanes(self) -> Sequence[str]:
        return [backend.path for backend in self._backends]

    def lane_of(self, key: Key) -> int:
        return self._placement.lane_of(key)

    def unknown_lanes(self) -> Sequence[int]:
        return self._placement.unknown()

    def look_for_lane(self, lane: int) -> None:
        self._placement.look_for(lane)

    def open_lane(self, namespace: TierNamespace, lane: int) -> None:
        self._placement.open(lane)
        ensure = self._backends[lane].ensure_manifest
        unless_read_only(partial(ensure, namespace.fingerprint, namespace.manifest_json))

    def check_room(self, namespace: TierNamespace, lane: int) -> None:
        backend = self._backends[lane]
        # Of any key: all files are of one size.
        block = BlockId(Key(bytes(32)), namespace.fingerprint, namespace.page_bytes)
        with translated(backend.path, "can't be written"), unless_gone():
            check_may_write(backend.path)
            self._reserves[backend].check(block.file_bytes)

    def contains(self, namespace: TierNamespace, keys: Sequence[Key]) -> int:
        return self._presence.count(namespace, keys)

    def contains_now(self, namespace: TierNamespace, key: Key) -> bool:
        return self._presence.is_there_now(namespace, key)

    def leads_to(self, namespace: TierNamespace, keys: Sequence[Key], *, now: bool = False) -> int:
        """Where all are there two are asked for, where none is one. What is not seen is asked for
        past what this machine remembers in any case."""
        return self._presence.count_by_order(namespace, keys)

    def doubt(self, namespace: TierNamespace, key: Key) -> None:
        self._presence.doubt(namespace, key)

    def holds(self, namespace: TierNamespace, key: Key) -> bool:
        backend = self._placement.of(key)
        if backend is None:
            return False
        backend.identity.check()
        if not self.contains_now(namespace, key):
            return False
        path = backend.block_path(namespace.fingerprint, key)
        block = BlockId(key, namespace.fingerprint, namespace.page_bytes)
        with translated(path, LOOKING_UP):
            return self._files.is_whole(path, backend, block)

    def read_manifest(self, fingerprint: bytes) -> bytes | None:
        found = (self.read_manifest_in(lane, fingerprint) for lane in range(len(self._backends)))
        return next((manifest for manifest in found if manifest is not None), None)

    def read_manifest_in(self, lane: int, fingerprint: bytes) -> bytes | None:
        backend = self._backends[lane]
        return backend.read_manifest(fingerprint) if backend.identity.is_here() else None

    def read(self, namespace: TierNamespace, key: Key, page: memoryview) -> PageRead:
        return self._read(namespace, key, page, {})

    def read_all(
        self, namespace: TierNamespace, keys: Sequence[Key], pages: Sequence[memoryview]
    ) -> list[PageRead]:
        """One look at the id of each backend for all of them: for small pages it costs."""
        are_here: dict[Backend, bool] = {}
        return [
            self._read(namespace, key, page, are_here)
            for key, page in zip(keys, pages, strict=True)
        ]

    def _read(
        self, namespace: TierNamespace, key: Key, page: memoryview, are_here: dict[Backend, bool]
    ) -> PageRead:
        """`are_here`: the backends that this call has looked at."""
        try:
            backend = self._placement.of(key)
            if backend is None:
                return ABSENT
            if backend not in are_here:
                are_here[backend] = backend.identity.is_here()
            if not are_here[backend]:
                return ABSENT
        except TierError as error:
            return PageRead(ReadStatus.IO_ERROR, str(error))
        block = BlockId(key, namespace.fingerprint, namespace.page_bytes)
        path = backend.block_path(namespace.fingerprint, key)
        read = partial(self._files.read, backend, path, block, page)
        try:
            try:
                return backend.try_direct(read)
            except OSError as error:
                if error.errno == errno.ENOENT or not is_gone(error):
                    raise
                # Another node has replaced the file: what has the name now may be read.
                return backend.try_direct(read)
        except OSError as error:
            if is_gone(error):
                return self._read_unseen(namespace, key, backend, read)
            return PageRead(ReadStatus.IO_ERROR, str(tier_error(path, "can't be read", error)))

    def _read_unseen(
        self,
        namespace: TierNamespace,
        key: Key,
        backend: Backend,
        read: Callable[[int], PageRead],
    ) -> PageRead:
        """A page that a later one stood for was never asked for by itself, and this machine may
        still remember that it was missing."""
        try:
            is_there = self._presence.is_there_unseen(namespace, key)
            return backend.try_direct(read) if is_there else ABSENT
        except TierError as error:
            return PageRead(ReadStatus.IO_ERROR, str(error))
        except OSError as error:
            if is_gone(error):
                return ABSENT
            path = backend.block_path(namespace.fingerprint, key)
            return PageRead(ReadStatus.IO_ERROR, str(tier_error(path, "can't be read", error)))

    def stage(
        self, namespace: TierNamespace, key: Key, page: memoryview, *, num_tokens: int
    ) -> Staged | None:
        backend = self._placement.to_write(key)
        block = BlockId(key, namespace.fingerprint, namespace.page_bytes)
        target = backend.block_path(namespace.fingerprint, key)
        with translated(target, LOOKING_UP):
            if self._files.is_whole(target, backend, block):
                return None
        name = backend.namespace_name(namespace.fingerprint)
        allowance = self._allowances[backend]
        allowance.take(name, key, block.file_bytes, manifest=namespace.manifest_json)
        try:
            with translated(target, "can't be written"):
                self._reserves[backend].take(block.file_bytes)
                temp = self._write(backend, namespace, block, target, page, num_tokens)
        except TierError:
            allowance.give_back(name, key, block.file_bytes)
            raise
        allowance.landed(name, key, block.file_bytes)
        return Staged(namespace, key, temp)

    def publish(self, staged: Staged) -> None:
        target = paths.temp_target(staged.ticket)
        try:
            backend = self._placement.to_write(staged.key)
        except TierError:
            self.discard(staged)
            raise
        with translated(target, "can't be published"):
            try:
                # Where the mount has gone just now, what was staged has gone with it.
                os.rename(staged.ticket, target)
            except OSError as error:
                # An NFS client repeats a rename whose answer was lost, and then finds nothing to
                # rename: what counts is that a file is there.
                if error.errno != errno.ENOENT or not os.path.exists(target):
                    self.discard(staged)
                    raise
        backend.changed(os.path.dirname(target))

    def discard(self, staged: Staged) -> None:
        """What it took of a limit counts as written until the store is counted anew."""
        unlink_if_there(staged.ticket)

    def chores(self) -> Sequence[Chore]:
        return [
            Reclaimer(backend, allowance, self._rules)
            for backend, allowance in self._allowances.items()
            if allowance.quotas
        ]

    def asked(self, keys: Sequence[Key]) -> None:
        if self._times is not None:
            self._times.asked(keys)

    def touch(self, namespace: TierNamespace, keys: Sequence[Key]) -> None:
        for key in keys:
            with contextlib.suppress(TierError, OSError):
                backend = self._placement.of(key)
                if self._times and backend is not None and backend.identity.is_here():
                    self._times.touch(backend.block_path(namespace.fingerprint, key), key)

    def close(self) -> None:
        """Nothing is held; scratch buffers go with their threads."""

    def _ensure_manifest(self, backend: Backend, namespace: TierNamespace) -> None:
        """Before every block, so that none lies in a directory that nobody can explain."""
        known = backend, backend.identity.generation, namespace.fingerprint
        if known not in self._has_manifest:
            backend.ensure_manifest(namespace.fingerprint, namespace.manifest_json)
            self._has_manifest.add(known)

    def _write(
        self,
        backend: Backend,
        namespace: TierNamespace,
        block: BlockId,
        target: str,
        page: memoryview,
        num_tokens: int,
    ) -> str:
        """Writes a temporary file for `target`, making its directories. Returns its path."""
        scratch, page_key = self._files.scratch(), self._page_key

        def write(flags: int) -> str:
            temp = paths.temp_path(target)
            try:
                fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags, 0o666)
                try:
                    backend.rights.give_file(fd)
                    write_block(
                        fd, block, page, num_tokens=num_tokens, scratch=scratch, page_key=page_key
                    )
                    if self._times is not None:
                        self._times.give_first(fd, block.key)
                finally:
                    os.close(fd)  # NFS says only here that the disk is full
            except OSError:
                # Also when open failed: the file is made before O_DIRECT is refused.
                unlink_if_there(temp)
                raise
            return temp

        for _ in range(_MAX_DIRECTORY_TRIES):
            self._ensure_manifest(backend, namespace)
            try:
                backend.make_dirs(os.path.dirname(target))
                return backend.try_direct(write)
            except OSError as error:
                if not is_gone(error):
                    raise
                # The sweep has removed an empty directory; or the store was emptied under us, and
                # its manifest with it.
                known = backend, backend.identity.generation, namespace.fingerprint
                self._has_manifest.discard(known)
                backend.forget_dirs()
        return backend.try_direct(write)
