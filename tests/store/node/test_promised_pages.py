"""Lookups of pages that are promised: they wait for what is not there yet, and not for ever."""

from __future__ import annotations

from hashlib import sha256

import pytest

from tests.parts.node import NAMESPACE, PAGE, Node, key
from tests.parts.pools import DisorderlyPool
from ucm.store.blocks.keys import Key, TailKey
from ucm.store.node import protocol as p
from ucm.store.node.promised_pages import FED_PAUSE_S, LAST_PAUSE_S, max_looks
from ucm.store.tiers.tier import TierNamespace

KEYS = [key(i) for i in range(20)]


def names(node: Node, keys: list[Key]) -> list[Key]:
    """What the reply's offsets hold."""
    reply = node.reply()
    assert reply is not None
    found = [node.core.slots.find(each) for each in keys[: len(reply.offsets)]]
    assert [slot.offset for slot in found if slot is not None] == reply.offsets
    return keys[: len(reply.offsets)]


def test_promised_pages_are_waited_for_until_another_node_has_published_them() -> None:
    node = Node()
    node.expect(KEYS)
    for i in range(0, 20, 5):
        node.reads.end_all()
        assert node.reply() is None
        node.store(*KEYS[i : i + 5])
        node.timers.fire()
    node.reads.end_all()

    reply = node.reply()
    assert reply is not None and (reply.reason, reply.from_files) == ("", 20)
    assert names(node, KEYS) == KEYS


def test_pages_that_are_published_one_after_the_other_are_read_as_they_come() -> None:
    """So that the last one is all that is missing when it comes."""
    node = Node()
    node.expect(KEYS)
    for done in range(1, 6):
        node.reads.end_all()
        node.store(KEYS[done - 1])
        node.timers.fire()
        node.reads.end_all()
        assert node.core.slots.counts().pins == done
    assert node.reply() is None


def test_what_is_late_is_settled_for_what_is_there() -> None:
    node = Node()
    node.store(*KEYS[:3])
    node.expect(KEYS, timeout_ms=5000)
    node.reads.end_all()
    node.now_s += 4.9
    node.core.tick()
    assert node.reply() is None
    node.now_s += 0.2
    node.core.tick()

    reply = node.reply()
    assert reply is not None and (len(reply.offsets), reply.reason) == (3, "late")
    node.timers.fire()
    assert node.reads.depth == 0


def test_each_page_that_comes_renews_the_time_for_the_others() -> None:
    node = Node()
    node.expect(KEYS[:3], timeout_ms=1000, renewed=True)
    for each in KEYS[:2]:
        node.reads.end_all()
        node.now_s += 0.9
        node.store(each)
        node.timers.fire()
        node.reads.end_all()
        node.core.tick()
        assert node.reply() is None
    node.now_s += 1.1
    node.core.tick()
    reply = node.reply()
    assert reply is not None and (len(reply.offsets), reply.reason) == (2, "late")


def test_storage_that_hangs_is_named_and_not_the_one_who_promised() -> None:
    node = Node()
    node.store(*KEYS)
    node.expect(KEYS)
    node.reads.end_one()  # the look
    node.reads.end_one()  # and a probe; the reads hang
    node.now_s += 6
    node.core.tick()
    reply = node.reply()
    assert reply is not None and reply.reason == "timeout"


def test_a_page_that_is_gone_while_the_last_one_is_there_was_evicted() -> None:
    """In the order of the prompt the last one is published last."""
    node = Node()
    node.store(*KEYS[:4], *KEYS[5:])
    node.expect(KEYS)
    node.reads.end_all()

    reply = node.reply()
    assert reply is not None and (len(reply.offsets), reply.reason) == (4, "evicted")


def test_looks_that_find_nothing_come_ever_more_seldom_and_what_comes_wakes_them() -> None:
    node = Node()
    node.expect(KEYS)
    pauses = []
    for _ in range(10):
        node.reads.end_all()
        assert len(node.timers.waiting) == 1
        pauses += node.timers.fire()
    assert pauses == sorted(pauses) and pauses[0] < pauses[1] < pauses[-1] == LAST_PAUSE_S

    node.reads.end_all()
    node.store(KEYS[0])
    node.timers.fire()
    node.reads.end_all()
    assert node.timers.fire() == [pauses[0]]


def test_a_page_that_an_engine_of_this_node_computes_is_had_without_asking_storage() -> None:
    node = Node()
    other = node.other_engine()
    other.reserve(*KEYS[:3])
    node.expect(KEYS[:3])
    assert node.reads.depth == 0 and not node.timers.waiting

    other.commit(*KEYS[:3])

    assert names(node, KEYS[:3]) == KEYS[:3]
    assert node.reads.depth == 0


def test_pages_that_an_engine_of_this_node_begins_later_are_told_as_well() -> None:
    """Decode may be asked before prefill has begun."""
    node = Node()
    other = node.other_engine()
    node.expect(KEYS[:6])
    node.reads.end_all()  # the first look finds nothing
    other.reserve(*KEYS[:4])
    other.commit(*KEYS[:4])
    node.timers.fire()
    node.reads.end_all()
    assert node.reply() is None
    # From now on storage is asked for what this node might not know of, and for nothing else.
    assert [pause_s for pause_s, _ in node.timers.waiting] == [FED_PAUSE_S]

    other.reserve(*KEYS[4:6])
    other.commit(*KEYS[4:6])
    assert names(node, KEYS[:6]) == KEYS[:6]


@pytest.mark.parametrize("how", ["abort", "die"])
def test_when_the_engine_gives_up_a_page_another_one_may_still_bring_it(how: str) -> None:
    node = Node()
    other = node.other_engine()
    other.reserve(*KEYS[:2])
    node.expect(KEYS[:2])
    other.commit(KEYS[0])
    other.abort(KEYS[1]) if how == "abort" else other.die()
    assert node.reply() is None

    node.store(KEYS[1])
    node.timers.fire()
    node.reads.end_all()
    assert names(node, KEYS[:2]) == KEYS[:2]


def test_a_page_for_which_an_engine_of_this_node_finds_no_room_is_not_waited_for() -> None:
    node = Node(num_slots=8)
    other = node.other_engine()
    node.expect(KEYS[:9])
    node.reads.end_all()
    other.reserve(*KEYS[:9])
    other.commit(*KEYS[:8])

    reply = node.reply()
    assert reply is not None and (len(reply.offsets), reply.reason) == (8, "no_room")


def test_without_storage_promised_pages_come_from_this_node() -> None:
    node = Node(has_tier=False)
    other = node.other_engine()
    node.expect(KEYS[:2])
    assert node.reply() is None
    other.reserve(*KEYS[:2])
    other.commit(*KEYS[:2])
    assert names(node, KEYS[:2]) == KEYS[:2]


def test_blocks_behind_the_promised_ones_are_not_waited_for() -> None:
    node = Node()
    node.store(*KEYS[:4])
    node.expect(KEYS, promised=4)
    node.reads.end_all()
    reply = node.reply()
    assert reply is not None and (len(reply.offsets), reply.reason) == (4, "never_stored")


def test_a_lookup_that_is_withdrawn_looks_for_nothing_any_more() -> None:
    node = Node()
    node.expect(KEYS)
    node.reads.end_all()
    node.release(1)
    node.timers.fire()
    assert node.reads.depth == 0
    other = node.other_engine()
    other.reserve(*KEYS)
    other.commit(*KEYS)
    assert node.core.slots.counts().pins == len(KEYS)  # those of the writes
    node.writes.end_all()
    assert node.core.slots.counts().pins == 0


def test_many_lookups_that_wait_for_the_same_pages_all_get_them() -> None:
    node = Node()
    for number in range(1, 6):
        node.expect(KEYS, number=number)
    node.reads.end_all()
    node.store(*KEYS)
    node.timers.fire()
    node.reads.end_all()
    counts = [len(message.offsets) for message in node.inbox]  # type: ignore[union-attr]
    assert counts == [20] * 5
    assert node.core.counters["read_hit"] == 20


@pytest.mark.parametrize("is_stored", [True, False])
def test_a_page_that_comes_while_storage_is_asked_for_it_is_held_once(is_stored: bool) -> None:
    """Whatever storage says then."""
    node = Node()
    other = node.other_engine()
    node.store(*KEYS)
    node.expect(KEYS)
    node.reads.end_one()  # the look: all are there
    if not is_stored:
        node.tier._pages.clear()
    other.reserve(*KEYS[9:12])
    other.commit(*KEYS[9:12])
    node.reads.end_all()
    node.writes.end_all()
    pins = node.core.slots.counts().pins
    reply = node.reply()
    assert reply is None or len(reply.offsets) == pins

    node.release(1)
    assert node.core.slots.counts().pins == 0


def test_a_tail_goes_to_storage_and_back_under_its_own_name_as_its_ranks_have_filled_it() -> None:
    """What is behind its tokens is theirs to blank."""
    node = Node()
    other = node.other_engine()
    tail = key(99)
    (offset,) = other.reserve(tail, tail_tokens=1)
    written = bytes(i % 251 for i in range(PAGE))
    node.memory[offset : offset + PAGE] = written
    other.commit(tail)
    node.writes.end_all()

    assert node.memory[offset : offset + PAGE] == written
    page = memoryview(bytearray(PAGE))
    assert node.tier.read(NAMESPACE, Key(TailKey(tail, 1)), page).status.value == "hit"
    assert page == written


def test_a_tail_is_evicted_before_pages_that_are_older() -> None:
    node = Node(num_slots=8)
    other = node.other_engine()
    other.reserve(*KEYS[:7])
    other.commit(*KEYS[:7])
    other.reserve(key(99), tail_tokens=3)
    other.commit(key(99))
    node.writes.end_all()
    other.reserve(key(100))

    assert node.core.slots.find(key(99)) is None
    assert all(node.core.slots.find(each) is not None for each in KEYS[:7])


def test_what_another_namespace_is_can_be_asked() -> None:
    node = Node()
    theirs = sha256(b"another").digest()
    node.tier.open_namespace(TierNamespace(theirs, PAGE, b'{"dtype": "float16"}'))

    assert node.manifest(theirs) == b'{"dtype": "float16"}'
    assert node.manifest(sha256(b"unknown").digest()) == b""


def test_any_number_that_wait_look_on_fewer_than_half_of_the_threads() -> None:
    """In turns: each of them is looked at before one is looked at again."""
    node = Node()
    for number in range(64):
        node.expect([key(100 + number)], number=number, timeout_ms=60_000)
    most = max_looks(node.reads.num_threads)
    assert node.reads.depth == most < node.reads.num_threads / 2

    for _ in range(64):
        assert node.reads.depth == most
        node.reads.end_one()
        if not node.reads.depth:
            break
    assert len(node.timers.waiting) == 64


def test_who_gives_up_waits_for_no_turn_any_more() -> None:
    node = Node()
    for number in range(3):
        node.expect([key(100 + number)], number=number)
    node.release(1)
    node.reads.end_one()
    node.store(key(102))
    node.reads.end_all()

    replies = [each for each in node.inbox if isinstance(each, p.LookupReply)]
    assert [(each.id, len(each.offsets)) for each in replies] == [(2, 1)]


def test_looks_that_hang_end_all_that_wait_and_leave_the_threads_to_others() -> None:
    reads = DisorderlyPool()
    node = Node(reads=reads)
    for number in range(3):
        node.expect([key(100 + number)], number=number, timeout_ms=60_000)
    assert reads.depth == 1

    reads.hang(0)

    replies = [each for each in node.inbox if isinstance(each, p.LookupReply)]
    assert {each.id: each.reason for each in replies} == dict.fromkeys(range(3), "timeout")
    assert reads.depth == 1 and not reads.stalled
    node.look_up([key(1)], number=9)
    reads.end(0, fail=False)
    assert [each.id for each in node.inbox if isinstance(each, p.LookupReply)][3:] == [9]

    reads.return_late()
    node.expect([key(200)], number=10)
    assert reads.depth == 1
