"""Bytes and time of a rank's copies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")

from tests.integration.copies.kv_layouts import make_rank
from tests.integration.rank_parts import (
    BLOCK_TOKENS,
    GEOMETRY,
    LAYERS,
    NUM_BLOCKS,
    FakeLink,
    facts_of,
)
from ucm.config.settings import Settings, StoreSettings
from ucm.integration.copies.job_ledger import BusyClock, JobLedger
from ucm.integration.copies.jobs import CopyJob, Direction, PagePart
from ucm.integration.engine.counts import Counts
from ucm.integration.engine.meter import CopyMeter
from ucm.integration.vllm import worker as worker_module
from ucm.integration.vllm.metadata import RankReport, StepMetadata
from ucm.integration.vllm.stats import UcmStats
from ucm.integration.vllm.worker import WorkerSide
from ucm.store.blocks.page_layout import rank_share


class Bench:
    """One of `tp_size` ranks, with vLLM's part played."""

    def __init__(self, *, tp_rank: int, tp_size: int, layerwise: bool) -> None:
        facts = facts_of(tp_size=tp_size)
        settings = Settings(
            block_tokens=GEOMETRY.block_tokens,
            store=StoreSettings(socket_path="/nowhere"),
            use_layerwise=layerwise,
        )
        self.stats = UcmStats()
        self.side = WorkerSide(settings, facts, tp_rank=tp_rank, stats=self.stats)
        rank = make_rank(
            "LBHNC",
            GEOMETRY,
            tp=(tp_rank, tp_size),
            block_tokens=BLOCK_TOKENS,
            num_blocks=NUM_BLOCKS,
        )
        self.side.register(dict(zip(LAYERS, rank.cache.layers, strict=True)))

    def step(self, step: StepMetadata) -> None:
        """A step that computes nothing, until its copies have ended."""
        self.side.fence(step)
        self.side.begin(step)
        self.side.start_loads(step)
        for name in LAYERS:
            self.side.wait_layer(name)
            self.side.save_layer(step, name)
        self.side.end_of_forward(step)
        assert self.side._engine is not None
        jobs = {job.job_id for job in (*step.loads, *step.step_loads, *step.dumps)}
        self.side._engine.fence(jobs)
        self.side.take_finished(step)

    def counted(self) -> dict[str, float]:
        taken = self.stats.take()
        return {} if taken is None else taken.data["counters"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Bench]:
    monkeypatch.setattr(worker_module, "RankLink", FakeLink)
    options = {"tp_rank": 0, "tp_size": 1, "layerwise": False, **getattr(request, "param", {})}
    made = Bench(**options)
    yield made
    made.side.close()


def job(job_id: int, *block_ids: int, generation: int = 0) -> CopyJob:
    parts = (PagePart(0, 0, block_ids[:4]), PagePart(GEOMETRY.slot_bytes, 0, block_ids[4:]))
    return CopyJob(job_id, "a", generation, parts)


EVERY_RANK = pytest.mark.parametrize(
    "bench",
    [
        {"tp_rank": 0, "tp_size": 1},
        {"tp_rank": 1, "tp_size": 2},
        {"tp_rank": 0, "tp_size": 1, "layerwise": True},
    ],
    indirect=True,
    ids=["only", "one of two", "layer by layer"],
)


@EVERY_RANK
def test_a_rank_counts_its_part_of_the_blocks_that_it_copies(
    bench: Bench, request: pytest.FixtureRequest
) -> None:
    """Of a page of 4 blocks, 6 blocks are a page and a half."""
    whole = GEOMETRY.page_bytes // bench.side._facts.tp_size
    layerwise = bench.side._settings.use_layerwise
    loads = (job(1, 0, 1, 2, 3, 4, 5),)
    bench.step(
        StepMetadata(
            loads=() if layerwise else loads,
            step_loads=loads if layerwise else (),
            dumps=(job(2, 6, 7, 8, 9),),
        )
    )

    counted = bench.counted()
    assert counted["ucm_loaded_bytes"] == whole + whole // 2
    assert counted["ucm_dumped_bytes"] == whole
    assert counted.keys() == {
        *("ucm_loaded_bytes", "ucm_load_seconds"),
        *("ucm_dumped_bytes", "ucm_dump_seconds"),
    }


def test_a_step_without_copies_counts_nothing(bench: Bench) -> None:
    bench.step(StepMetadata(loads=(job(1, 0),)))
    bench.counted()

    bench.step(StepMetadata())

    assert bench.counted() == {}


def test_a_copy_that_failed_has_moved_nothing(bench: Bench) -> None:
    bench.step(StepMetadata(loads=(job(1, NUM_BLOCKS),), dumps=(job(2, 0),)))

    assert bench.side.take_report().failed == {1: 1}  # type: ignore[union-attr]
    counted = bench.counted()
    assert "ucm_loaded_bytes" not in counted
    assert counted["ucm_dumped_bytes"] == GEOMETRY.page_bytes // 4


def test_a_job_for_memory_that_the_rank_does_not_have_has_moved_nothing(bench: Bench) -> None:
    bench.step(StepMetadata(loads=(job(1, 0, generation=5),)))

    assert bench.side.take_report().failed == {1: 1}  # type: ignore[union-attr]
    assert bench.counted() == {}


@pytest.mark.parametrize("bench", [{"tp_rank": 1, "tp_size": 8}], indirect=True)
def test_a_dump_that_another_rank_does_is_not_counted_here(bench: Bench) -> None:
    """Eight ranks hold four heads: the second holds what the first one dumps."""
    bench.step(StepMetadata(dumps=(job(1, 0),)))

    assert bench.side.take_report().ended == {1: 1}  # type: ignore[union-attr]
    assert bench.counted() == {}


def test_a_rank_reports_how_long_its_loads_took_and_nothing_of_its_dumps(bench: Bench) -> None:
    bench.step(StepMetadata(loads=(job(1, 0, 1),), dumps=(job(2, 2),)))

    report = bench.side.take_report()
    assert report is not None
    assert report.took_s.keys() == {1}
    assert report.took_s[1] > 0


def test_a_rank_reports_the_end_of_a_step_that_is_measured(bench: Bench) -> None:
    bench.step(StepMetadata(measured=7))
    report = bench.side.take_report()
    assert report is not None and report.measured == 7

    bench.step(StepMetadata())
    assert bench.side.take_report() is None


def test_of_several_ranks_the_slowest_says_how_long_a_load_took() -> None:
    one = RankReport(ended={1: 1, 2: 1}, took_s={1: 0.25, 2: 0.5}, measured=7)
    other = RankReport(ended={1: 1}, took_s={1: 0.75})

    both = one.aggregate(other)

    assert both == RankReport(ended={1: 2, 2: 1}, took_s={1: 0.75, 2: 0.5}, measured=7)


# -- time ----------------------------------------------------------------------------------


class Clock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self.now_s = 10.0

    def __call__(self) -> float:
        return self.now_s

    def pass_(self, seconds: float) -> None:
        self.now_s += seconds


def test_overlapping_jobs_count_once_and_idle_time_not_at_all() -> None:
    clock = Clock()
    busy = BusyClock(clock)
    busy.start()
    clock.pass_(2)
    busy.start()
    clock.pass_(3)
    busy.stop()
    clock.pass_(1)
    busy.stop()
    clock.pass_(50)

    assert busy.take() == 6
    assert busy.take() == 0


def test_what_is_still_under_way_counts_up_to_now() -> None:
    """Under steady load a direction may never be idle."""
    clock = Clock()
    busy = BusyClock(clock)
    busy.start()
    clock.pass_(4)
    assert busy.take() == 4

    clock.pass_(1)
    busy.stop()

    assert busy.take() == 1


def test_each_direction_has_its_own_time_from_the_first_submission_to_the_last_end() -> None:
    clock = Clock()
    ledger = JobLedger(clock)
    ledger.begin(1, Direction.LOAD, 0, of=range(2))
    clock.pass_(1)
    ledger.begin(1, Direction.LOAD, 1, of=range(2))
    ledger.begin(2, Direction.DUMP, None, of=[None])
    ledger.close_one(1, 1, ok=True)
    clock.pass_(2)
    ledger.close_one(2, None, ok=False)
    clock.pass_(4)
    ledger.close_one(1, 0, ok=True)
    clock.pass_(8)

    assert ledger.take_busy() == {Direction.LOAD: 7, Direction.DUMP: 2}


def test_loads_that_run_at_the_same_time_share_it() -> None:
    """Ten that are under way together for a second have taken a second."""
    share = rank_share(GEOMETRY, tp_rank=0, tp_size=1, layers=range(GEOMETRY.num_layers))
    meter = CopyMeter(Counts(), facts_of(), [share])
    meter.began(job(1, 0), Direction.LOAD)
    meter.busy({Direction.LOAD: 1.0, Direction.DUMP: 0.0})
    meter.began(job(2, 1), Direction.LOAD)
    meter.began(job(3, 2), Direction.DUMP)
    meter.busy({Direction.LOAD: 1.0, Direction.DUMP: 4.0})

    assert [meter.ended(1), meter.ended(2), meter.ended(3)] == [1.5, 0.5, 4.0]
    assert meter.ended(1) == 0.0
