"""How often storage is asked: by a long prompt, by one that is not there, by many that wait."""

from __future__ import annotations

from math import log2

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parts.node import NAMESPACE, Node, key
from tests.store.node.test_by_order import FarTier
from tests.store.node.test_doubts import BlindTier
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p
from ucm.store.node.promised_pages import (
    FIRST_DOUBT_S,
    FIRST_PAUSE_S,
    LAST_PAUSE_S,
    due_pause_s,
)

KEYS = [key(i) for i in range(1200)]


def replies(node: Node) -> dict[int, p.LookupReply]:
    return {each.id: each for each in node.inbox if isinstance(each, p.LookupReply)}


def finish(node: Node) -> None:
    while node.reads.jobs:
        node.reads.end_all()


def node_with(num_stored: int) -> tuple[Node, FarTier]:
    tier = FarTier()
    node = Node(tier=tier, num_slots=len(KEYS), max_open_keys=10_000)
    node.store(*KEYS[:num_stored])
    tier.num_asked = 0
    return node, tier


@given(st.integers(1, len(KEYS)), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_questions_grow_with_the_logarithm_of_a_prompt(count: int, share: float) -> None:
    num_stored = round(share * count)
    node, tier = node_with(num_stored)
    node.look_up(KEYS[:count], number=1)
    finish(node)

    assert len(replies(node)[1].offsets) == num_stored
    # Two for each group, which is at least three times as long as the one before; and where the
    # prefix ends, one for each halving of the group and one for each group behind it.
    most_full, most_halvings = 2 * (2 + log2(count) / log2(3)), log2(count) + 1
    is_whole = num_stored == count
    assert tier.num_asked <= most_full + (0 if is_whole else most_halvings)


@pytest.mark.parametrize(("num_stored", "most"), [(100, 12), (0, 1)])
def test_a_hundred_blocks_that_are_there_take_few_questions_and_a_miss_takes_one(
    num_stored: int, most: int
) -> None:
    node, tier = node_with(num_stored)
    node.look_up(KEYS[:100], number=1)
    finish(node)

    assert len(replies(node)[1].offsets) == num_stored
    assert tier.num_asked <= most


# -- many wait for one prompt ----------------------------------------------------------------


def polls(*, num_waiting: int, num_rounds: int = 40) -> int:
    """Questions while they wait, the first from the start and another each round, and while all of
    them find the prompt."""
    node, tier = node_with(0)
    for turn in range(num_rounds):
        if turn < num_waiting:
            node.expect(KEYS[:60], number=turn, timeout_ms=60_000)
        finish(node)
        node.now_s += LAST_PAUSE_S
        node.timers.fire()
    before = tier.num_asked
    node.store(*KEYS[:60])
    tier.num_asked = before
    node.timers.fire()
    finish(node)
    assert [len(each.offsets) for each in replies(node).values()] == [60] * num_waiting
    return tier.num_asked


def test_any_number_that_wait_for_a_prompt_ask_as_often_as_one() -> None:
    alone = polls(num_waiting=1)

    # A look when one comes: two questions.
    assert alone + 2 * 19 >= polls(num_waiting=20)


def test_who_comes_later_waits_as_long_for_the_next_look_as_the_others() -> None:
    node, _tier = node_with(0)
    node.expect(KEYS[:20], number=1)
    for _ in range(10):
        finish(node)
        node.timers.fire()
    finish(node)
    node.expect(KEYS[:20], number=2)
    finish(node)

    assert [pause_s for pause_s, _ in node.timers.waiting[-2:]] == [LAST_PAUSE_S] * 2


def test_who_waits_for_less_of_a_prompt_is_not_told_of_more() -> None:
    node, _tier = node_with(0)
    node.expect(KEYS[:20], number=1)
    node.expect(KEYS[:10], number=2)
    finish(node)
    node.store(*KEYS[:10])
    node.timers.fire()
    finish(node)

    assert {number: len(each.offsets) for number, each in replies(node).items()} == {2: 10}


def test_those_who_keep_coming_put_off_nobody_s_doubt() -> None:
    tier = BlindTier()
    node = Node(tier=tier)
    for number in range(20):
        node.expect(KEYS[:20], number=number)
        node.reads.end_all()
        node.now_s += FIRST_DOUBT_S / 10
        node.timers.fire()

    assert tier.doubted[:2] == [KEYS[0], KEYS[19]]


_PROMPTS: list[list[Key]] = [KEYS[:12], KEYS[:5], [*KEYS[:5], *KEYS[100:110]], KEYS[200:230]]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("ask"), st.integers(0, 3)),
            st.tuples(st.just("store"), st.integers(0, 3)),
            st.tuples(st.just("withdraw"), st.integers(0, 30)),
            st.tuples(st.just("end"), st.integers(0, 30)),
            st.tuples(st.just("fire"), st.just(0)),
        ),
        max_size=60,
    )
)
@settings(deadline=None)
def test_whoever_waits_with_whom_all_get_their_prompt_in_the_end(
    events: list[tuple[str, int]],
) -> None:
    node = Node(tier=FarTier(), num_slots=256, max_open_keys=10_000)
    asked: dict[int, int] = {}
    stored = [0] * len(_PROMPTS)
    for number, (what, which) in enumerate(events):
        if what == "ask":
            node.expect(_PROMPTS[which], number=number, timeout_ms=60_000)
            asked[number] = which
        elif what == "store":
            prompt = _PROMPTS[which]
            node.store(
                *(
                    each
                    for each in prompt[stored[which] : stored[which] + 4]
                    if not node.tier.contains(NAMESPACE, [each])
                )
            )
            stored[which] += 4
        elif what == "withdraw" and which in asked and which not in replies(node):
            node.release(which)
            del asked[which]
        elif what == "end" and node.reads.jobs:
            node.reads.end(which)
        elif what == "fire":
            node.now_s += LAST_PAUSE_S
            node.timers.fire()
        node.core.check()
    for prompt in _PROMPTS:
        node.store(*(each for each in prompt if not node.tier.contains(NAMESPACE, [each])))
    for _ in range(4):
        finish(node)
        node.now_s += LAST_PAUSE_S
        node.timers.fire()
    finish(node)

    found = {number: len(each.offsets) for number, each in replies(node).items()}
    assert {number: found.get(number) for number in asked} == {
        number: len(_PROMPTS[which]) for number, which in asked.items()
    }


def test_a_look_that_finds_nothing_asks_for_the_first_block_alone_until_it_is_time_to_doubt() -> (
    None
):
    node, tier = node_with(0)
    node.expect(KEYS[:20], number=1, timeout_ms=60_000)
    asked = []
    for _ in range(3):
        tier.num_asked = 0
        finish(node)
        asked.append(tier.num_asked)
        node.timers.fire()
    assert asked == [2, 1, 1]

    node.now_s += FIRST_DOUBT_S
    tier.num_asked = 0
    finish(node)
    node.timers.fire()
    finish(node)
    assert tier.num_asked >= 2


def test_the_last_block_that_is_there_without_the_first_is_found_when_it_is_time_to_doubt() -> None:
    """Somebody removes the beginning of a prompt that another waits for."""
    node, _tier = node_with(0)
    node.expect(KEYS[:20], number=1, timeout_ms=60_000)
    for _ in range(3):
        finish(node)
        node.timers.fire()
    finish(node)
    node.store(*KEYS[5:20])
    node.now_s += FIRST_DOUBT_S
    for _ in range(3):
        node.timers.fire()
        finish(node)

    assert [len(each.offsets) for each in replies(node).values()] == [0]


def test_where_storage_is_slow_a_look_comes_no_sooner_than_the_last_one_took() -> None:
    node, _tier = node_with(0)
    node.expect(KEYS[:20], number=1, timeout_ms=60_000)
    node.now_s += 20 * FIRST_PAUSE_S
    finish(node)
    assert node.timers.waiting[-1][0] == pytest.approx(20 * FIRST_PAUSE_S)

    # One that hung for long is no reason to wait longer than ever.
    node.timers.fire()
    node.now_s += 10 * LAST_PAUSE_S
    finish(node)
    assert node.timers.waiting[-1][0] == pytest.approx(LAST_PAUSE_S)


def test_pages_that_come_one_after_the_other_are_looked_for_when_more_of_them_are_due() -> None:
    node, tier = node_with(0)
    node.expect(KEYS[:60], number=1, timeout_ms=60_000)
    finish(node)
    tier.num_asked = num_looks = num_stored = 0
    while not replies(node):
        pause_s = node.timers.waiting[-1][0]
        # A page each 3 ms.
        node.now_s += pause_s
        due = min(60, int(node.now_s / 0.003))
        asked = tier.num_asked
        if due > num_stored:
            node.store(*KEYS[num_stored:due])
        num_stored, tier.num_asked = max(due, num_stored), asked
        node.timers.fire()
        finish(node)
        num_looks += 1

    # A look each millisecond would be 180 of them. The prompt is there within two pages' time.
    assert num_looks <= 30
    assert node.now_s <= 0.003 * 62


@given(st.integers(1, 100), st.floats(0, 10), st.integers(0, 4000))
def test_the_pause_after_a_find_is_never_long_and_none_after_a_burst(
    num_found: int, in_s: float, num_left: int
) -> None:
    pause_s = due_pause_s(num_found, in_s, num_left)

    assert FIRST_PAUSE_S <= pause_s <= LAST_PAUSE_S / 2
    if in_s > LAST_PAUSE_S:
        assert pause_s == FIRST_PAUSE_S
