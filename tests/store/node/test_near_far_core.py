"""The node cache's decisions with two tiers behind its memory, against the plain model."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from tests.parts.pools import SharedPool
from tests.store.node import test_core as plain
from tests.store.node.test_core import FINGERPRINT, NAMESPACE, PAGE, PARENT, PROMPTS, content
from tests.store.tiers.memory_tier import MemoryTier
from ucm.store.blocks.keys import Key
from ucm.store.node.lanes import Lanes
from ucm.store.node.parts import Behind, NodeParts, far_parts


class NearFarMachine(plain.NodeMachine):
    """The same with a tier behind it, which has some of what near has and some of what it lacks."""

    def with_more(self, parts: NodeParts) -> NodeParts:
        self.far = MemoryTier()
        self.far_published: set[Key] = set()
        for key in [*PROMPTS[0][4:], *PROMPTS[1]]:
            if not self.far.contains(NAMESPACE, [key]):
                staged = self.far.stage(NAMESPACE, key, memoryview(content(key)), num_tokens=1)
                assert staged is not None
                self.far.publish(staged)
        # Calls of both end in one disorder.
        reads, writes = (Lanes([SharedPool(pool)], self.far) for pool in (self.reads, self.writes))
        return replace(parts, far=far_parts(parts, Behind(self.far, reads, writes, writes)))

    @rule(key=st.sampled_from(list(PARENT)), is_far=st.booleans())
    def a_page_is_removed(self, key, is_far) -> None:
        (self.far if is_far else self.tier)._pages.pop((FINGERPRINT, key), None)

    @invariant()
    def what_is_far_is_right(self) -> None:
        page = memoryview(bytearray(PAGE))
        for key in set(PARENT) - self.far_published:
            if self.far.read(NAMESPACE, key, page).status.name == "HIT":
                assert bytes(page) == content(key)
                self.far_published.add(key)


NearFarMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
TestNearFarMachine = NearFarMachine.TestCase
