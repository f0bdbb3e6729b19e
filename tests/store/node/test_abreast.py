"""Storage whose `publish` carries the page: pages of one prompt are published side by side."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.parts.node import Node, key
from tests.store.node.test_by_order import FarTier
from tests.store.node.test_writeback import FULL, NAMESPACE, ORDER, PAGE, TREE, A, Bench, prompt
from tests.store.tiers.memory_tier import MemoryTier
from ucm.store.blocks.keys import Key
from ucm.store.node.promised_pages import ABREAST_S
from ucm.store.node.saved import Saving
from ucm.store.node.slots import Slot
from ucm.store.tiers.tier import Staged, TierNamespace

KEYS = [key(i) for i in range(12)]


class PutTier(MemoryTier):
    """A page is read when it is published, as long as that takes, and not before."""

    publishes_abreast = True

    def __init__(self) -> None:
        super().__init__()
        self._sources: dict[str, memoryview] = {}

    def stage(
        self, namespace: TierNamespace, key: Key, page: memoryview, *, num_tokens: int
    ) -> Staged | None:
        staged = super().stage(namespace, key, page, num_tokens=num_tokens)
        if staged is not None:
            self._sources[staged.ticket] = page
        return staged

    def publish(self, staged: Staged) -> None:
        self._staged[staged.ticket] = bytes(self._sources.pop(staged.ticket))
        super().publish(staged)


class PutBench(Bench):
    def make_tier(self) -> MemoryTier:
        return PutTier()

    def num_publishing(self) -> int:
        return sum(write.is_publishing for write in self.writeback._writes.values())

    def check_last(self, keys: list[Key]) -> None:
        """The last block of a prompt stands for all of them, unless one was given up."""
        stored = self.stored()
        assert keys[-1] not in stored or {*keys} <= stored | {*self.told}

    def check_order(self) -> None:
        """What is there without the page before it was on its way when that one was lost, or is
        ahead of it: nobody has been told that the page before it is kept and is not."""
        stored = self.stored()
        for each in stored:
            parent = self.parent[each]
            if parent is not None and parent not in stored:
                is_queued = self.writeback.state(parent) is Saving.QUEUED
                assert is_queued or parent in self.told

    def check_contents(self) -> None:
        page = memoryview(bytearray(PAGE))
        for each in self.stored():
            self.tier.read(NAMESPACE.tier, each, page)
            assert bytes(page) == each * (PAGE // 32)

    def use_memory_again(self, name: str) -> list[Slot]:
        """Others fill what is not needed any more."""
        slots = []
        while (slot := self.slots.reserve(prompt(f"{name} {len(slots)}", 1)[0], PAGE)) is not None:
            self.page_of(slot)[:] = b"\xff" * PAGE
            slots.append(slot)
        return slots


def test_as_many_pages_of_a_prompt_as_there_are_threads_are_published_at_once() -> None:
    bench = PutBench()
    bench.dump(A)
    for _ in A:
        bench.pool.end(0)  # each is staged
    assert bench.pool.depth == bench.num_publishing() == bench.pool.num_threads

    bench.pool.end(2)
    assert bench.stored() == {A[2]}
    assert bench.pool.depth == bench.num_publishing() == bench.pool.num_threads
    bench.pool.end_all()
    assert bench.stored() == set(A)
    assert bench.counters == {"write_done": len(A)}
    bench.check_nothing_is_held()


@given(ORDER)
def test_all_is_published_whichever_write_ends_first(order: list[int]) -> None:
    bench = PutBench()
    for keys in TREE:
        bench.dump(keys)
    for index in order:
        if bench.pool.jobs:
            bench.pool.end(index)
            bench.check_order()
            for keys in TREE:
                bench.check_last(keys)
    bench.pool.end_all()

    assert bench.stored() == {key for keys in TREE for key in keys}
    assert bench.counters == {"write_done": 18}
    assert not bench.told
    bench.check_contents()
    bench.check_nothing_is_held()


@given(ORDER, st.sets(st.integers(0, 59), min_size=1, max_size=12))
def test_what_fails_is_told_and_written_once_more_and_no_page_is_written_wrong(
    order: list[int], failing: set[int]
) -> None:
    """Whichever fail, and whoever takes the memory of pages that were given up."""
    bench = PutBench()
    for keys in TREE:
        bench.dump(keys)
    for step, index in enumerate(order):
        if not bench.pool.jobs:
            break
        bench.pool.end(index, error=FULL if step in failing else None)
        bench.check_order()
        assert set(bench.parent) == bench.stored() | set(bench.told) | set(bench.writeback._writes)
    bench.pool.end_all()
    bench.check_nothing_is_held()
    assert set(bench.parent) - bench.stored() == set(bench.told)

    for _ in range(40):
        bench.now_s += 1
        bench.writeback.tick()
        bench.pool.end_all()
    assert bench.stored() == set(bench.parent)
    assert not bench.told
    bench.check_contents()


@given(ORDER, st.sets(st.integers(0, 59), min_size=1, max_size=12))
def test_memory_of_a_page_that_is_being_published_is_nobody_elses(
    order: list[int], failing: set[int]
) -> None:
    bench = PutBench()
    for keys in TREE:
        bench.dump(keys)
    for step, index in enumerate(order):
        if not bench.pool.jobs:
            break
        bench.pool.end(index, error=FULL if step in failing else None)
        for slot in bench.use_memory_again(f"step {step}"):
            bench.slots.abandon(slot)
    bench.pool.end_all()

    bench.check_contents()


@given(ORDER, st.integers(1, 7))
def test_the_last_page_of_a_step_is_behind_all_others_until_the_next_step_comes(
    order: list[int], step: int
) -> None:
    bench = PutBench()
    steps = iter([A[i : i + step] for i in range(0, len(A), step)])
    done: list[Key] = []
    for index in order:
        if index % 3 == 0 and (some := next(steps, None)):
            for each in some:
                bench.commit(each, done[-1] if done else None)
                done.append(each)
        elif bench.pool.jobs:
            bench.pool.end(index)
        if done:
            bench.check_last(done)


@given(ORDER, st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=40))
def test_a_client_that_says_nonsense_of_what_precedes_what_leaves_nothing_waiting(
    order: list[int], said: list[tuple[int, int]]
) -> None:
    bench = PutBench()
    commits = iter(said)
    for index in order:
        pair = next(commits, None) if index % 2 else None
        if pair is not None:
            slot = bench.slots.find(A[pair[0]])
            if slot is None:
                bench.commit(A[pair[0]], A[pair[1]])
            else:
                bench.writeback.enqueue(NAMESPACE, A[pair[0]], A[pair[1]], slot)
        elif bench.pool.jobs:
            bench.pool.end(index, error=FULL if index % 7 == 0 else None)
    bench.pool.end_all()

    bench.check_nothing_is_held()
    bench.check_contents()


def test_one_page_that_fails_costs_those_behind_it_that_have_not_begun() -> None:
    bench = PutBench()
    bench.dump(A)
    for _ in A:
        bench.pool.end(0)
    bench.pool.end(1, error=FULL)
    bench.pool.end_all()

    assert bench.stored() == {A[0], A[2], A[3]}
    assert bench.told == {A[1]: "full", **dict.fromkeys(A[4:], "after_failed")}
    bench.now_s += 1
    bench.writeback.tick()
    bench.pool.end_all()
    assert bench.stored() == {*A} and not bench.told


def test_where_all_fail_no_more_are_tried_than_there_are_threads() -> None:
    bench = PutBench()
    bench.dump(prompt("long", 20))
    for _ in range(20):
        bench.pool.end(0)
    bench.pool.end_all(error=FULL)

    assert bench.counters["write_failed_full"] <= bench.pool.num_threads
    assert len(bench.told) == 20
    bench.check_nothing_is_held()


# -- who waits for promised pages ----------------------------------------------------------


class PutFarTier(FarTier):
    publishes_abreast = True


def settle(node: Node, *, within_s: float) -> None:
    """Lets storage answer, and time pass, until the lookup is answered."""
    end_s = node.now_s + within_s
    while node.reply() is None and node.now_s < end_s:
        node.reads.end_all()
        node.now_s += max(node.timers.fire(), default=0.05)
        node.core.tick()
    node.reads.end_all()


@given(st.permutations(range(12)))
def test_promised_pages_are_waited_for_in_whatever_order_they_come(order: list[int]) -> None:
    node = Node(tier=PutFarTier())
    node.expect(KEYS, timeout_ms=60_000)
    for i in order:
        settle(node, within_s=ABREAST_S / 20)
        assert node.reply() is None
        node.store(KEYS[i])
        node.core.check()
    settle(node, within_s=1)

    reply = node.reply()
    assert reply is not None and (len(reply.offsets), reply.reason) == (len(KEYS), "")


@pytest.mark.parametrize("hole", [0, 1, 9, 10])
def test_a_page_that_does_not_come_after_the_last_is_given_up_soon(hole: int) -> None:
    """Long before the end of the time: its writer has failed, or was killed."""
    node = Node(tier=PutFarTier())
    node.store(*KEYS[:hole], *KEYS[hole + 1 :])
    node.expect(KEYS, timeout_ms=60_000)
    settle(node, within_s=ABREAST_S * 0.9)
    assert node.reply() is None
    settle(node, within_s=ABREAST_S * 0.3)

    reply = node.reply()
    assert reply is not None and (len(reply.offsets), reply.reason) == (hole, "evicted")


def test_looking_for_a_page_that_may_still_come_is_paced() -> None:
    tier = PutFarTier()
    node = Node(tier=tier)
    node.store(*KEYS[:3], *KEYS[4:])
    node.expect(KEYS, timeout_ms=60_000)
    settle(node, within_s=0.5)
    tier.num_asked = 0
    settle(node, within_s=1.0)

    assert node.reply() is None
    assert tier.num_asked <= 3 * 1.0 / 0.05
