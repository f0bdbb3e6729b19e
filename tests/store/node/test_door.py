"""A wrong client of the same user: whatever it says, the others have what they had."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parts.node import FINGERPRINT, NAMESPACE_MESSAGE, PAGE, Node, key
from ucm.errors import ProtocolError
from ucm.store.node import protocol as p
from ucm.store.node.slots import SlotState

KEYS = st.integers(0, 5).map(key)
SMALL = st.integers(0, 3)
NUMBER = st.one_of(SMALL, st.integers(0, 1 << 40), st.integers(-3, -1))
COUNT = st.one_of(SMALL, st.integers(0, 1 << 40))
MANY_KEYS = st.lists(KEYS, max_size=6)
PARENTS = st.lists(st.one_of(KEYS, st.just(b""), st.just(b"short")), max_size=6)
SIZE = st.sampled_from([1, 7, 8, PAGE - 8, PAGE, PAGE + 8, 3 * PAGE, 1 << 40])
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "keys": MANY_KEYS,
    "parents": PARENTS,
    "lookups": st.lists(SMALL, max_size=3),
    "ns": st.sampled_from([1, 1, 1, 2, 3]),
    "id": SMALL,
    "fingerprint": st.sampled_from([FINGERPRINT, bytes(32)]),
    "page_bytes": SIZE,
    "block_tokens": st.sampled_from([1, 4, 5, 1 << 40]),
    "manifest": st.just(b"{}"),
    "read_from": COUNT,
    "promised": COUNT,
    "tail_tokens": st.sampled_from([0, 0, 1, 3, 4, 5, 1 << 40]),
    "timeout_ms": COUNT,
    "costs": st.none() | st.builds(p.ReadCosts, st.floats(), st.floats()),
    "load": st.booleans(),
    "renewed": st.booleans(),
    "storage": st.booleans(),
    "will_ask_again": st.booleans(),
}
KINDS = (
    p.MemoryReady,
    p.OpenNamespace,
    p.GetManifest,
    p.Lookup,
    p.Find,
    p.Release,
    p.Reserve,
    p.Commit,
    p.Abort,
)


def any_of(kind: type[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries({name: FIELDS[name] for name in kind.__struct_fields__}).map(
        lambda fields: kind(**fields)
    )


@st.composite
def dumps(draw: st.DrawFn) -> list[Any]:
    """Slots, and then pages in them: what fits together by chance only too seldom. The parents may
    be anything, or each other, and come in one message or in several."""
    keys = draw(st.lists(KEYS, min_size=1, max_size=4, unique=True))
    any_parents = st.tuples(*[st.one_of(KEYS, st.just(b"")) for _ in keys]).map(list)
    parents = draw(st.one_of(any_parents, st.just([*keys[1:], keys[0]])))
    tail_tokens = draw(st.sampled_from([0, 0, 0, 1, 3, 4, 5]))
    reserve = p.Reserve(id=1, ns=1, keys=keys, parents=[b""] * len(keys), tail_tokens=tail_tokens)
    if draw(st.booleans()):
        return [reserve, p.Commit(ns=1, keys=keys, parents=parents)]
    commits = [
        p.Commit(ns=1, keys=[key], parents=[parent])
        for key, parent in zip(keys, parents, strict=True)
    ]
    return [reserve, *draw(st.permutations(commits))]


IO = st.sampled_from(["reads", "writes", "timers"])


@given(
    said=st.lists(
        st.one_of(dumps(), *(each.map(lambda one: [one]) for each in (IO, *map(any_of, KINDS)))),
        max_size=30,
    ).map(lambda parts: [message for part in parts for message in part]),
    role=st.sampled_from(["scheduler", "store", "worker", "tool"]),
)
@settings(max_examples=400, deadline=None)
def test_whatever_a_client_says_nothing_of_it_is_left_when_it_has_gone(
    said: list[Any], role: str
) -> None:
    node = Node(num_slots=8)
    wrong = node.core.connect(
        p.Hello(version=p.VERSION, session="wrong", role=role, pid=3), lambda message: None
    )
    for message in [NAMESPACE_MESSAGE, *said]:
        if isinstance(message, str):
            getattr(node, message).fire() if message == "timers" else getattr(
                node, message
            ).end_all()
            continue
        try:
            node.core.handle(wrong, message)
        except ProtocolError:
            break  # it is dropped
        node.core.check()
    node.core.dropped(wrong)
    node.core.check()
    node.core.closed(wrong)
    for _ in range(10):
        node.reads.end_all()
        node.writes.end_all()
        node.timers.fire()

    node.core.check()
    counts = node.core.slots.counts()
    assert (counts.filling, counts.aside, counts.pins) == (0, 0, 0)
    assert not any(node.core.queues().values())
    assert set(node.core.sessions) == {"s"}


def handle(node: Node, message: p.ClientMessage) -> None:
    node.core.handle(node.connection, message)


def test_a_tail_that_is_longer_than_its_block_is_refused_before_it_has_a_slot() -> None:
    node = Node()
    for num_tokens in (4, 5):
        with pytest.raises(ProtocolError, match=f"a tail of {num_tokens} tokens"):
            handle(
                node, p.Reserve(id=1, ns=1, keys=[key(1)], parents=[b""], tail_tokens=num_tokens)
            )
    assert node.core.slots.counts().filling == 0


def test_blocks_that_wait_for_themselves_are_not_waited_for() -> None:
    """Not in one message, and not in several, whatever the order in which they are staged."""
    node = Node()
    with pytest.raises(ProtocolError, match="with a parent that is, or follows, itself"):
        handle(node, p.Commit(ns=1, keys=[key(1)], parents=[key(1)]))
    with pytest.raises(ProtocolError, match="with a parent that is, or follows, itself"):
        handle(node, p.Commit(ns=1, keys=[key(1), key(2)], parents=[key(2), b""]))
    ring = [key(i) for i in range(5)]
    for order in (ring, ring[::-1]):
        node = Node()
        node.reserve(*ring)
        for child in order:
            node.commit(child, parent=ring[(ring.index(child) + 1) % 5])
        node.writes.end_all()
        node.writes.end_all()

        assert node.core.queues()["write_pages"] == 0
        assert node.core.slots.counts().pins == 0


@pytest.mark.parametrize(
    ("parents", "says"),
    [([b"short"], "no key of 32 bytes"), ([], "1 keys with 0"), ([b"", b""], "1 keys with 2")],
)
def test_each_key_has_a_parent_that_is_a_key_or_none(parents: list[bytes], says: str) -> None:
    node = Node()
    with pytest.raises(ProtocolError, match=says):
        handle(node, p.Reserve(id=1, ns=1, keys=[key(1)], parents=parents))
    node.reserve(key(1))
    with pytest.raises(ProtocolError, match=says):
        handle(node, p.Commit(ns=1, keys=[key(1)], parents=parents))


def test_a_page_is_committed_in_the_namespace_that_it_was_reserved_in() -> None:
    node = Node()
    other = p.OpenNamespace(
        ns=2, fingerprint=bytes(32), page_bytes=PAGE, block_tokens=4, manifest=b"{}"
    )
    handle(node, other)
    node.reserve(key(1))
    with pytest.raises(ProtocolError, match="reserved in another namespace"):
        handle(node, p.Commit(ns=2, keys=[key(1)], parents=[b""]))


@pytest.mark.parametrize("kind", [p.Lookup, p.Find, p.Reserve, p.Commit])
def test_a_page_is_not_taken_for_one_of_another_size(kind: type[Any]) -> None:
    """Nobody reads or fills more of the memory than the slot of a key is long."""
    node = Node()
    larger = p.OpenNamespace(
        ns=2, fingerprint=bytes(32), page_bytes=3 * PAGE, block_tokens=4, manifest=b"{}"
    )
    handle(node, larger)
    node.reserve(key(1))
    node.commit(key(1))
    about = {"keys": [key(1)], "parents": [b""], "id": 1, "read_from": 0, "load": True}
    about |= {"storage": True, "timeout_ms": 1000}
    fields = {name: about[name] for name in kind.__struct_fields__ if name in about}
    with pytest.raises(ProtocolError, match="that of a page of another size"):
        handle(node, kind(ns=2, **fields))


def test_a_message_names_no_more_keys_than_it_may() -> None:
    node = Node()
    with pytest.raises(ProtocolError, match="over the limit of 65536"):
        handle(node, p.Find(id=1, ns=1, keys=[key(1)] * 65_537, storage=False, timeout_ms=1))


def test_what_a_client_has_asked_for_and_not_given_back_has_a_bound() -> None:
    node = Node(max_open_keys=10)
    node.store(*map(key, range(4)))
    for number in range(1, 50):
        # Answered and given back: no more of it, however often.
        node.look_up([key(0), key(1)], number=number)
        node.reads.end_all()
        handle(node, p.Release(lookups=[number]))
        node.find(key(8), key(9), number=number)
        node.reads.end_all()
    node.look_up([key(0), key(1)], number=50)
    node.reads.end_all()
    node.look_up([key(2), key(3)], number=51)
    node.find(key(9), number=52)
    too_much = r"more than 10 keys \(node_cache_max_open_keys\)"
    with pytest.raises(ProtocolError, match=too_much):
        node.find(key(8), key(9), number=53)
    with pytest.raises(ProtocolError, match=too_much):
        node.look_up([key(8), key(9)], number=54)


ASKS = st.one_of(
    st.sampled_from(["reads", "writes"]),
    *map(any_of, (p.Lookup, p.Find, p.Release, p.Reserve, p.Commit)),
)


@given(said=st.lists(ASKS, max_size=40))
@settings(max_examples=300, deadline=None)
def test_what_counts_as_asked_is_what_is_open_or_holds_pages(said: list[Any]) -> None:
    node = Node(num_slots=8)
    node.store(*map(key, range(3)))
    for message in said:
        if isinstance(message, str):
            getattr(node, message).end_all()
        else:
            try:
                handle(node, message)
            except ProtocolError:
                return
        core, asked = node.core, node.connection.asked
        lookups = {number for _, number in [*core.lookups._open, *node.connection.session.pinned]}
        finds = {number for _, number in core.finds._open}
        assert asked.open() == {(p.Lookup, n) for n in lookups} | {(p.Find, n) for n in finds}
        assert (asked.num_keys == 0) == (not asked.open())


def test_what_a_lost_scheduler_side_has_reserved_is_not_reused_before_its_ranks_end() -> None:
    node = Node(num_slots=8)
    sides = [
        node.core.connect(p.Hello(version=p.VERSION, session="e", role=role, pid=2), lambda m: None)
        for role in ("scheduler", "worker")
    ]
    node.core.handle(sides[0], NAMESPACE_MESSAGE)
    keys = [key(i) for i in range(4)]
    node.core.handle(sides[0], p.Reserve(id=1, ns=1, keys=keys, parents=[b""] * 4))
    written = {node.core.slots.find(each).offset for each in keys}  # type: ignore[union-attr]

    node.core.closed(sides[0])
    node.reserve(*keys)
    again = [node.core.slots.find(each) for each in keys]

    assert all(slot is not None and slot.state is SlotState.FILLING for slot in again)
    assert not written & {slot.offset for slot in again if slot is not None}
    assert node.core.slots.counts().aside == 4
    node.core.closed(sides[1])
    assert node.core.slots.counts().aside == 0
    node.core.check()
