"""A node that writes into a store with limits, and reclaims it in a thread of its own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from tests.store.tiers.tier_contract import dump, make_key, make_page
from ucm.errors import TierError
from ucm.store.blocks.keys import KEY_BYTES, Key, salt_tag
from ucm.store.tiers.posix.quotas import quotas_of
from ucm.store.tiers.posix.reclaim_plan import ReclaimRules
from ucm.store.tiers.posix.space import FreeSpace
from ucm.store.tiers.posix.tier import PosixTier
from ucm.store.tiers.tier import Chore, TierNamespace

GIB = 1 << 30
MIB = 1 << 20
# Nothing is too young, and much happens in a second.
RULES = ReclaimRules(grace_s=0.0, check_s=0.5, heartbeat_s=0.2, stale_s=2.0)
PATIENCE_S = 30.0


def limited_tier(
    store: Path,
    *,
    limit_bytes: int = 0,
    quota_bytes: Mapping[str, int] | None = None,
    queue_pages: int = 8,
    rules: ReclaimRules = RULES,
) -> PosixTier:
    quotas = {name: nbytes / GIB for name, nbytes in (quota_bytes or {}).items()}
    return PosixTier(
        [str(store)],
        free=FreeSpace(
            queue_pages=queue_pages,
            quotas=quotas_of(limit_bytes / GIB, quotas, num_backends=1),
            rules=rules,
        ),
    )


class Reclaiming:
    """The chores of a tier, each in its thread. `removed` are the keys that went."""

    def __init__(self, tier: PosixTier) -> None:
        self.chores: list[Chore] = list(tier.chores())
        self.removed: set[Key] = set()
        self.threads = [
            threading.Thread(target=chore.run, args=[self.removed.update], daemon=True)
            for chore in self.chores
        ]
        for thread in self.threads:
            thread.start()

    def __getitem__(self, counter: str) -> int:
        return sum(chore.counters().get(counter, 0) for chore in self.chores)

    def stop(self) -> None:
        for chore in self.chores:
            chore.stop()
        for thread in self.threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


@contextmanager
def reclaiming(tier: PosixTier) -> Iterator[Reclaiming]:
    threads = Reclaiming(tier)
    try:
        yield threads
    finally:
        threads.stop()


def until(is_so: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.01)


def disk_bytes(directory: Path) -> int:
    """What files below it take on the disk."""
    total = 0
    for path, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
    return total


def write(tier: PosixTier, namespace: TierNamespace, number: int, *, salt: str = "") -> bool:
    """False if there is no room for it now."""
    tag = salt_tag(salt) if salt else b""
    key = Key(make_key(number)[: KEY_BYTES - len(tag)] + tag)
    try:
        dump(tier, namespace, key, make_page(namespace, "a"))
    except TierError as error:
        if error.reason != "full":
            raise
        return False
    return True


def patient(rules: ReclaimRules = RULES, **changes: float) -> ReclaimRules:
    return replace(rules, **changes)  # type: ignore[arg-type]


def write_many(write_one: Callable[[int], bool], num_pages: int) -> int:
    """Numbers from 1000 on, until so many were written. Returns how many were refused."""
    refused = written = number = 0
    deadline_s = time.monotonic() + 60
    while written < num_pages:
        assert time.monotonic() < deadline_s, f"{written} written, {refused} refused"
        if write_one(1000 + number):
            written += 1
            number += 1
        else:
            refused += 1
            time.sleep(0.002)
    return refused


def stored(store: Path, fingerprint: bytes) -> set[str]:
    return {path.name for path in (store / fingerprint.hex()).rglob("*.kv")}


def until_full(tier: PosixTier, namespace: TierNamespace, store: Path, node: Reclaiming) -> None:
    """Writes until the node, which has the lease, has no room for more."""
    until(
        lambda: (
            not write(tier, namespace, len(stored(store, namespace.fingerprint)))
            and node["reclaim_leases"]
        ),
        "full",
    )
