"""A node of a modelled fleet: the real decisions of a node cache, and an engine of so many tokens a
second before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Final

from benchmarks.fleet_world import FleetPool, FleetTier, World
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p
from ucm.store.node.core import NodeCore
from ucm.store.node.lanes import Lanes
from ucm.store.node.notices import Notices
from ucm.store.node.parts import NodeLimits, NodeParts
from ucm.store.node.slots import SlotTable

_FINGERPRINT: Final = sha256(b"fleet").digest()
_TICK_S: Final = 0.25
_TIMEOUT_MS: Final = 30_000
# Prompts are computed in pieces of so many blocks; each is dumped when it is computed.
_PIECE_BLOCKS: Final = 16


@dataclass(frozen=True)
class NodeSizes:
    """`block_tokens` of a page of `page_bytes`; the engine computes `tokens_per_s`."""

    page_bytes: int
    block_tokens: int
    memory_pages: int
    num_threads: int
    tokens_per_s: float
    touch_every_s: float


@dataclass(eq=False)
class Job:
    """One request on one node: `on_done(hit blocks)`."""

    keys: Sequence[Key]
    tokens: int
    on_done: Callable[[int], None]


class FleetNode:
    """One engine and its node cache."""

    def __init__(self, world: World, tier: FleetTier, sizes: NodeSizes) -> None:
        self._world, self._sizes = world, sizes
        filesystem = tier.filesystem
        reads, writes = (FleetPool(filesystem, tier, sizes.num_threads) for _ in range(2))
        slot_bytes = -(-sizes.page_bytes // 4096) * 4096
        parts = NodeParts(
            slots=SlotTable(sizes.memory_pages * slot_bytes, extent_bytes=slot_bytes),
            tier=tier,
            reads=Lanes([reads], tier),
            writes=Lanes([writes], tier),
            control=Lanes([writes], tier),
            page_of=lambda slot: memoryview(b""),
            populate=lambda offset, nbytes, on_done: None,
            clock=world.clock,
            call_later=world.later,
            notices=Notices(world.clock),
            limits=NodeLimits(
                ahead_bytes=0, max_write_pages=1000, touch_every_s=sizes.touch_every_s
            ),
        )
        self.core = NodeCore(parts)
        self._answers: dict[int, Callable[[p.LookupReply], None]] = {}
        self._reserved: list[int] = []
        self._number = 0
        self._engine_free_s = 0.0
        hello = p.Hello(version=p.VERSION, session="fleet", role="store", pid=1)
        self._connection = self.core.connect(hello, self._hear)
        self._send(
            p.OpenNamespace(
                ns=1,
                fingerprint=_FINGERPRINT,
                page_bytes=sizes.page_bytes,
                block_tokens=sizes.block_tokens,
                manifest=b"{}",
            )
        )
        self._tick()

    def _tick(self) -> None:
        self.core.tick()
        self._world.later(_TICK_S, self._tick)

    def _send(self, message: p.ClientMessage) -> None:
        self.core.handle(self._connection, message)

    def _hear(self, message: p.NodeMessage) -> None:
        if isinstance(message, p.LookupReply):
            self._world.later(0.0, partial(self._answers.pop(message.id), message))
        elif isinstance(message, p.ReserveReply):
            self._reserved = message.offsets

    def _look_up(
        self, keys: Sequence[Key], promised: int, then: Callable[[p.LookupReply], None]
    ) -> int:
        self._number += 1
        self._answers[self._number] = then
        self._send(
            p.Lookup(
                id=self._number,
                ns=1,
                keys=list(keys),
                read_from=0,
                load=True,
                timeout_ms=_TIMEOUT_MS,
                promised=promised,
            )
        )
        return self._number

    # -- prefill -----------------------------------------------------------------------------

    def prefill(self, job: Job) -> None:
        """Loads what is there, computes the rest and dumps it."""
        self._look_up(job.keys, 0, partial(self._compute, job))

    def _compute(self, job: Job, reply: p.LookupReply) -> None:
        hit = len(reply.offsets)
        new = list(job.keys[hit:])
        parents = [b"", *job.keys][hit : hit + len(new)]
        kept: list[Key] = []
        if new:
            self._number += 1
            self._send(p.Reserve(id=self._number, ns=1, keys=list(new), parents=list(parents)))
            there = [i for i, offset in enumerate(self._reserved) if offset >= 0]
            kept, parents = [new[i] for i in there], [parents[i] for i in there]
        begin_s = max(self._world.now_s, self._engine_free_s)
        tokens = max(1, job.tokens - hit * self._sizes.block_tokens)
        self._engine_free_s = begin_s + tokens / self._sizes.tokens_per_s
        piece_s = _PIECE_BLOCKS * self._sizes.block_tokens / self._sizes.tokens_per_s
        for number, first in enumerate(range(0, len(kept), _PIECE_BLOCKS)):
            piece = slice(first, first + _PIECE_BLOCKS)
            at_s = min(begin_s + (number + 1) * piece_s, self._engine_free_s)
            commit = p.Commit(ns=1, keys=list(kept[piece]), parents=list(parents[piece]))
            self._world.later(at_s - self._world.now_s, partial(self._send, commit))
        self._world.later(
            self._engine_free_s - self._world.now_s, partial(self._end, job, reply.id, hit)
        )

    def _end(self, job: Job, lookup: int, hit: int) -> None:
        self._send(p.Release(lookups=[lookup]))
        job.on_done(hit)

    # -- decode ------------------------------------------------------------------------------

    def decode(self, job: Job) -> None:
        """Waits for the pages that prefill promises; computes what does not come."""
        self._look_up(job.keys, len(job.keys), partial(self._loaded, job))

    def _loaded(self, job: Job, reply: p.LookupReply) -> None:
        hit = len(reply.offsets)
        missing = max(1, job.tokens - hit * self._sizes.block_tokens)
        pause_s = missing / self._sizes.tokens_per_s
        self._world.later(pause_s, partial(self._end, job, reply.id, hit))
