"""Simulated stores of a fixed number of pages, by what goes when they are full.

Each policy replays a trace and returns the share of blocks that are hits. A request looks up its
prompt, uses what is there, and writes what is not; then the store shrinks to its capacity.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Container
from heapq import heapify, heappop, heappush
from typing import Final

from benchmarks.request_trace import Trace, TracedRequest
from ucm.store.blocks.keys import Key
from ucm.store.tiers.posix.recall import Recall
from ucm.store.tiers.posix.reclaim_plan import WHOLE, StoredFile, Want, choose_from_pool, want_of

# Whether it is no tail, and its score: the lowest goes first.
Order = tuple[bool, int]
# Of the block `depth` of request `number`; `before` is the order that it has, if it is there.
OrderOf = Callable[[int, int, Order | None], Order]

# A use that never comes, as the number of a request; and more than any depth.
_NEVER: Final = 1 << 40
_DEPTHS: Final = 1 << 20
# As reclaim does by default: what it frees at once, how many files it looks at, and remembers.
_RECYCLED: Final = 0.1
_POOL_FILES: Final = 512
_SEEN_FILES: Final = 1024


class Kept(dict[Key, Order]):
    """What is there. Shrinks exactly, one by one."""

    def __init__(self) -> None:
        super().__init__()
        self._heap: list[tuple[Order, Key]] = []

    def put(self, key: Key, order: Order) -> None:
        self[key] = order
        heappush(self._heap, (order, key))
        if len(self._heap) > 4 * len(self) + 1000:
            self._heap = [(order, key) for key, order in self.items()]
            heapify(self._heap)

    def shrink(self, capacity: int) -> None:
        while len(self) > capacity:
            order, key = heappop(self._heap)
            if self.get(key) == order:
                del self[key]


class ReclaimedKept(Kept):
    """Shrinks as runs of reclaim do: by a share at once, of pools of files."""

    def __init__(self) -> None:
        super().__init__()
        self._random = random.Random(1)

    def put(self, key: Key, order: Order) -> None:
        self[key] = order

    def shrink(self, capacity: int) -> None:
        want = want_of(used_bytes=len(self), limit_bytes=capacity, trigger=1.0, share=_RECYCLED)
        if want is None or len(self) <= capacity:
            return
        keys = list(self)
        self._random.shuffle(keys)
        seen: deque[StoredFile] = deque(maxlen=_SEEN_FILES)
        for begin in range(0, len(keys), _POOL_FILES):
            pool = [self._file(key) for key in keys[begin : begin + _POOL_FILES]]
            goes = choose_from_pool(pool, {WHOLE: want}, seen={WHOLE: seen}, now_ns=0, grace_s=0.0)
            seen.extend(pool)
            for file in goes:
                del self[Key(bytes.fromhex(file.name))]
            if len(goes) >= want.free_bytes:
                break
            want = Want(want.free_bytes - len(goes), want.share)

    def _file(self, key: Key) -> StoredFile:
        no_tail, score_ns = self[key]
        return StoredFile(key.hex(), 1, score_ns, changed_ns=0, is_tail=not no_tail)


def fifo(trace: Trace, capacity: int, kept: Kept) -> float:
    at_ns = [request.at_ns for request in trace.requests]
    return _replay(trace, capacity, lambda n, i, before: before or (True, at_ns[n] - i), kept)


def lru(trace: Trace, capacity: int, kept: Kept) -> float:
    at_ns = [request.at_ns for request in trace.requests]
    return _replay(trace, capacity, lambda n, i, _: (True, at_ns[n] - i), kept)


def optimum(trace: Trace, capacity: int, kept: Kept) -> float:
    """Belady's: the block whose next use is furthest away goes first."""
    next_use: dict[Key, int] = {}
    next_uses: list[list[int]] = []
    for number, request in reversed(list(enumerate(trace.requests))):
        next_uses.append([next_use.get(key, _NEVER) for key in request.keys])
        next_use.update(dict.fromkeys(request.keys, number))
    next_uses.reverse()
    return _replay(trace, capacity, lambda n, i, _: (True, -next_uses[n][i] * _DEPTHS - i), kept)


def ours(trace: Trace, capacity: int, kept: Kept, *, num_nodes: int) -> float:
    """Each request comes to one of some nodes, at random."""
    nodes = [Recall() for _ in range(num_nodes)]
    at_random = random.Random(1)
    node = nodes[0]

    def order(number: int, depth: int, before: Order | None) -> Order:
        nonlocal node
        request = trace.requests[number]
        if depth == 0:
            node = at_random.choice(nodes)
            node.use(request.keys, request.at_ns)
        return _scored(node, request, depth, before)

    return _replay(trace, capacity, order, kept)


def _scored(node: Recall, request: TracedRequest, depth: int, before: Order | None) -> Order:
    key, at_ns = request.keys[depth], request.at_ns
    if before is None:
        is_tail = request.has_tail and depth == len(request.keys) - 1
        return (not is_tail, node.first_score_ns(key, at_ns))
    no_tail, score_ns = before
    used_ns = node.used_score_ns(key, score_ns, at_ns)
    return before if used_ns is None else (no_tail, used_ns)


def _replay(trace: Trace, capacity: int, order: OrderOf, kept: Kept) -> float:
    hits = 0
    for number, request in enumerate(trace.requests):
        hits += _leading(request, kept)
        for depth, key in enumerate(request.keys):
            kept.put(key, order(number, depth, kept.get(key)))
        kept.shrink(capacity)
    return hits / trace.num_blocks


def _leading(request: TracedRequest, kept: Container[Key]) -> int:
    """How many of the first blocks are there."""
    return next((i for i, key in enumerate(request.keys) if key not in kept), len(request.keys))
