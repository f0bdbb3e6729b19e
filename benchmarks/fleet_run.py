"""One run of a modelled fleet: requests come, the proxy chooses, nodes answer, reclaim deletes."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, Final, TypeVar

from yarl import URL

from benchmarks.fleet_node import FleetNode, Job, NodeSizes
from benchmarks.fleet_world import KINDS, Charge, Filesystem, FleetTier, Server, World
from benchmarks.request_trace import BLOCK_TOKENS, TracedRequest
from ucm.pd.flags import ProxySettings
from ucm.pd.fleet.affinity import Prefix
from ucm.pd.fleet.instance import Instance, Role
from ucm.pd.fleet.pool import Pool, PoolRules
from ucm.store.blocks.keys import Key
from ucm.store.tiers.posix.reclaim_plan import (
    WHOLE,
    ReclaimRules,
    StoredFile,
    Want,
    choose_from_pool,
    want_of,
)

_T = TypeVar("_T")
# Of one token: a model with compressed attention, or an 8 B one in 8 bits.
TOKEN_BYTES: Final = 65_536
TOKENS_PER_S: Final = 20_000.0
_LATENCY_S: Final = 0.0005
_WARM_UP: Final = 0.25
_DRAIN_S: Final = 120.0
_POOL_FILES: Final = 512
_SEEN_FILES: Final = 1024
RULES: Final = PoolRules(
    max_running=1 << 20,
    max_queued=1,
    queue_timeout_s=1.0,
    silent_after_s=60.0,
    breaker_failures=5,
    breaker_open_s=1.0,
    affinity_max_ahead=ProxySettings.affinity_max_ahead,
    max_places=ProxySettings.max_places,
)


@dataclass(frozen=True, kw_only=True)
class FleetSizes:
    """As the flags of fleet.py."""

    num_nodes: int
    num_simulated: int
    num_requests: int
    rate_per_s: float
    keeps: float
    metadata_per_s: float
    data_bytes_per_s: float
    is_exact: bool = False
    affinity: str = "none"

    @property
    def copies(self) -> float:
        return self.num_nodes / self.num_simulated


@dataclass
class Outcome:
    """Of the requests that are counted. Numbers of operations and bytes are those of all nodes."""

    sizes: FleetSizes
    seconds: float
    num_requests: int
    num_blocks: int
    hit_blocks: int
    ttfts_s: list[float]
    counts: Counter[str]
    bytes_moved: int
    used: dict[str, float]

    @property
    def requests_per_s(self) -> float:
        return self.num_requests * self.sizes.copies / self.seconds

    @property
    def blocks(self) -> float:
        return self.num_blocks / self.num_requests

    @property
    def hit_share(self) -> float:
        return self.hit_blocks / self.num_blocks

    @property
    def by_kind(self) -> dict[str, float]:
        """Operations a request."""
        return {kind: self.counts[kind] / self.num_requests for kind in KINDS}

    @property
    def operations(self) -> float:
        return sum(self.by_kind.values())

    @property
    def operations_per_s(self) -> float:
        return self.operations * self.requests_per_s

    @property
    def bytes_per_s(self) -> float:
        return self.bytes_moved * self.sizes.copies / self.seconds

    @property
    def num_unanswered(self) -> int:
        return self.num_requests - len(self.ttfts_s)

    @property
    def bottleneck(self) -> str:
        """What is used most."""
        return max(self.used, key=lambda name: self.used[name])

    def ttft_s(self, share: float) -> float:
        """Of those that were answered."""
        ordered = sorted(self.ttfts_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


@dataclass
class _Counted:
    """Since the warm-up."""

    begin_s: float = 0.0
    num_requests: int = 0
    num_blocks: int = 0
    hit_blocks: int = 0
    tokens_computed: float = 0.0
    ttfts_s: list[float] = field(default_factory=list)


class Fleet:
    """Runs once."""

    def __init__(self, requests: Sequence[TracedRequest], sizes: FleetSizes) -> None:
        self._sizes = sizes
        self._requests = requests[: sizes.num_requests]
        self._world = World()
        # To one copy of the nodes that are run the servers are so much slower.
        self._filesystem = Filesystem(
            self._world,
            Server(
                self._world,
                "metadata server",
                per_s=sizes.metadata_per_s / sizes.copies,
                latency_s=_LATENCY_S,
            ),
            Server(
                self._world,
                "data servers",
                per_s=sizes.data_bytes_per_s / sizes.copies,
                latency_s=_LATENCY_S,
            ),
        )
        self._page_bytes = BLOCK_TOKENS * TOKEN_BYTES
        self._nodes: dict[Instance, FleetNode] = {}
        rules = replace(RULES, affinity=sizes.affinity)
        self._prefill, self._decode = Pool(Role.PREFILL, rules), Pool(Role.DECODE, rules)
        for i in range(sizes.num_simulated):
            pool = (self._prefill, self._decode)[i % 2]
            pool.add(URL(f"http://node-{i}"))
            self._nodes[pool.instances[-1]] = self._node()
        num_keys = len({key for request in self._requests for key in request.keys})
        self._limit_bytes = max(1, int(num_keys * self._page_bytes * sizes.keeps))
        self._counted = _Counted()
        self._num_open = 0

    def _node(self) -> FleetNode:
        sizes = NodeSizes(
            page_bytes=self._page_bytes,
            block_tokens=BLOCK_TOKENS,
            memory_pages=1024,
            num_threads=16,
            tokens_per_s=TOKENS_PER_S,
            touch_every_s=ReclaimRules().grace_s / 2,
        )
        tier = FleetTier(self._filesystem, exact=self._sizes.is_exact)
        return FleetNode(self._world, tier, sizes)

    def run(self) -> Outcome:
        """Inside a running event loop, which it doesn't wait for."""
        rate_per_s = self._sizes.rate_per_s * self._sizes.num_simulated
        gaps = random.Random(1)
        at_s = 0.0
        num_warm = int(len(self._requests) * _WARM_UP)
        for number, request in enumerate(self._requests):
            if number == num_warm:
                self._world.later(at_s, self._begin_counting)
            self._world.later(at_s, partial(self._come, request, number >= num_warm))
            at_s += gaps.expovariate(rate_per_s)
        self._world.later(ReclaimRules().check_s, self._reclaim)
        end_s = at_s
        while self._world.now_s < end_s and self._world.step():
            pass
        outcome = self._outcome(end_s)
        while self._num_open and self._world.now_s < end_s + _DRAIN_S and self._world.step():
            pass
        return outcome

    def _begin_counting(self) -> None:
        self._counted = _Counted(begin_s=self._world.now_s)
        self._filesystem.counts.clear()
        self._filesystem.bytes_moved = 0
        for server in (self._filesystem.metadata, self._filesystem.data):
            server.work = 0.0

    def _outcome(self, end_s: float) -> Outcome:
        counted, filesystem = self._counted, self._filesystem
        seconds = end_s - counted.begin_s
        computing = counted.tokens_computed / TOKENS_PER_S / len(self._prefill.instances)
        used = {
            each.name: each.utilisation(seconds) for each in (filesystem.metadata, filesystem.data)
        }
        return Outcome(
            sizes=self._sizes,
            seconds=seconds,
            num_requests=counted.num_requests,
            num_blocks=counted.num_blocks,
            hit_blocks=counted.hit_blocks,
            ttfts_s=counted.ttfts_s,
            counts=Counter(filesystem.counts),
            bytes_moved=filesystem.bytes_moved,
            used=used | {"engines": computing / seconds},
        )

    # -- one request -------------------------------------------------------------------------

    def _come(self, request: TracedRequest, is_counted: bool) -> None:
        tokens = len(request.keys) * BLOCK_TOKENS
        began_s = self._world.now_s
        self._num_open += 1
        if is_counted:
            self._counted.num_requests += 1
            self._counted.num_blocks += len(request.keys)
        prefix = _prefix_of(request)
        instance = _at_once(self._prefill.admit(tokens=tokens, prefix=prefix))

        def prefilled(hit: int) -> None:
            self._prefill.leave(instance, tokens=tokens)
            if is_counted:
                self._counted.hit_blocks += hit
                self._counted.tokens_computed += max(1, tokens - hit * BLOCK_TOKENS)
            decoder = _at_once(self._decode.admit(tokens=tokens, prefix=prefix))
            done = partial(self._answered, decoder, tokens, began_s, is_counted)
            self._nodes[decoder].decode(Job(request.keys, tokens, done))

        self._nodes[instance].prefill(Job(request.keys, tokens, prefilled))

    def _answered(
        self, decoder: Instance, tokens: int, began_s: float, is_counted: bool, hit: int
    ) -> None:
        self._decode.leave(decoder, tokens=tokens)
        self._num_open -= 1
        if is_counted:
            self._counted.ttfts_s.append(self._world.now_s - began_s)

    # -- reclaim -----------------------------------------------------------------------------

    def _reclaim(self) -> None:
        """One node's turn: what goes is paid for one file after the other, and then it is gone."""
        rules, filesystem = ReclaimRules(), self._filesystem
        then: Callable[[], None] = partial(self._world.later, rules.check_s, self._reclaim)
        want = want_of(
            used_bytes=len(filesystem.pages) * self._page_bytes,
            limit_bytes=self._limit_bytes,
            trigger=rules.trigger,
            share=rules.share,
        )
        if want is None:
            then()
            return
        num_seen, gone = self._plan(want)
        charges = [Charge("reclaim", 1)] * (num_seen + len(gone))
        for key in gone:
            del filesystem.pages[key]
        filesystem.pay(charges, then)

    def _plan(self, want: Want) -> tuple[int, list[Key]]:
        """How many files are looked at, and which go."""
        keys = list(self._filesystem.pages)
        random.Random(len(keys)).shuffle(keys)
        seen: deque[StoredFile] = deque(maxlen=_SEEN_FILES)
        gone: list[Key] = []
        left, num_seen = iter(keys), 0
        while want.free_bytes > 0 and (some := list(islice(left, _POOL_FILES))):
            pool = [self._file(key) for key in some]
            num_seen += len(pool)
            goes = choose_from_pool(
                pool,
                {WHOLE: want},
                seen={WHOLE: seen},
                now_ns=self._filesystem.now_ns(),
                grace_s=0.0,
            )
            seen.extend(pool)
            gone += [Key(bytes.fromhex(file.name)) for file in goes]
            want = Want(want.free_bytes - len(goes) * self._page_bytes, want.share)
        return num_seen, gone

    def _file(self, key: Key) -> StoredFile:
        no_tail, score_ns = self._filesystem.pages[key]
        return StoredFile(key.hex(), self._page_bytes, score_ns, changed_ns=0, is_tail=not no_tail)


def _prefix_of(request: TracedRequest) -> Prefix:
    """A recorded prompt says of its beginnings only which blocks they are; its first one is shared
    by prompts of all users, the second by turns of a conversation."""
    beginnings = [bytes(key) for key in reversed(request.keys[1:] or request.keys)]
    return Prefix(beginnings, beginnings[-1])


def _at_once(admitted: Coroutine[Any, Any, _T]) -> _T:
    """There is always room, so nothing is waited for."""
    try:
        admitted.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    raise AssertionError("an instance always has room")
