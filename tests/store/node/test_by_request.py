"""Storage where each page is a request: one call is about one page, so that none takes as long as
many, and is taken for one that hangs."""

from __future__ import annotations

from collections.abc import Sequence
from math import log2
from typing import Any, cast

import pytest

from tests.parts.node import NAMESPACE, Node, key
from tests.store.tiers.memory_tier import MemoryTier
from ucm.store.blocks.keys import Key
from ucm.store.tiers.metered import MeasuredTier
from ucm.store.tiers.s3.tier import S3Tier

KEYS = [key(i) for i in range(40)]
RECHECK_S = 10.0


class RequestTier(MemoryTier):
    is_by_request = True


def keys_of(node: Node) -> list[Sequence[Key]]:
    """What each call that waits for a thread is about."""
    asked = []
    for call, _, _ in node.reads.jobs:
        lists = [each for each in cast(Any, call).args if isinstance(each, list)]
        asked.append(cast(Sequence[Key], lists[0]))
    return asked


def dumped(tier: MemoryTier) -> Node:
    """A node that has all pages in memory and in storage, and has last seen them there long ago."""
    node = Node(tier=tier)
    for i, each in enumerate(KEYS):
        node.reserve(each)
        node.commit(each, parent=KEYS[i - 1] if i else b"")
    node.writes.end_all()
    node.now_s += RECHECK_S + 1
    return node


def test_objects_in_a_bucket_are_requests_also_where_they_are_counted() -> None:
    tier = S3Tier(cast(Any, None), place="somewhere")

    assert tier.is_by_request and MeasuredTier(tier).is_by_request


@pytest.mark.parametrize(("tier", "is_grouped"), [(MemoryTier(), True), (RequestTier(), False)])
def test_small_pages_are_read_one_by_one(tier: MemoryTier, is_grouped: bool) -> None:
    node = Node(tier=tier)
    node.store(*KEYS)
    node.look_up(KEYS, number=1)
    sizes = []
    while node.reads.jobs:
        sizes += [
            len(keys) for keys in keys_of(node)[-1:] if "read_all" in str(node.reads.jobs[-1])
        ]
        node.reads.end(-1)

    assert (max(sizes) > 1) is is_grouped
    reply = node.reply()
    assert reply is not None and len(reply.offsets) == len(KEYS)


def test_a_find_asks_for_each_page_by_itself() -> None:
    node = Node(tier=RequestTier())
    node.store(*KEYS)
    node.find(*KEYS, storage=True)

    assert [len(keys) for keys in keys_of(node)] == [1] * len(KEYS)


def test_looking_again_leaves_threads_to_lookups_and_gets_to_every_page_if_one_is_gone() -> None:
    node = dumped(RequestTier())
    del node.tier._pages[NAMESPACE.fingerprint, KEYS[-1]]
    node.find(*KEYS)
    asked: list[Key] = []
    while node.reads.jobs:
        assert len(node.reads.jobs) <= node.reads.num_threads // 2
        (first,), *_ = keys_of(node)
        asked.append(first)
        node.reads.end_one()

    assert sorted(asked) == sorted(KEYS)
    assert all(node.core.writeback.was_stored(each) for each in KEYS[:-1])
    assert node.core.counters["saved_page_gone"] == 1


@pytest.mark.parametrize("tier", [MemoryTier(), RequestTier()])
def test_looking_again_asks_about_few_of_many(tier: MemoryTier) -> None:
    node = dumped(tier)
    node.find(*KEYS)
    asked: list[Key] = []
    while node.reads.jobs:
        asked += keys_of(node)[0]
        node.reads.end_one()

    assert KEYS[0] in asked and KEYS[-1] in asked and len(asked) <= 2 + log2(len(KEYS)) * 1.5
    node.find(*KEYS)
    assert not node.reads.jobs
