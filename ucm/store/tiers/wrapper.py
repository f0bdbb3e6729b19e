"""A tier around another one: what goes for any tier (counting, logging, limits) subclasses it."""

from __future__ import annotations

from collections.abc import Sequence

from ucm.store.blocks.keys import Key
from ucm.store.tiers.tier import Chore, PageRead, Staged, Tier, TierNamespace


class WrapperTier(Tier):
    """Passes every call on, so that none of what the tier behind does better than `Tier` is hidden.
    A page that is read goes through `read_all`, which subclasses change for both."""

    def __init__(self, tier: Tier) -> None:
        self._tier = tier

    @property
    def name(self) -> str:
        return self._tier.name

    @property
    def lanes(self) -> Sequence[str]:
        return self._tier.lanes

    @property
    def is_by_request(self) -> bool:
        return self._tier.is_by_request

    @property
    def publishes_abreast(self) -> bool:
        return self._tier.publishes_abreast

    def lane_of(self, key: Key) -> int:
        return self._tier.lane_of(key)

    def open_lane(self, namespace: TierNamespace, lane: int) -> None:
        self._tier.open_lane(namespace, lane)

    def read_manifest_in(self, lane: int, fingerprint: bytes) -> bytes | None:
        return self._tier.read_manifest_in(lane, fingerprint)

    def unknown_lanes(self) -> Sequence[int]:
        return self._tier.unknown_lanes()

    def look_for_lane(self, lane: int) -> None:
        self._tier.look_for_lane(lane)

    def check_room(self, namespace: TierNamespace, lane: int) -> None:
        self._tier.check_room(namespace, lane)

    def chores(self) -> Sequence[Chore]:
        return self._tier.chores()

    def asked(self, keys: Sequence[Key]) -> None:
        self._tier.asked(keys)

    def touch(self, namespace: TierNamespace, keys: Sequence[Key]) -> None:
        self._tier.touch(namespace, keys)

    def open_namespace(self, namespace: TierNamespace) -> None:
        self._tier.open_namespace(namespace)

    def contains(self, namespace: TierNamespace, keys: Sequence[Key]) -> int:
        return self._tier.contains(namespace, keys)

    def contains_now(self, namespace: TierNamespace, key: Key) -> bool:
        return self._tier.contains_now(namespace, key)

    def leads_to(self, namespace: TierNamespace, keys: Sequence[Key], *, now: bool = False) -> int:
        return self._tier.leads_to(namespace, keys, now=now)

    def doubt(self, namespace: TierNamespace, key: Key) -> None:
        self._tier.doubt(namespace, key)

    def holds(self, namespace: TierNamespace, key: Key) -> bool:
        return self._tier.holds(namespace, key)

    def read_manifest(self, fingerprint: bytes) -> bytes | None:
        return self._tier.read_manifest(fingerprint)

    def read(self, namespace: TierNamespace, key: Key, page: memoryview) -> PageRead:
        (read,) = self.read_all(namespace, [key], [page])
        return read

    def read_all(
        self, namespace: TierNamespace, keys: Sequence[Key], pages: Sequence[memoryview]
    ) -> list[PageRead]:
        return self._tier.read_all(namespace, keys, pages)

    def stage(
        self, namespace: TierNamespace, key: Key, page: memoryview, *, num_tokens: int
    ) -> Staged | None:
        return self._tier.stage(namespace, key, page, num_tokens=num_tokens)

    def publish(self, staged: Staged) -> None:
        self._tier.publish(staged)

    def discard(self, staged: Staged) -> None:
        self._tier.discard(staged)

    def close(self) -> None:
        self._tier.close()
