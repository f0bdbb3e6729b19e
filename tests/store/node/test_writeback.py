"""Write-back against a plain model: whatever ends when and how, files appear in prompt order."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from hypothesis import given
from hypothesis import strategies as st

from tests.parts.node import node_parts
from tests.parts.pools import HeldPool, Timers
from tests.store.tiers.memory_tier import MemoryTier
from ucm.errors import TierError
from ucm.store.blocks.keys import Key
from ucm.store.node.lanes import Lanes
from ucm.store.node.saved import Saving
from ucm.store.node.sessions import OpenedNamespace
from ucm.store.node.slots import Slot, SlotTable
from ucm.store.node.writeback import WriteBack
from ucm.store.tiers.tier import TierNamespace

PAGE = 4096
NUM_SLOTS = 32
NAMESPACE = OpenedNamespace(
    TierNamespace(sha256(b"n").digest(), PAGE, b"{}"), slot_bytes=PAGE, block_tokens=1
)
FULL = TierError("no space left", reason="full")


def prompt(name: str, num_blocks: int, *, after: list[Key] | None = None) -> list[Key]:
    head = after or []
    tail = [Key(sha256(f"{name} {i}".encode()).digest()) for i in range(num_blocks)]
    return [*head, *tail]


class Bench:
    """A write-back over a tier in memory, and engines that fill slots."""

    def __init__(self, *, max_pages: int = 1000) -> None:
        self.slots = SlotTable(PAGE * NUM_SLOTS, extent_bytes=PAGE * NUM_SLOTS)
        self.memory = memoryview(bytearray(PAGE * NUM_SLOTS))
        self.tier = self.make_tier()
        self.tier.open_namespace(NAMESPACE.tier)
        self.pool = HeldPool()
        self.parent: dict[Key, Key | None] = {}
        self.now_s = 0.0
        self.told: dict[Key, str] = {}
        lanes = self.make_lanes()
        parts = node_parts(
            self.slots,
            self.memory,
            tier=self.tier,
            reads=lanes,
            writes=lanes,
            clock=lambda: self.now_s,
            call_later=Timers(),
            max_write_pages=max_pages,
        )
        self.counters, self.page_of = parts.counters, parts.page_of
        self.writeback = WriteBack(parts, self.tell)

    def make_tier(self) -> MemoryTier:
        return MemoryTier()

    def make_lanes(self) -> Lanes:
        return Lanes([self.pool], self.tier)

    def tell(self, refused: Sequence[Key], saved: Sequence[Key], reason: str) -> None:
        self.told.update(dict.fromkeys(refused, reason))
        for key in saved:
            self.told.pop(key, None)

    def reserve(self, key: Key) -> Slot:
        slot = self.slots.reserve(key, PAGE)
        assert slot is not None
        return slot

    def commit(self, key: Key, parent: Key | None, slot: Slot | None = None) -> None:
        self.parent[key] = parent
        slot = slot or self.slots.find(key) or self.reserve(key)
        self.page_of(slot)[:] = key * (PAGE // len(key))
        self.slots.ready(slot)
        self.writeback.enqueue(NAMESPACE, key, parent, slot)

    def dump(self, keys: list[Key]) -> None:
        """Commits a prompt's blocks that are not here yet, in order."""
        for i, key in enumerate(keys):
            if self.slots.find(key) is None:
                self.commit(key, keys[i - 1] if i else None)

    def stored(self) -> set[Key]:
        return {key for key in self.parent if self.tier.contains(NAMESPACE.tier, [key])}

    def check_order(self) -> None:
        """On storage, the last block of a prompt stands for all of them."""
        stored = self.stored()
        for key in stored:
            assert self.parent[key] is None or self.parent[key] in stored

    def check_nothing_is_held(self) -> None:
        assert self.writeback.depth == 0
        assert self.slots.counts().pins == 0
        self.slots.check()


A = prompt("a", 8)
TREE = [A, prompt("b", 6, after=A[:3]), prompt("c", 4)]
ORDER = st.lists(st.integers(0, 1000), min_size=60, max_size=60)


@given(ORDER)
def test_all_is_published_in_prompt_order_whichever_write_ends_first(order: list[int]) -> None:
    bench = Bench()
    for keys in TREE:
        bench.dump(keys)
    for index in order:
        if bench.pool.jobs:
            bench.pool.end(index)
            bench.check_order()
    bench.pool.end_all()

    assert bench.stored() == {key for keys in TREE for key in keys}
    assert bench.counters == {"write_done": 18}
    bench.check_nothing_is_held()


@given(st.permutations(range(8)), ORDER)
def test_blocks_that_are_committed_out_of_order_are_published_in_prompt_order(
    committed: list[int], order: list[int]
) -> None:
    """Ranks of two engines may finish in any order: what comes early waits for what is filling."""
    bench = Bench()
    slots = [bench.reserve(key) for key in A]
    for i, index in zip(committed, order, strict=False):
        bench.commit(A[i], A[i - 1] if i else None, slots[i])
        if bench.pool.jobs:
            bench.pool.end(index)
        stored = {key for key in A if bench.tier.contains(NAMESPACE.tier, [key])}
        assert stored == set(A[: len(stored)])
    bench.pool.end_all()

    assert bench.stored() == set(A)
    bench.check_nothing_is_held()


@given(ORDER, st.sets(st.integers(0, 59), min_size=1, max_size=6))
def test_a_failed_write_drops_what_follows_it_and_nothing_else(
    order: list[int], failing: set[int]
) -> None:
    bench = Bench()
    for keys in TREE:
        bench.dump(keys)
    num_failed = 0
    for step, index in enumerate(order):
        if not bench.pool.jobs:
            break
        fails = step in failing
        num_failed += fails
        bench.pool.end(index, error=FULL if fails else None)
        bench.check_order()
    bench.pool.end_all()

    stored = bench.stored()
    lost = set(bench.parent) - stored
    first_lost = {key for key in lost if bench.parent[key] not in lost}
    # A failure that hits a block already lost, or its removal, costs nothing more.
    assert len(first_lost) <= num_failed
    assert bench.counters["write_done"] == len(stored)
    dropped = bench.counters["write_failed_full"] + bench.counters["dump_dropped_after_failed"]
    assert dropped >= len(lost)
    bench.check_nothing_is_held()


def test_a_failed_write_drops_the_rest_of_its_prompt_and_counts_each_page() -> None:
    bench = Bench()
    bench.dump(A)
    bench.pool.end(2, error=FULL)
    bench.pool.end_all()

    assert bench.stored() == set(A[:2])
    assert bench.counters == {
        "write_done": 2,
        "write_failed_full": 1,
        "dump_dropped_after_failed": 5,
    }
    bench.check_nothing_is_held()


def test_what_was_dropped_is_written_when_it_is_dumped_again() -> None:
    bench = Bench()
    bench.dump(A)
    bench.pool.end(2, error=FULL)
    bench.pool.end_all()

    for i in range(2, 8):
        slot = bench.slots.find(A[i])
        assert slot is not None
        assert bench.writeback.state(A[i]) is Saving.REFUSED
        bench.writeback.enqueue(NAMESPACE, A[i], A[i - 1], slot)
    bench.pool.end_all()

    assert bench.stored() == set(A)
    bench.check_nothing_is_held()


def test_what_a_full_queue_does_not_take_is_dropped_and_counted() -> None:
    bench = Bench(max_pages=3)
    bench.dump(A)

    assert bench.writeback.is_full(A[0])
    assert bench.writeback.depth == 3
    dropped = {"dump_dropped_queue_full": 1, "dump_dropped_after_failed": 4}
    assert bench.counters == dropped
    bench.pool.end_all()
    assert bench.stored() == set(A[:3])
    assert bench.counters == {"write_done": 3, **dropped}
    bench.check_nothing_is_held()


def test_a_write_that_hangs_keeps_its_page_and_what_follows_unpublished() -> None:
    bench = Bench()
    bench.dump(A[:3])
    bench.pool.hang()
    while len(bench.pool.jobs) > 1:
        bench.pool.end(1)

    assert bench.counters == {"write_overdue": 1}
    assert bench.stored() == set()
    assert bench.slots.counts().pins == 3
    bench.pool.end_all()
    assert bench.stored() == set(A[:3])
    bench.check_nothing_is_held()


def test_a_page_behind_a_slot_that_is_given_up_is_dropped() -> None:
    bench = Bench()
    slot = bench.reserve(A[0])
    bench.parent[A[0]] = None
    bench.commit(A[1], A[0])
    bench.pool.end_all()
    assert bench.stored() == set()

    bench.slots.abandon(slot)
    bench.writeback.filling_ended(A[0])
    bench.pool.end_all()

    assert bench.stored() == set()
    assert bench.counters == {"dump_dropped_after_failed": 1}
    bench.check_nothing_is_held()


def test_a_page_that_is_there_already_counts_as_written_and_what_follows_goes_on() -> None:
    bench = Bench()
    staged = bench.tier.stage(NAMESPACE.tier, A[0], memoryview(A[0] * (PAGE // 32)), num_tokens=1)
    assert staged is not None
    bench.tier.publish(staged)
    bench.dump(A[:3])
    bench.pool.end_all()

    assert bench.stored() == set(A[:3])
    assert bench.counters == {"write_already_there": 1, "write_done": 2}
    bench.check_nothing_is_held()


def test_pages_are_written_as_they_were_committed() -> None:
    bench = Bench()
    bench.dump(A)
    bench.pool.end_all()
    page = memoryview(bytearray(PAGE))

    for key in A:
        bench.tier.read(NAMESPACE.tier, key, page)
        assert bytes(page) == key * (PAGE // 32)


def test_a_page_that_was_doomed_while_it_was_staged_is_never_published() -> None:
    bench = Bench()
    [key] = prompt("doomed", 1)
    bench.dump([key])
    bench.writeback._doom(bench.writeback._writes[key])
    bench.pool.end_all()
    assert bench.stored() == set()
    assert not bench.tier._staged
    bench.check_nothing_is_held()


def test_what_is_committed_when_the_drain_has_ended_is_told_and_never_begun() -> None:
    bench = Bench()
    taken, late = prompt("late", 1) + prompt("later", 1)
    bench.reserve(taken)
    bench.writeback.leave()
    bench.writeback.close()
    bench.commit(taken, None)
    bench.commit(late, None)
    assert bench.pool.depth == 0
    assert set(bench.told) == {taken, late}
    assert bench.writeback.depth == 0


def test_a_stop_discards_what_waits_for_a_block_that_nobody_committed() -> None:
    bench = Bench()
    head, middle, tail, late = prompt("left", 4)
    bench.reserve(head)
    for key, parent in ((middle, head), (tail, middle)):
        bench.commit(key, parent)
        bench.pool.end_all()
    assert bench.writeback.depth == 2
    bench.writeback.leave()
    bench.pool.end_all()
    assert bench.stored() == set()
    assert set(bench.told) == {middle, tail}
    bench.commit(late, head)
    bench.pool.end_all()
    assert late in bench.told
    assert not bench.tier._staged
    assert bench.writeback.depth == 0
