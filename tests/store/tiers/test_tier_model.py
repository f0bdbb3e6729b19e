"""Hypothesis drives a tier and a dict through the same steps; they must never differ."""

from __future__ import annotations

import tempfile

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)

from tests.store.tiers.memory_tier import MemoryTier
from tests.store.tiers.tier_contract import (
    BLOCK_TOKENS,
    ODD,
    SMALL,
    content_of,
    load,
    make_key,
    make_page,
)
from ucm.store.blocks.keys import Key
from ucm.store.tiers.posix.tier import PosixTier
from ucm.store.tiers.tier import ReadStatus, Staged, Tier, TierNamespace


class TierAgainstDict(RuleBasedStateMachine):
    """Subclasses say how to make the tier."""

    staged = Bundle("staged")
    _namespaces = st.sampled_from([SMALL, ODD])
    _keys = st.integers(0, 3).map(make_key)

    def make_tier(self) -> Tier:
        raise NotImplementedError

    @initialize()
    def start(self) -> None:
        self.tier = self.make_tier()
        self.model: dict[tuple[bytes, Key], bytes] = {}
        self.tier.open_namespace(SMALL)

    @rule(namespace=_namespaces)
    def open_namespace(self, namespace: TierNamespace) -> None:
        self.tier.open_namespace(namespace)

    @rule(target=staged, namespace=_namespaces, key=_keys, seed=st.integers(0, 9))
    def stage(self, namespace: TierNamespace, key: Key, seed: int) -> tuple[Staged, bytes] | None:
        page = make_page(namespace, seed)
        staged = self.tier.stage(namespace, key, page, num_tokens=BLOCK_TOKENS)
        assert (staged is None) == ((namespace.fingerprint, key) in self.model)
        return None if staged is None else (staged, content_of(namespace, page))

    @rule(pair=consumes(staged))
    def publish(self, pair: tuple[Staged, bytes] | None) -> None:
        if pair is not None:
            staged, content = pair
            self.tier.publish(staged)
            self.model[staged.namespace.fingerprint, staged.key] = content

    @rule(pair=consumes(staged))
    def discard(self, pair: tuple[Staged, bytes] | None) -> None:
        if pair is not None:
            self.tier.discard(pair[0])

    @rule(namespace=_namespaces, keys=st.lists(_keys, max_size=6))
    def contains(self, namespace: TierNamespace, keys: list[Key]) -> None:
        expected = 0
        while expected < len(keys) and (namespace.fingerprint, keys[expected]) in self.model:
            expected += 1
        assert self.tier.contains(namespace, keys) == expected

    @rule(namespace=_namespaces, key=_keys)
    def read(self, namespace: TierNamespace, key: Key) -> None:
        expected = self.model.get((namespace.fingerprint, key), ReadStatus.ABSENT)
        assert load(self.tier, namespace, key) == expected

    @invariant()
    def the_tier_holds_what_the_dict_holds(self) -> None:
        for namespace in (SMALL, ODD):
            for i in range(4):
                present = (namespace.fingerprint, make_key(i)) in self.model
                assert self.tier.contains(namespace, [make_key(i)]) == present


class PosixTierAgainstDict(TierAgainstDict):
    num_backends = 1

    def make_tier(self) -> Tier:
        self.directory = tempfile.TemporaryDirectory()
        return PosixTier([f"{self.directory.name}/{i}" for i in range(self.num_backends)])

    def teardown(self) -> None:
        if hasattr(self, "directory"):
            self.directory.cleanup()


class PosixTierOnTwoBackendsAgainstDict(PosixTierAgainstDict):
    num_backends = 2


class MemoryTierAgainstDict(TierAgainstDict):
    def make_tier(self) -> Tier:
        return MemoryTier()


for _machine in (
    MemoryTierAgainstDict,
    PosixTierAgainstDict,
    PosixTierOnTwoBackendsAgainstDict,
):
    _machine.TestCase.settings = settings(max_examples=25, deadline=None)
test_a_memory_tier_agrees_with_a_dict = MemoryTierAgainstDict.TestCase
test_a_posix_tier_agrees_with_a_dict = PosixTierAgainstDict.TestCase
test_a_posix_tier_on_two_backends_agrees_with_a_dict = PosixTierOnTwoBackendsAgainstDict.TestCase
