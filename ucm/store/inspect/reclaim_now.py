"""Frees room in one storage backend at once, as a node cache's reclaim would: by its rules, under
its lease. Or tells what would go."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from ucm.errors import UcmError
from ucm.store.blocks.keys import Key
from ucm.store.inspect.signs_of_life import LOOKED
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.filesystem_clock import FilesystemClock
from ucm.store.tiers.posix.lease import ReclaimLease, holder_in
from ucm.store.tiers.posix.os_errors import READ_ONLY_ERRNOS, translated
from ucm.store.tiers.posix.plain_files import NotPlain
from ucm.store.tiers.posix.reclaim_plan import WHOLE, Want, limit_of_pages
from ucm.store.tiers.posix.reclaim_record_files import ReclaimRecorder
from ucm.store.tiers.posix.reclaim_run import Reclaimed, ReclaimRun, ReclaimStopped
from ucm.store.tiers.posix.rights import UMASK_DECIDES, FileRights
from ucm.store.tiers.posix.small_files import read_small
from ucm.store.tiers.posix.stored_count import count_stored

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_BEAT_S = 5.0
_STALE_S = 60.0
# A little more of each pool than its part, as some of it is too young to go.
_SPARE = 1.25


@dataclass(frozen=True)
class ReclaimOrder:
    """What is wanted of a backend. `free_bytes` is None for what is above `keep_bytes`. With
    `is_dry` nothing is changed; with `is_forced` no lease is waited for or taken."""

    free_bytes: int | None = None
    keep_bytes: int = 0
    grace_s: float = 120.0
    is_dry: bool = False
    is_forced: bool = False
    rights: FileRights = UMASK_DECIDES


@dataclass(frozen=True)
class ReclaimedNow:
    """Of `backend`: what it held (an estimate, `error` is its standard error as a share), what was
    wanted, and what went, or would go. Where that is not enough, `num_kept` pages stay, `num_young`
    of them within the grace period. `is_own_clock`: ages are by this machine's clock, as nothing
    may be written there. `problem`: what could not be deleted, for people."""

    backend: str
    stored_bytes: int
    error: float
    wanted_bytes: int
    freed_bytes: int
    num_files: int
    seconds: float
    is_enough: bool
    num_kept: int
    num_young: int
    is_own_clock: bool
    problem: str


@dataclass
class _Keeper:
    """Beats for the lease between two steps. Without one there is nothing to do."""

    root: int
    lease: ReclaimLease | None
    beaten_s: float = field(default_factory=time.monotonic)

    def keep(self, keys: list[Key], freed: Mapping[str, int]) -> None:
        sys.audit(LOOKED)
        if self.lease is not None and time.monotonic() - self.beaten_s > _BEAT_S:
            self.beaten_s = time.monotonic()
            if not self.lease.hold(self.root):
                raise ReclaimStopped


def reclaim_now(backend: str, order: ReclaimOrder) -> ReclaimedNow:
    """Raises TierError, and UcmError where somebody else reclaims this backend."""
    with translated(backend, "can't be reclaimed"):
        root = os.open(backend, _DIRECTORY)
        try:
            if order.is_dry or order.is_forced:
                return _reclaim(root, backend, order, None)
            lease = ReclaimLease(_STALE_S, _BEAT_S, rights=order.rights)
            if not lease.hold(root):
                raise UcmError(
                    f"{backend}: {holder_in(read_small(root, paths.RECLAIM_LEASE))} reclaims it, "
                    f"one at a time does: lower its limit (posix_capacity_gb), or say --force"
                )
            try:
                return _reclaim(root, backend, order, lease)
            finally:
                lease.release(root)
        except NotPlain as error:
            raise UcmError(f"{backend}/{error}") from error
        finally:
            os.close(root)


def _reclaim(
    root: int, backend: str, order: ReclaimOrder, lease: ReclaimLease | None
) -> ReclaimedNow:
    keeper = _Keeper(root, lease)
    clock = _clock(root)
    count = count_stored(root, clock.now_ns, lambda: keeper.keep([], {}))
    stored_bytes = count.nbytes[WHOLE]
    wanted_bytes = order.free_bytes
    pages_bytes = stored_bytes - count.other_bytes[WHOLE]
    if wanted_bytes is None:
        most_bytes = limit_of_pages(order.keep_bytes, count.other_bytes[WHOLE])
        wanted_bytes = max(0, pages_bytes - most_bytes)
    done = Reclaimed(is_enough=True)
    if wanted_bytes:
        share = min(1.0, _SPARE * wanted_bytes / max(1, pages_bytes))
        recorder = None if order.is_dry else ReclaimRecorder(order.rights)
        run = ReclaimRun(
            backend,
            order.grace_s,
            clock.now_ns,
            keeper.keep,
            recorder,
            tick=lambda: keeper.keep([], {}),
        )
        done = run.run(root, {WHOLE: Want(wanted_bytes, share)})
    return ReclaimedNow(
        backend,
        stored_bytes,
        count.error,
        wanted_bytes,
        done.nbytes.total(),
        done.files.total(),
        done.seconds,
        done.is_enough,
        done.num_kept,
        done.num_young,
        not clock.is_known,
        done.problem,
    )


def _clock(root: int) -> FilesystemClock:
    """That of the files, which is what a grace period is measured by. This machine's where nothing
    may be written. Raises OSError."""
    clock = FilesystemClock()
    try:
        clock.ask(root)
    except OSError as error:
        if error.errno not in READ_ONLY_ERRNOS:
            raise
    return clock
