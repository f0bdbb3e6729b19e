"""Promised pages that are there and can't be seen: their absence is doubted, and not too often."""

from __future__ import annotations

from itertools import pairwise

from tests.parts.node import Node, key
from tests.store.tiers.memory_tier import MemoryTier
from ucm.store.blocks.keys import Key
from ucm.store.node.promised_pages import FIRST_DOUBT_S, LAST_DOUBT_S
from ucm.store.tiers.tier import TierNamespace

KEYS = [key(i) for i in range(20)]


class BlindTier(MemoryTier):
    """Sees nothing of what is there until it is doubted."""

    def __init__(self) -> None:
        super().__init__()
        self.doubted: list[Key] = []

    def contains_now(self, namespace: TierNamespace, key: Key) -> bool:
        return bool(self.doubted) and super().contains_now(namespace, key)

    def doubt(self, namespace: TierNamespace, key: Key) -> None:
        self.doubted.append(key)


def test_what_is_not_seen_for_long_is_doubted_ever_more_seldom() -> None:
    """A page that came in the same tick as a look stays invisible on NFS until its folder changes
    again: without a doubt it would be late, however long it has been there."""
    node = Node(tier=BlindTier())
    tier = node.tier
    node.expect(KEYS)
    node.reads.end_all()
    doubts_s: list[float] = []
    while len(doubts_s) < 6:
        known = len(tier.doubted)
        node.now_s += 0.05
        node.timers.fire()
        node.reads.end_all()
        if len(tier.doubted) > known:
            assert tier.doubted[known:] == [KEYS[0], KEYS[-1]]
            doubts_s.append(node.now_s)
    pauses_s = [round(b - a, 2) for a, b in pairwise(doubts_s)]
    assert pauses_s[0] >= FIRST_DOUBT_S
    assert pauses_s == sorted(pauses_s)
    # Looks come every 50 ms.
    assert LAST_DOUBT_S <= pauses_s[-1] <= LAST_DOUBT_S + 0.06

    node.store(*KEYS)
    node.timers.fire()
    node.reads.end_all()
    reply = node.reply()
    assert reply is not None and len(reply.offsets) == len(KEYS)


def test_what_comes_soon_is_never_doubted() -> None:
    """To doubt writes into storage."""
    node = Node(tier=BlindTier())
    node.expect(KEYS)
    for _ in range(3):
        node.reads.end_all()
        node.now_s += 0.05
        node.timers.fire()
    node.reads.end_all()
    assert node.tier.doubted == []
