"""Small pages that one call reads: what becomes of each, and of those who wait for several."""

from __future__ import annotations

from typing import Any

from tests.parts.node import NAMESPACE, Node, key
from ucm.outcome import Outcome
from ucm.store.node.lookup_state import LookupJob

KEYS = [key(i) for i in range(40)]
GONE = 30


def reading(node: Node) -> None:
    """Looks all up, and is told that storage has them."""
    node.look_up(KEYS, number=1)
    while not all("read_all" in str(job) for job in node.reads.jobs):
        node.reads.end(
            next(i for i, job in enumerate(node.reads.jobs) if "read_all" not in str(job))
        )


def test_a_lookup_hears_once_of_pages_that_were_read_together() -> None:
    node = Node()
    node.store(*KEYS)
    fills: Any = node.core.lookups.fills
    heard: list[LookupJob] = []
    on_news = fills._on_news

    def hear(job: LookupJob, *, look: bool) -> None:
        heard.append(job)
        on_news(job, look=look)

    fills._on_news = hear
    reading(node)
    node.reads.end_all()

    reply = node.reply()
    assert reply is not None and len(reply.offsets) == len(KEYS)
    assert 1 < len(heard) < len(KEYS) / 2, "one by one while threads are idle, then together"
    assert node.core.counters["read_hit"] == len(KEYS), "each page is counted"


def test_of_pages_read_together_one_that_is_gone_ends_the_prefix_and_the_others_are_kept() -> None:
    node = Node()
    node.store(*KEYS)
    reading(node)
    del node.tier._pages[NAMESPACE.fingerprint, KEYS[GONE]]
    node.reads.end_all()
    node.core.lookups.check()
    node.core.slots.check()

    reply = node.reply()
    assert reply is not None
    assert len(reply.offsets) == GONE and reply.reason == Outcome.NEVER_STORED
    counters = node.core.counters
    assert (counters["read_hit"], counters["read_absent"]) == (len(KEYS) - 1, 1)
    assert node.core.slots.counts().pins == GONE, "what lies behind it is not held"
    node.release(1)
    assert node.core.slots.counts().pins == 0
    assert node.core.slots.find(KEYS[GONE + 1]) is not None, "it was read, so it is a hit"


def test_pages_read_together_that_were_set_aside_are_nobodys_when_they_come_at_last() -> None:
    node = Node()
    node.store(*KEYS)
    reading(node)
    node.reads.hang()
    num_aside = node.core.slots.counts().aside
    assert num_aside
    node.reads.end_all()
    node.core.slots.check()

    assert node.core.slots.counts().aside == 0
    reply = node.reply()
    assert reply is not None and reply.reason == Outcome.TIMEOUT
