"""A real node cache core behind NodeLink's interface, in virtual time: its storage is slow, fails
and hangs, its answers are late, it dies, and connections to it break."""

from __future__ import annotations

import random
from collections import deque

from tests.integration.vllm.storm_device import page_differs
from tests.parts.node import node_parts
from tests.parts.pools import DisorderlyPool, Timers
from tests.store.tiers.memory_tier import MemoryTier
from ucm.store.blocks.keys import Key
from ucm.store.blocks.page_layout import PageGeometry
from ucm.store.client.answers import Answers
from ucm.store.node import protocol as p
from ucm.store.node.core import NodeCore
from ucm.store.node.lanes import Lanes
from ucm.store.node.sessions import Connection
from ucm.store.node.slots import SlotTable


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def time(self) -> float:
        return self.now_s


class StormNode:
    def __init__(
        self,
        clock: Clock,
        rng: random.Random,
        geometry: PageGeometry,
        *,
        num_slots: int,
        num_ranks: int,
        keeps_unpinned: bool,
    ) -> None:
        self.generation, self.ranks_ready = 0, 0
        self.client: Connection | None = None
        self.tier = MemoryTier()
        # What the tokens of each key say that its page holds.
        self.expected: dict[Key, list[int]] = {}
        # The first blocks of prompts.
        self.heads: set[Key] = set()
        self.committed = 0
        self.calm = False
        self._clock, self._rng, self._geometry = clock, rng, geometry
        self._num_slots, self._num_ranks = num_slots, num_ranks
        self._keeps_unpinned = keeps_unpinned
        self._inbox: deque[p.NodeMessage] = deque()
        self._down_until_s, self._mute_until_s = 0.0, 0.0
        self._memories: dict[int, memoryview] = {}
        # Of connections that broke: ranks hold on to them until their copies have ended.
        self._held: list[tuple[int, NodeCore, list[Connection]]] = []
        self._workers: list[Connection] = []
        self._start()

    # -- NodeLink ----------------------------------------------------------------------------

    def poll(self, timeout_s: float = 0.0) -> list[p.NodeMessage]:
        self._clock.now_s += timeout_s + 1e-6  # a clock never stands still
        self._connect_if_due()
        is_mute = self._clock.now_s < self._mute_until_s and not self.calm
        if self.client is None or is_mute:
            return []
        count = len(self._inbox) if self.calm else self._rng.randint(0, len(self._inbox))
        messages = [self._inbox.popleft() for _ in range(count)]
        for message in messages:
            self._answers.check(message)
            if isinstance(message, p.RanksReady):
                self.ranks_ready = message.count
        return messages

    def send(self, message: p.ClientMessage) -> bool:
        if self.client is None:
            return False
        self._answers.asked(message)
        (body,) = p.FrameBuffer().feed(p.encode(message))
        message = p.decode_client(body)
        if isinstance(message, p.GetStatus):
            self._inbox.append(self.core.status(message.id, pid=1, arena="", check=False))
            return True
        ready = {key for key in getattr(message, "keys", ()) if self._is_ready(Key(key))}
        self.core.handle(self.client, message)
        if isinstance(message, p.Commit):
            for key in map(Key, message.keys):
                if key not in ready and self._is_ready(key):
                    self.committed += 1
                    self._check_slot(key)
        return True

    def close(self) -> None:
        pass

    # -- what happens to it ------------------------------------------------------------------

    def memory_of(self, generation: int) -> memoryview | None:
        return self._memories.get(generation)

    @property
    def is_writing(self) -> bool:
        return bool(self._writes.jobs or self._writes.hung)

    def tick(self, used_generations: set[int]) -> None:
        """Storage and timers go on; ranks let go of what they need no more."""
        self._go_on(self._reads)
        self._go_on(self._writes)
        if self.calm or self._chance(0.3):
            self._timers.fire()
        self.core.tick()
        for held in list(self._held):
            generation, core, connections = held
            if generation not in used_generations:
                self._held.remove(held)
                for connection in connections:
                    core.closed(connection)
        for generation in list(self._memories):
            if generation < self.generation and generation not in used_generations:
                del self._memories[generation]

    def _go_on(self, pool: DisorderlyPool) -> None:
        for _ in range(len(pool.jobs) if self.calm else self._rng.randint(0, 4)):
            if pool.jobs:
                pool.end(self._rng.randrange(1 << 30), fail=self._chance(0.03))
        if pool.jobs and not pool.hung and self._chance(0.02):
            pool.hang(self._rng.randrange(len(pool.jobs)))
        if pool.hung and (self.calm or self._chance(0.2)):
            pool.return_late()

    def die(self) -> None:
        """With all of its memory; another one comes later."""
        self._lose()
        self._held.clear()  # what they held on to is nobody's any more
        self._start()

    def break_connection(self) -> None:
        """The node cache lives on, and so does what the ranks still copy."""
        workers, client = self._workers, self.client
        self._lose()
        if client is not None:
            self.core.closed(client)
            self._held.append((self.generation - 1, self.core, workers))
        self._memories[self.generation] = self._memory

    def mute(self, for_s: float) -> None:
        self._mute_until_s = self._clock.now_s + for_s

    def forget_files(self, share: float) -> None:
        for stored in list(self.tier._pages):
            if self._rng.random() < share:
                del self.tier._pages[stored]

    def lose_heads(self) -> None:
        """In files and in memory, while what follows them stays."""
        for stored in list(self.tier._pages):
            if stored[1] in self.heads:
                del self.tier._pages[stored]
        self.die()

    def _lose(self) -> None:
        if self.client is not None:
            self.generation += 1
        else:
            self._memories.pop(self.generation, None)
        self.client, self.ranks_ready, self._workers = None, 0, []
        self._inbox.clear()
        self._down_until_s = self._clock.now_s + self._rng.choice((0.0, 0.05, 1.0))

    def _start(self) -> None:
        slot_bytes = self._geometry.slot_bytes
        slots = SlotTable(
            self._num_slots * slot_bytes,
            extent_bytes=slot_bytes,
            keeps_unpinned=self._keeps_unpinned,
        )
        memory = memoryview(bytearray(slots.capacity_bytes))
        self._memory = self._memories[self.generation] = memory
        self._reads, self._writes, self._timers = DisorderlyPool(), DisorderlyPool(), Timers()
        parts = node_parts(
            slots,
            memory,
            tier=self.tier,
            reads=Lanes([self._reads], self.tier),
            writes=Lanes([self._writes], self.tier),
            clock=self._clock.monotonic,
            call_later=self._timers,
            max_write_pages=12,
        )
        self.core = NodeCore(parts)

    def _connect_if_due(self) -> None:
        if self.client is not None or self._clock.now_s < self._down_until_s:
            return
        session = f"e/{self.generation}"
        hello = p.Hello(version=p.VERSION, session=session, role="scheduler", pid=1)
        self.client = self.core.connect(hello, self._inbox.append)
        self._answers = Answers(self.core.slots.capacity_bytes)
        for _ in range(self._num_ranks):
            hello = p.Hello(version=p.VERSION, session=session, role="worker", pid=1)
            worker = self.core.connect(hello, lambda message: None)
            self.core.handle(worker, p.MemoryReady())
            self._workers.append(worker)

    def _chance(self, probability: float) -> bool:
        return not self.calm and self._rng.random() < probability

    # -- right or absent ---------------------------------------------------------------------

    def _is_ready(self, key: Key) -> bool:
        slot = self.core.slots.find(key)
        return slot is not None and slot.state.value == "ready"

    def _check_slot(self, key: Key) -> None:
        slot = self.core.slots.find(key)
        assert slot is not None
        page = self._memory[slot.offset : slot.offset + self._geometry.slot_bytes]
        wrong = page_differs(page, self.expected[key], num_ranks=self._num_ranks)
        assert not wrong, f"a page with another one's content was committed: {wrong}"

    def check(self) -> None:
        """Everything that could be read has the content of its tokens."""
        self.core.check()
        for key in self.expected:
            if self._is_ready(key):
                self._check_slot(key)
        for (_, stored), page in self.tier._pages.items():
            wrong = page_differs(memoryview(page), self.expected[stored], num_ranks=self._num_ranks)
            assert not wrong, f"a file with another one's content: {wrong}"
