"""Two tiers behind one memory: who is asked, and who is waited for."""

from __future__ import annotations

import msgspec
import pytest

from tests.parts.node import NAMESPACE, NAMESPACE_MESSAGE, PAGE, Node, key
from ucm.errors import TierError
from ucm.outcome import Outcome
from ucm.store.node import page_reads
from ucm.store.node import protocol as p

KEYS = [key(i) for i in range(6)]
GONE = TierError("can't connect", reason=Outcome.IO_ERROR)


def near_far(**changes: int) -> Node:
    return Node(has_far=True, **changes)


def dump(node: Node, *keys: bytes) -> None:
    """One prompt."""
    node.reserve(*keys)
    for each, parent in zip(keys, [b"", *keys[:-1]], strict=True):
        node.commit(each, parent=parent)


def offsets(node: Node) -> int:
    reply = node.reply()
    assert reply is not None
    return len(reply.offsets)


# -- looking for it, and reading it ----------------------------------------------------------


def test_what_is_near_is_not_looked_for_far() -> None:
    node = near_far()
    node.store(*KEYS)
    node.look_up(KEYS, number=1)
    node.reads.end_all()

    assert offsets(node) == len(KEYS) and not node.far_reads.jobs


def test_what_near_has_is_read_while_far_is_asked_for_the_rest() -> None:
    node = near_far()
    node.store(*KEYS[:2])
    node.store_far(*KEYS[2:])
    node.look_up(KEYS, number=1)
    node.reads.end_all()
    assert node.core.slots.counts().ready == 2 and node.reply() is None

    node.far_reads.end_one()
    node.reads.end_all()
    node.far_reads.end_all()

    assert offsets(node) == len(KEYS)


def test_a_far_tier_that_does_not_answer_costs_what_near_lacks_and_no_more() -> None:
    node = near_far()
    node.store(*KEYS[:2])
    node.look_up(KEYS, number=1, timeout_ms=1000)
    node.reads.end_all()
    node.now_s += 2
    node.core.tick()

    assert offsets(node) == 2
    reply = node.reply()
    assert reply is not None and reply.reason is Outcome.TIMEOUT


def test_a_far_tier_that_hangs_is_not_asked() -> None:
    node = near_far()
    node.far_reads.stalled = True
    node.store(*KEYS[:2])
    node.look_up(KEYS, number=1)
    node.reads.end_all()

    assert offsets(node) == 2 and not node.far_reads.jobs


def test_what_both_lack_was_never_stored() -> None:
    node = near_far()
    node.look_up(KEYS, number=1)
    node.reads.end_all()
    node.far_reads.end_all()

    reply = node.reply()
    assert reply is not None and (reply.offsets, reply.reason) == ([], Outcome.NEVER_STORED)


def test_storage_that_fails_near_is_made_up_for_by_far() -> None:
    node = near_far()
    node.store_far(*KEYS)
    node.look_up(KEYS, number=1)
    node.reads.end_all(error=GONE)
    node.far_reads.end_one()
    node.reads.end_all(error=GONE)
    node.far_reads.end_all()

    assert offsets(node) == len(KEYS)


def test_reads_that_far_is_busy_with_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near says quickly that it lacks a page; the slots are others', too."""
    monkeypatch.setattr(page_reads, "_READ_BYTES", PAGE)
    node = near_far(num_slots=64)
    keys = [key(i) for i in range(60)]
    node.store_far(*keys)
    node.look_up(keys, number=1)
    for _ in range(20):
        node.reads.end_all()
        questions = [node.far in job[0].args for job in node.far_reads.jobs]
        if True in questions:
            node.far_reads.end(questions.index(True))

    # One running and one in line for each thread of each tier.
    most = 2 * (node.reads.num_threads + node.far_reads.num_threads)
    assert node.far_reads.num_threads <= len(node.far_reads.jobs) < most
    assert node.core.slots.counts().filling < most


def test_small_pages_are_read_side_by_side_from_far() -> None:
    """Near reads them in groups, one after the other; far each takes as long as a large one."""
    node = near_far(num_slots=512)
    keys = [key(i) for i in range(8)]
    node.store_far(*keys)
    node.look_up(keys, number=1)
    node.reads.end_all()
    node.far_reads.end_one()
    node.reads.end_all()

    assert len(node.far_reads.jobs) == len(keys)


def test_a_page_from_far_is_written_near() -> None:
    node = near_far()
    node.store_far(*KEYS)
    node.look_up(KEYS, number=1)
    while node.reply() is None:
        node.reads.end_all()
        node.far_reads.end_all()
    node.writes.end_all()

    assert node.tier.contains(NAMESPACE, KEYS) == len(KEYS)
    assert not node.far_writes.jobs


def test_a_page_from_far_is_not_written_near_while_near_has_enough_to_do() -> None:
    node = near_far(max_write_pages=8)
    dump(node, *[key(i) for i in range(100, 104)])
    node.store_far(*KEYS)
    node.look_up(KEYS, number=1)
    while node.reply() is None:
        node.reads.end_all()
        node.far_reads.end_all()

    assert node.core.queues()["write_pages"] == 4
    assert node.told() == {}


# -- promised --------------------------------------------------------------------------------


def test_a_promised_page_is_waited_for_in_both() -> None:
    node = near_far()
    node.expect(KEYS)
    node.reads.end_all()
    node.far_reads.end_all()
    assert node.reply() is None
    node.store(*KEYS[:3])
    node.store_far(*KEYS[3:])
    for _ in range(4):
        node.timers.fire()
        node.reads.end_all()
        node.far_reads.end_all()

    assert offsets(node) == len(KEYS)


def test_a_far_tier_that_hangs_holds_up_no_promised_page_that_near_has() -> None:
    node = near_far()
    node.expect(KEYS)
    node.reads.end_all()
    node.store(*KEYS)
    node.timers.fire()
    node.reads.end_all()

    assert node.far_reads.jobs and offsets(node) == len(KEYS)


def test_a_promised_page_that_has_gone_near_may_be_far() -> None:
    node = near_far()
    node.store(*KEYS[1:])
    node.store_far(KEYS[0])
    node.expect(KEYS)
    for _ in range(4):
        node.reads.end_all()
        node.far_reads.end_all()
        node.timers.fire()

    assert offsets(node) == len(KEYS)


def test_a_promised_page_that_has_gone_in_both_was_evicted() -> None:
    node = near_far()
    node.store(*KEYS[1:])
    node.expect(KEYS)
    for _ in range(4):
        node.reads.end_all()
        node.far_reads.end_all()
        node.timers.fire()

    reply = node.reply()
    assert reply is not None and (reply.offsets, reply.reason) == ([], Outcome.EVICTED)


def test_promised_pages_are_waited_for_while_both_fail_no_longer_than_that() -> None:
    node = near_far()
    node.expect(KEYS)
    node.reads.end_all(error=GONE)
    node.far_reads.end_all(error=GONE)
    for _ in range(10):
        node.timers.fire()
        node.reads.end_all(error=GONE)
        node.far_reads.end_all(error=GONE)

    reply = node.reply()
    assert reply is not None and reply.reason is Outcome.IO_ERROR


# -- starting --------------------------------------------------------------------------------


def test_nobody_s_start_waits_for_far() -> None:
    node = near_far()
    opening = msgspec.structs.replace(NAMESPACE_MESSAGE, ns=2)
    node.core.handle(node.connection, opening)
    node.writes.end_all()

    assert node.inbox == [p.NamespaceOpened(ns=2, error="", refused=False)]


def test_a_manifest_is_found_in_either() -> None:
    node = near_far()
    node.far.open_namespace(NAMESPACE)
    node.tier._manifests.clear()
    node.core.handle(node.connection, p.GetManifest(id=1, fingerprint=NAMESPACE.fingerprint))
    node.writes.end_all()
    node.far_writes.end_all()

    (found,) = node.inbox
    assert isinstance(found, p.ManifestFound) and found.manifest == NAMESPACE.manifest_json
