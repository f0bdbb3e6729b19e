"""How much of a hit an engine takes, as storage and its own speed change."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")

from tests.integration.scheduler_parts import BLOCK, Engine, Loopback
from tests.parts.node import key
from tests.store.tiers.memory_tier import MemoryTier
from ucm import handoff as h
from ucm.integration.engine.counts import Counts
from ucm.integration.engine.explorer import Explorer
from ucm.integration.engine.load_policy import EXPLORE_S, LoadPolicy
from ucm.integration.engine.rates import MIN_SAMPLES, WINDOW
from ucm.integration.vllm.metadata import RankReport, StepMetadata
from ucm.metrics import series_key
from ucm.outcome import Outcome
from ucm.store.node import protocol as p
from ucm.store.node.read_worth import worth_reading

SLOW_S, FAST_S = 1.0, 2e-6
# Five full blocks and a bit.
PROMPT = 5 * BLOCK + 4


class PacedTier(MemoryTier):
    """Reading a page takes `read_s` of the node cache's time."""

    def __init__(self, read_s: float) -> None:
        super().__init__()
        self.read_s = read_s
        self.link: Loopback | None = None

    def read(self, namespace, key, page):
        assert self.link is not None
        self.link.now_s += self.read_s
        return super().read(namespace, key, page)


class PacedEngine(Engine):
    """Its steps take a few milliseconds, and their ends are reported."""

    def step(self, scheduled: dict[str, int]) -> StepMetadata:
        metadata = super().step(scheduled)
        if metadata.measured:
            time.sleep(0.003)
            self.side.ranks_reported(RankReport(measured=metadata.measured))
        return metadata


def engine_with_files(
    read_s: float, num_prompts: int, *, in_memory: bool = False, **settings: str
) -> PacedEngine:
    """Prompts "0", "1" ... lie in files that take so long to read, and perhaps in memory."""
    tier = PacedTier(read_s)
    link = tier.link = Loopback(num_slots=1024, tier=tier)
    engine = PacedEngine(link, **settings)
    for i in range(num_prompts):
        request = engine.add(f"stores {i}", PROMPT, salt=str(i))
        engine.admit(request)
        engine.step({request.request_id: PROMPT})
        engine.side.finished(request, engine.blocks(request))
        engine.step({})
        engine.copied(*engine.take_dumping())
        engine.step({})
    if not in_memory:
        link.restart()
        engine.step({})
    return engine


def ask(engine: PacedEngine, salt: int, *, name: str = "", **more: object) -> int:
    """Tokens that a prompt is spared."""
    request = engine.add(name or f"asks {salt}", PROMPT, salt=str(salt), **more)
    spared = engine.admit(request)
    engine.copied(*(job.job_id for job in engine.step({}).loads))
    engine.side.finished(request, engine.blocks(request))
    engine.step({})
    return spared


def test_files_that_take_longer_than_computing_are_not_read_once_that_is_known() -> None:
    engine = engine_with_files(SLOW_S, 8)
    spared = [ask(engine, i) for i in range(8)]

    assert spared == [5 * BLOCK] * MIN_SAMPLES + [0] * (8 - MIN_SAMPLES)
    refused = engine.counted("ucm_lookup_missed_blocks", reason="not_worth")
    assert refused == 5 * (8 - MIN_SAMPLES)
    assert engine.slots()["pins"] == 0


def test_files_that_take_less_are_always_read() -> None:
    engine = engine_with_files(FAST_S, 20)
    assert [ask(engine, i) for i in range(20)] == [5 * BLOCK] * 20
    assert not engine.counted("ucm_lookup_missed_blocks", reason="not_worth")
    gauges = engine.stats.data["gauges"]
    for source in ("compute", "files"):
        assert gauges[series_key("ucm_estimated_tokens_per_second", "gauge", {"of": source})] > 0


def test_who_always_loads_does_so_however_slow_storage_is() -> None:
    engine = engine_with_files(SLOW_S, 8, load_policy="always")
    assert [ask(engine, i) for i in range(8)] == [5 * BLOCK] * 8


def test_what_was_computed_in_place_of_a_load_is_a_hit_in_memory_from_then_on() -> None:
    engine = engine_with_files(SLOW_S, 6)
    for i in range(5):
        ask(engine, i)
    request = engine.add("computes", PROMPT, salt="5")
    assert engine.admit(request) == 0
    engine.step({"computes": PROMPT})
    engine.side.finished(request, engine.blocks(request))
    engine.step({})
    engine.copied(*engine.take_dumping())
    engine.step({})

    assert ask(engine, 5, name="hits") == 5 * BLOCK


def test_promised_pages_that_are_not_worth_their_load_are_computed_under_that_reason() -> None:
    engine = engine_with_files(SLOW_S, 6)
    for i in range(5):
        ask(engine, i)
    assert ask(engine, 5, says=h.Expected()) == 0

    assert engine.counted("ucm_handoff_recomputed_tokens", reason="not_worth") == PROMPT - 1


def test_what_is_slower_to_copy_than_to_compute_is_copied_once_in_a_while_only() -> None:
    engine = engine_with_files(FAST_S, 12, in_memory=True)
    spared = []
    for i in range(12):
        request = engine.add(f"asks {i}", PROMPT, salt=str(i))
        spared.append(engine.admit(request))
        loads = {job.job_id: 1 for job in engine.step({}).loads}
        engine.side.ranks_reported(RankReport(ended=loads, took_s=dict.fromkeys(loads, 30.0)))

    # One more than are needed to know: a try.
    assert spared == [5 * BLOCK] * (MIN_SAMPLES + 1) + [0] * (12 - MIN_SAMPLES - 1)
    refused = engine.counted("ucm_lookup_missed_blocks", reason="not_worth")
    assert refused == 5 * (12 - MIN_SAMPLES - 1)


# -- as things change ----------------------------------------------------------------------


class World:
    """Requests one after the other, in simulated time, on storage and an engine whose speeds the
    test sets: seconds for each block. One prompt has up to 60 blocks in files."""

    is_ready = True
    namespace = 1

    def __init__(self, *, compute_s: float, read_s: float) -> None:
        self.now_s = 0.0
        self.compute_s, self.read_s = compute_s, read_s
        self._ids = 0
        self.policy = LoadPolicy(
            is_auto=True,
            block_tokens=128,
            max_step_tokens=8192,
            stats=Counts(),
            clock=lambda: self.now_s,
        )
        self.explorer = Explorer(self, self.policy.read, timeout_s=2, clock=lambda: self.now_s)
        for _ in range(MIN_SAMPLES + 1):
            self.compute(16)

    def next_id(self) -> int:
        self._ids += 1
        return self._ids

    def ask(self, question, on_answer) -> None:
        """Read beside the requests, and done before the next one."""
        on_answer(self._read(len(question.keys) - question.read_from))

    def release(self, lookup_id: int) -> None:
        pass

    def _read(self, num_pages: int) -> p.LookupReply:
        return p.LookupReply(
            id=1,
            offsets=[],
            num_stored=0,
            from_files=num_pages,
            head_stored=0,
            reason=Outcome.FINE,
            read_us=max(1, int(num_pages * self.read_s * 1e6)),
        )

    def compute(self, num_blocks: int) -> None:
        number = self.policy.prefill.begin(num_blocks * 128)
        self.now_s += num_blocks * self.compute_s
        if number:
            self.policy.step_ended(number)

    def request(self, num_blocks: int) -> int:
        """How many blocks of it were read."""
        self.now_s += 1.0
        costs = self.policy.read_costs()
        count = num_blocks if costs is None else worth_reading([True] * num_blocks, costs)
        if count:
            self.now_s += count * self.read_s
            self.policy.read(self._read(count))
        else:
            self.explorer.try_again([key(i) for i in range(num_blocks)], 0)
            self.compute(num_blocks)
        return count


SIZES = st.integers(2, 60)


@given(st.lists(SIZES, min_size=40, max_size=40), st.sampled_from([0.01, 0.1]))
def test_storage_that_becomes_slow_is_left_alone_after_a_few_loads(
    sizes: list[int], compute_s: float
) -> None:
    world = World(compute_s=compute_s, read_s=compute_s / 10)
    assert [world.request(size) for size in sizes] == sizes

    world.read_s = 10 * compute_s
    read = [world.request(size) for size in sizes]

    assert sum(map(bool, read)) <= WINDOW
    assert not any(read[WINDOW:])


@given(st.lists(SIZES, min_size=40, max_size=40), st.sampled_from([0.01, 0.1]))
def test_storage_that_becomes_fast_is_used_again(sizes: list[int], compute_s: float) -> None:
    """It is tried beside the requests, ever more often as it answers."""
    world = World(compute_s=compute_s, read_s=10 * compute_s)
    for size in sizes:
        world.request(size)
    assert world.request(20) == 0

    world.read_s = compute_s / 10
    world.now_s += 60
    for size in sizes:
        world.request(size)

    assert world.request(20) == 20


@given(st.lists(SIZES, min_size=40, max_size=40), st.integers(0, 39))
def test_one_load_that_stalls_refuses_nothing(sizes: list[int], stalls: int) -> None:
    world = World(compute_s=0.05, read_s=0.005)
    for i, size in enumerate(sizes):
        world.read_s = 2.0 if i == stalls else 0.005
        assert world.request(size) == size


@given(st.lists(SIZES, min_size=20, max_size=20))
def test_an_engine_that_becomes_slow_takes_what_it_refused(sizes: list[int]) -> None:
    world = World(compute_s=0.01, read_s=0.05)
    for size in sizes:
        world.request(size)
    assert world.request(20) == 0

    world.compute_s = 0.5
    for size in sizes:
        world.request(size)

    assert world.request(20) == 20


def test_a_copy_is_tried_again_after_a_while() -> None:
    world = World(compute_s=0.01, read_s=0.001)
    for _ in range(MIN_SAMPLES):
        world.policy.copied(1280, 100.0)
    taken = []
    for _ in range(30):
        taken.append(world.policy.takes(1280))
        world.now_s += EXPLORE_S / 10

    assert taken[0] and 2 <= sum(taken) <= 4
