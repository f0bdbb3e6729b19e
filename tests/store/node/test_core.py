"""The node cache's decisions against a plain model, with I/O that ends in any order, late or badly.

The model: a block's page is a function of its key. Whatever engines ask, abort, or die, and however
storage answers, a promised offset holds exactly the page of its key until it is released.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from hashlib import sha256

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.parts.laned import LanedTier, lanes_of
from tests.parts.node import node_parts
from tests.parts.pools import DisorderlyPool, Timers
from tests.store.tiers.memory_tier import MemoryTier
from ucm.store.blocks.keys import Key, block_keys, root_key
from ucm.store.node import protocol as p
from ucm.store.node.core import NodeCore
from ucm.store.node.lanes import Lanes
from ucm.store.node.parts import NodeParts
from ucm.store.node.sessions import Connection
from ucm.store.node.slots import SlotTable
from ucm.store.tiers.tier import TierNamespace

PAGE = 4096
NUM_SLOTS = 8
FINGERPRINT = sha256(b"namespace").digest()
NAMESPACE = TierNamespace(fingerprint=FINGERPRINT, page_bytes=PAGE, manifest_json=b"{}")
ROOT = root_key(FINGERPRINT, lora_digest=None, cache_salt=None)
# Prompts that share prefixes: 0 and 1 agree on 4 blocks, 2 is on its own.
TOKENS = [[1] * 4 + [2] * 4, [1] * 4 + [3] * 4, [4] * 8]
PROMPTS = [block_keys(ROOT, tokens, block_tokens=1) for tokens in TOKENS]
PARENT = {key: (chain[i - 1] if i else None) for chain in PROMPTS for i, key in enumerate(chain)}


def content(key: Key) -> bytes:
    return (key * (PAGE // len(key)))[:PAGE]


@dataclass(eq=False)
class Engine:
    connection: Connection
    rank: Connection
    inbox: list[p.NodeMessage]
    asked: dict[int, tuple[list[Key], int]] = field(default_factory=dict)
    promised: dict[int, list[tuple[Key, int]]] = field(default_factory=dict)
    reserving: dict[int, list[Key]] = field(default_factory=dict)
    filling: dict[Key, int] = field(default_factory=dict)


class NodeMachine(RuleBasedStateMachine):
    def make_tier(self) -> MemoryTier:
        return MemoryTier()

    def lanes(self, pool: DisorderlyPool) -> Lanes:
        return Lanes([pool], self.tier)

    def with_more(self, parts: NodeParts) -> NodeParts:
        return parts

    @initialize()
    def start(self) -> None:
        self.memory = bytearray(PAGE * NUM_SLOTS)
        self.view = memoryview(self.memory)
        self.tier = self.make_tier()
        self.reads, self.writes = DisorderlyPool(), DisorderlyPool()
        self.now = 0.0
        self.timers = Timers()
        parts = node_parts(
            SlotTable(PAGE * NUM_SLOTS, extent_bytes=PAGE * 2),
            self.view,
            tier=self.tier,
            reads=self.lanes(self.reads),
            writes=self.lanes(self.writes),
            clock=lambda: self.now,
            call_later=self.timers,
            max_write_pages=6,
        )
        self.core = NodeCore(self.with_more(parts))
        self.tier.open_namespace(NAMESPACE)
        self.engines: list[Engine] = []
        self.ids = iter(range(1, 1_000_000))
        self.published: set[Key] = set()
        self.orphans: list[Engine] = []
        for key in [*PROMPTS[0][:6], *PROMPTS[2]]:
            self.store(key)
        self.connect()

    def store(self, key: Key) -> None:
        staged = self.tier.stage(NAMESPACE, key, memoryview(content(key)), num_tokens=1)
        assert staged is not None
        self.tier.publish(staged)

    # -- engines ---------------------------------------------------------------------------

    @precondition(lambda self: len(self.engines) < 3)
    @rule()
    def connect(self) -> None:
        name = f"engine{next(self.ids)}"
        inbox: list[p.NodeMessage] = []
        hello = p.Hello(version=p.VERSION, session=name, role="scheduler", pid=1)
        connection = self.core.connect(hello, inbox.append)
        rank = self.core.connect(
            p.Hello(version=p.VERSION, session=name, role="worker", pid=2), lambda message: None
        )
        self.core.handle(
            connection,
            p.OpenNamespace(
                ns=1, fingerprint=FINGERPRINT, page_bytes=PAGE, block_tokens=1, manifest=b"{}"
            ),
        )
        self.engines.append(Engine(connection, rank, inbox))

    def engine(self, pick: int) -> Engine:
        return self.engines[pick % len(self.engines)]

    @precondition(lambda self: self.engines)
    @rule(
        pick=st.integers(0, 2),
        prompt=st.sampled_from(PROMPTS),
        length=st.integers(1, 8),
        read_from=st.integers(0, 3),
        load=st.booleans(),
        promised=st.integers(0, 8),
        renewed=st.booleans(),
        cost=st.sampled_from([0.0, 0.0, 0.4, 1.5]),
    )
    def look_up(self, pick, prompt, length, read_from, load, promised, renewed, cost) -> None:
        engine, lookup_id = self.engine(pick), next(self.ids)
        keys = prompt[:length]
        read_from = min(read_from, length)
        engine.asked[lookup_id] = (keys, read_from)
        self.core.handle(
            engine.connection,
            p.Lookup(
                id=lookup_id,
                ns=1,
                keys=list(keys),
                read_from=read_from,
                load=load,
                timeout_ms=1000,
                promised=min(promised, length),
                renewed=renewed,
                costs=p.ReadCosts(2 * cost, cost) if cost else None,
            ),
        )

    @precondition(lambda self: self.engines)
    @rule(pick=st.integers(0, 2), prompt=st.sampled_from(PROMPTS), start=st.integers(0, 7))
    def reserve(self, pick, prompt, start) -> None:
        engine, reserve_id = self.engine(pick), next(self.ids)
        keys = prompt[start : start + 3]
        engine.reserving[reserve_id] = keys
        parents = [PARENT[key] or b"" for key in keys]
        self.core.handle(
            engine.connection, p.Reserve(id=reserve_id, ns=1, keys=list(keys), parents=parents)
        )

    @precondition(lambda self: self.engines)
    @rule(pick=st.integers(0, 2), count=st.integers(1, 3))
    def copy_and_commit(self, pick, count) -> None:
        engine = self.engine(pick)
        # A parent comes before its child in a message, as an engine commits.
        keys = sorted(list(engine.filling)[:count], key=list(PARENT).index)
        for key in keys:
            offset = engine.filling.pop(key)
            self.view[offset : offset + PAGE] = content(key)
        parents = [PARENT[key] or b"" for key in keys]
        self.core.handle(engine.connection, p.Commit(ns=1, keys=list(keys), parents=parents))

    @precondition(lambda self: self.engines)
    @rule(pick=st.integers(0, 2))
    def copy_half_and_abort(self, pick) -> None:
        engine = self.engine(pick)
        for key, offset in list(engine.filling.items())[:1]:
            self.view[offset : offset + PAGE // 2] = b"\xee" * (PAGE // 2)
            del engine.filling[key]
            self.core.handle(engine.connection, p.Abort(ns=1, keys=[key]))

    @precondition(lambda self: self.engines)
    @rule(pick=st.integers(0, 2), which=st.integers(0, 5))
    def release(self, pick, which) -> None:
        engine = self.engine(pick)
        ids = list(engine.promised) + [i for i in engine.asked if i not in engine.promised]
        if ids:
            lookup_id = ids[which % len(ids)]
            engine.promised.pop(lookup_id, None)
            engine.asked.pop(lookup_id, None)
            self.core.handle(engine.connection, p.Release(lookups=[lookup_id]))

    @precondition(lambda self: self.engines and len(self.orphans) < 2)
    @rule(pick=st.integers(0, 2))
    def scheduler_side_dies(self, pick) -> None:
        """Its ranks may copy until they are gone as well."""
        engine = self.engines.pop(pick % len(self.engines))
        self.collect(engine)
        self.core.closed(engine.connection)
        self.orphans.append(engine)

    @precondition(lambda self: self.orphans)
    @rule()
    def orphaned_rank_copies_and_dies(self) -> None:
        engine = self.orphans.pop(0)
        for offset in engine.filling.values():
            self.view[offset : offset + PAGE] = b"\xdd" * PAGE
        self.promised_pages_are_right_until_released()
        self.pages_of(engine)
        self.core.closed(engine.rank)

    # -- storage ---------------------------------------------------------------------------

    @precondition(lambda self: self.reads.jobs)
    @rule(index=st.integers(0, 20), fail=st.sampled_from([False, False, False, True]))
    def read_ends(self, index, fail) -> None:
        self.reads.end(index, fail=fail)

    @precondition(lambda self: self.writes.jobs)
    @rule(index=st.integers(0, 20), fail=st.sampled_from([False, False, False, False, True]))
    def write_ends(self, index, fail) -> None:
        self.writes.end(index, fail=fail)

    @precondition(lambda self: self.reads.jobs and len(self.reads.hung) < 3)
    @rule(index=st.integers(0, 20))
    def read_hangs(self, index) -> None:
        self.reads.hang(index)

    @precondition(lambda self: self.reads.hung)
    @rule()
    def read_returns_late(self) -> None:
        self.reads.return_late()

    @precondition(lambda self: self.timers.waiting)
    @rule()
    def timers_fire(self) -> None:
        self.timers.fire()

    @rule(seconds=st.sampled_from([0.1, 2.0, 100.0]))
    def time_passes(self, seconds) -> None:
        self.now += seconds
        self.core.tick()

    # -- what must hold --------------------------------------------------------------------

    def collect(self, engine: Engine) -> None:
        for message in engine.inbox:
            if isinstance(message, p.LookupReply) and message.id in engine.asked:
                keys, read_from = engine.asked.pop(message.id)
                got = keys[read_from : read_from + len(message.offsets)]
                assert len(message.offsets) in (0, message.num_stored)
                engine.promised[message.id] = list(zip(got, message.offsets, strict=True))
            elif isinstance(message, p.ReserveReply):
                keys = engine.reserving.pop(message.id)
                for key, offset in zip(keys, message.offsets, strict=True):
                    if offset >= 0:
                        engine.filling[key] = offset
        engine.inbox.clear()

    @invariant()
    def promised_pages_are_right_until_released(self) -> None:
        for engine in self.engines:
            self.collect(engine)
            self.pages_of(engine)
        for engine in self.orphans:
            self.pages_of(engine)

    def pages_of(self, engine: Engine) -> None:
        for promises in engine.promised.values():
            for key, offset in promises:
                assert self.view[offset : offset + PAGE] == content(key)

    @invariant()
    def slots_obey_their_conservation_law(self) -> None:
        assert self.core.status(1, pid=1, arena="", check=True).invariant == ""

    @invariant()
    def files_are_right_and_published_in_prompt_order(self) -> None:
        page = memoryview(bytearray(PAGE))
        for key in PARENT:
            if key in self.published or not self.tier.contains(NAMESPACE, [key]):
                continue
            assert self.tier.read(NAMESPACE, key, page).status.name == "HIT"
            assert bytes(page) == content(key)
            self.published.add(key)

    @invariant()
    def nothing_is_held_for_nobody(self) -> None:
        nobody = not self.engines and not self.orphans
        if nobody and not self.reads.depth and not self.writes.depth:
            counts = self.core.slots.counts()
            assert (counts.filling, counts.aside, counts.pins) == (0, 0, 0)
            assert self.core.sessions == {}

    def teardown(self) -> None:
        rng = random.Random(0)
        while self.engines or self.orphans:
            while self.orphans:
                self.orphaned_rank_copies_and_dies()
            if self.engines:
                self.scheduler_side_dies(0)
        for _ in range(2000):
            if self.reads.hung:
                self.reads.return_late()
            elif self.reads.jobs:
                self.reads.end(rng.randrange(100), fail=False)
            elif self.writes.jobs:
                self.writes.end(rng.randrange(100), fail=False)
        assert self.reads.depth == self.writes.depth == 0
        self.nothing_is_held_for_nobody()
        self.slots_obey_their_conservation_law()


class TwoLanesMachine(NodeMachine):
    """The same over storage whose parts hang each by itself."""

    def make_tier(self) -> MemoryTier:
        return LanedTier()

    def lanes(self, pool: DisorderlyPool) -> Lanes:
        assert isinstance(self.tier, LanedTier)
        return lanes_of(pool, self.tier)


TwoLanesMachine.TestCase.settings = settings(max_examples=75, stateful_step_count=60, deadline=None)
TestTwoLanesMachine = TwoLanesMachine.TestCase
NodeMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestNodeMachine = NodeMachine.TestCase
