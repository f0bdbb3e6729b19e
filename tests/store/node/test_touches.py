"""What storage hears of pages that are used."""

from __future__ import annotations

from collections.abc import Sequence

from tests.parts.node import Node, key
from tests.store.tiers.memory_tier import MemoryTier
from ucm.store.blocks.keys import Key
from ucm.store.tiers.tier import TierNamespace


class HearingTier(MemoryTier):
    def __init__(self) -> None:
        super().__init__()
        self.prompts: list[list[Key]] = []
        self.touched: list[Key] = []

    def asked(self, keys: Sequence[Key]) -> None:
        self.prompts.append(list(keys))

    def touch(self, namespace: TierNamespace, keys: Sequence[Key]) -> None:
        self.touched += keys


def _node(*, touch_every_s: float | None = 60.0) -> tuple[Node, HearingTier]:
    tier = HearingTier()
    return Node(tier=tier, touch_every_s=touch_every_s), tier


def _go_on(node: Node) -> None:
    node.reads.end_all()
    node.core.tick()
    node.reads.end_all()


def test_a_prompt_that_is_asked_for_is_heard_of_as_a_whole_and_what_was_there_is_touched() -> None:
    """What is missing will be written, and was asked for by then."""
    node, tier = _node()
    node.store(key(1), key(2))
    node.look_up([key(1), key(2), key(3)], number=1)
    _go_on(node)
    assert tier.prompts == [[key(1), key(2), key(3)]]
    assert set(tier.touched) == {key(1), key(2)}


def test_what_prefill_hands_over_is_no_second_use() -> None:
    node, tier = _node()
    node.store(key(1), key(2))
    node.expect([key(1), key(2)])
    _go_on(node)
    assert node.reply() is not None
    assert not tier.prompts and not tier.touched


def test_a_page_is_touched_once_in_a_while_and_each_prompt_is_heard_of() -> None:
    node, tier = _node()
    node.store(key(1))
    for number in range(4):
        node.look_up([key(1)], number=number)
        _go_on(node)
        node.now_s += 25.0
    assert len(tier.prompts) == 4
    assert tier.touched == [key(1), key(1)]


def test_a_store_without_a_limit_hears_nothing() -> None:
    node, tier = _node(touch_every_s=None)
    node.store(key(1))
    node.look_up([key(1)], number=1)
    _go_on(node)
    assert not tier.prompts and not tier.touched
