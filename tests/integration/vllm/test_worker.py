"""A rank's steps, in the order in which vLLM's runners call the connector's hooks."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")


from tests.integration.copies.kv_layouts import Rank, make_rank, page_in, page_of_blocks
from tests.integration.copies.simulated_device import SimulatedDevice
from tests.integration.rank_parts import (
    BLOCK_TOKENS,
    GEOMETRY,
    LAYERS,
    NUM_BLOCKS,
    NUM_SLOTS,
    FakeLink,
    facts_of,
)
from ucm.config.settings import Settings, StoreSettings
from ucm.integration.copies import generations as memories_module
from ucm.integration.copies.arena import Arena
from ucm.integration.copies.device import CopyLimits, DeviceCopyEngine
from ucm.integration.copies.jobs import CopyJob, PagePart
from ucm.integration.copies.make import make_copy_engine
from ucm.integration.engine.step_waits import IDLE_WAIT_MAX_S
from ucm.integration.vllm import worker as worker_module
from ucm.integration.vllm.engine_versions import writes_before_hooks
from ucm.integration.vllm.metadata import StepMetadata
from ucm.integration.vllm.stats import UcmStats
from ucm.integration.vllm.ucm_connector import UCMConnector
from ucm.integration.vllm.worker import WorkerSide

BLOCKS = (0, 1, 2, 3)


class Bench:
    """A rank on a device that works behind the host's back, or on the host itself, driven by the
    connector's own hooks."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        on: str = "device",
        layerwise: bool = False,
        can_sleep: bool = False,
        grace_s: float = 30.0,
    ) -> None:
        self.device = SimulatedDevice()
        rank = make_rank("LBHNC", GEOMETRY, block_tokens=BLOCK_TOKENS, num_blocks=NUM_BLOCKS)
        self.rank: Rank = self.device.moved(rank) if on == "device" else rank
        monkeypatch.setattr(worker_module, "RankLink", FakeLink)
        if on == "device":
            make_arena = functools.partial(Arena, registrar=self.device)
            monkeypatch.setattr(memories_module, "Arena", make_arena)
            make = functools.partial(
                DeviceCopyEngine,
                accelerator=self.device,
                limits=CopyLimits(direct_run_bytes=1, fence_grace_s=grace_s),
            )
        else:
            make = make_copy_engine
        monkeypatch.setattr(
            worker_module,
            "make_copy_engine",
            lambda targets, **more: make(targets),
        )
        settings = Settings(
            block_tokens=GEOMETRY.block_tokens,
            store=StoreSettings(socket_path="/nowhere"),
            use_layerwise=layerwise,
        )
        self.side = WorkerSide(settings, facts_of(can_sleep=can_sleep), tp_rank=0, stats=UcmStats())
        self.side.register(dict(zip(LAYERS, self.rank.cache.layers, strict=True)))
        self.connector = object.__new__(UCMConnector)
        self.connector._worker = self.side
        self.connector._scheduler = None

    @property
    def engine(self):
        assert self.side._engine is not None
        return self.side._engine

    @property
    def arena(self) -> Arena:
        assert self.side._memories is not None
        return self.side._memories._arenas[0]

    def pin(self) -> None:
        assert not self.arena.prepare(0, NUM_SLOTS * GEOMETRY.slot_bytes)

    def warm_up(self) -> None:
        """A dump has been, of blocks that are written."""
        self.pin()
        self.write(3)
        warm = StepMetadata(dumps=(job(1, 1),))
        self.connector.bind_connector_metadata(warm)
        self.connector.wait_for_save()
        assert self.until_ended(1) == set()

    def write(self, value: int, blocks=range(NUM_BLOCKS)) -> None:
        """A kernel that writes blocks of all layers."""
        real = [self.device.real(t) for t in self.rank.cache.layers]

        def kernel() -> None:
            for t in real:
                t[list(blocks)] = value

        self.device.launch(kernel)

    def until_ended(self, *job_ids: int) -> set[int]:
        """The jobs that failed."""
        failed: set[int] = set()
        waited = set(job_ids)
        for _ in range(30_000):
            self.side.take_finished(StepMetadata())
            report = self.side.take_report()
            if report is not None:
                waited -= report.ended.keys()
                failed |= report.failed.keys()
            if not waited:
                return failed
            self.engine.wait_for_news(0.001)
        raise AssertionError(f"jobs {waited} have not ended")

    def close(self) -> None:
        self.side.close()
        self.device.close()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(monkeypatch, **getattr(request, "param", {}))
    yield made
    made.close()


def job(job_id: int, slot: int, blocks: tuple[int, ...] = BLOCKS) -> CopyJob:
    part = PagePart(slot * GEOMETRY.slot_bytes, 0, blocks)
    return CopyJob(job_id, f"request {job_id}", 0, (part,))


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_a_load_into_blocks_that_a_dump_still_reads_comes_after_it(
    bench: Bench, runner: str
) -> None:
    """As after `reset_running_requests`: one step takes a request's blocks away, while they are
    being dumped, and loads others' KV into them. What the runner itself does to the blocks, before
    the hooks (V2) or after them (V1), is before the load as well, and the forward pass is not."""
    bench.pin()
    page_in(bench.arena, GEOMETRY, 1).fill_(7)
    bench.write(3)
    warm = StepMetadata(dumps=(job(1, 0),))
    bench.connector.handle_preemptions(warm)
    bench.connector.bind_connector_metadata(warm)
    bench.connector.wait_for_save()
    assert bench.until_ended(1) == set()

    dumps_go_on = threading.Event()
    dump_stream = bench.device.streams["ucm-dump"]
    dump_stream.put(dumps_go_on.wait)
    first = StepMetadata(dumps=(job(2, 0),))
    bench.connector.bind_connector_metadata(first)
    bench.connector.wait_for_save()

    second = StepMetadata(loads=(job(3, 1),), fence=(2,))
    if runner == "V2":
        bench.connector.handle_preemptions(second)
        bench.connector.bind_connector_metadata(second)
    else:
        bench.connector.handle_preemptions(second)
        bench.write(0, BLOCKS)
        bench.connector.bind_connector_metadata(second)
    forward_ends = threading.Event()
    bench.device.launch(forward_ends.wait)
    bench.connector.start_load_kv(None)
    bench.side.take_finished(StepMetadata())
    threading.Event().wait(0.2)  # enough for a load that would not wait
    dumps_go_on.set()
    assert bench.until_ended(2, 3) == set()
    assert not forward_ends.is_set()
    forward_ends.set()

    assert bool((page_in(bench.arena, GEOMETRY, 0) == 3).all())
    bench.device.synchronize()
    assert bool((page_of_blocks(bench.rank.cache.read(), BLOCKS) == 7).all())


def test_a_dump_whose_blocks_were_written_before_the_fence_is_not_called_good(
    bench: Bench,
) -> None:
    """Some runners zero and copy blocks before they call any hook; the step says when it does."""
    bench.pin()
    bench.write(3)
    dumps_go_on = threading.Event()
    bench.device.launch(dumps_go_on.wait)
    first = StepMetadata(dumps=(job(2, 0),))
    bench.connector.bind_connector_metadata(first)
    bench.connector.wait_for_save()
    second = StepMetadata(fence=(2,), writes_before_fence=True)
    bench.connector.handle_preemptions(second)
    dumps_go_on.set()

    assert bench.until_ended(2) == {2}


def test_a_fence_that_a_connector_around_this_one_keeps_back_comes_with_the_step(
    bench: Bench,
) -> None:
    """vllm-ascend's own does not hand on handle_preemptions."""
    bench.warm_up()
    dumps_go_on = threading.Event()
    bench.device.streams["ucm-dump"].put(dumps_go_on.wait)
    first = StepMetadata(dumps=(job(2, 0),))
    bench.connector.bind_connector_metadata(first)
    bench.connector.wait_for_save()

    bench.connector.bind_connector_metadata(StepMetadata(fence=(2,)))
    bench.write(0, BLOCKS)
    threading.Event().wait(0.2)  # enough for a forward pass that would not wait
    dumps_go_on.set()
    assert bench.until_ended(2) == set()
    assert bool((page_in(bench.arena, GEOMETRY, 0) == 3).all())


def test_the_scheduler_side_knows_which_steps_write_blocks_of_their_own() -> None:
    assert not writes_before_hooks(SimpleNamespace(new_block_ids_to_zero=None))
    assert writes_before_hooks(SimpleNamespace(new_block_ids_to_zero=[3]))
    assert writes_before_hooks(
        SimpleNamespace(new_block_ids_to_zero=None, kv_cache_block_copies=[object()])
    )


LAYERWISE = pytest.mark.parametrize(
    "bench",
    [{"layerwise": True, "on": "device"}, {"layerwise": True, "on": "host"}],
    indirect=True,
    ids=["device", "host"],
)


@LAYERWISE
def test_a_layer_that_runs_several_times_in_a_step_is_dumped_once(bench: Bench) -> None:
    """A draft model's: its first pass has written the prompt's tokens, the later ones write behind
    them. Hooks that come when the step's dumps are under way, or a second end, change nothing."""
    step = StepMetadata(dumps=(job(1, 0), job(2, 1, (4, 5, 6, 7))))
    bench.connector.handle_preemptions(step)
    bench.connector.bind_connector_metadata(step)
    for name in (LAYERS[0], LAYERS[1], LAYERS[2], LAYERS[2], LAYERS[2], LAYERS[0]):
        bench.connector.wait_for_layer_load(name)
        bench.connector.save_kv_layer(name, None, None)
    bench.connector.wait_for_save()
    bench.connector.save_kv_layer(LAYERS[2], None, None)
    bench.connector.wait_for_save()
    assert bench.until_ended(1, 2) == set()
    bench.connector.save_kv_layer(LAYERS[2], None, None)

    after = StepMetadata(dumps=(job(3, 2),), fence=(1, 2))
    bench.connector.handle_preemptions(after)
    bench.connector.bind_connector_metadata(after)
    bench.connector.wait_for_save()
    assert bench.until_ended(3) == set()


@LAYERWISE
def test_loads_that_are_started_twice_in_a_step_are_copied_once(bench: Bench) -> None:
    page_in(bench.arena, GEOMETRY, 1).fill_(7)
    step = StepMetadata(step_loads=(job(1, 1),), loads=())
    bench.connector.handle_preemptions(step)
    bench.connector.bind_connector_metadata(step)
    bench.connector.start_load_kv(None)
    bench.connector.start_load_kv(None)
    for name in (*LAYERS, LAYERS[2]):
        bench.connector.wait_for_layer_load(name)
    assert bench.until_ended(1) == set()
    assert bool((page_of_blocks(bench.rank.cache.read(), BLOCKS) == 7).all())


@pytest.mark.parametrize(("idle", "waits"), [(True, [IDLE_WAIT_MAX_S]), (False, [])])
def test_only_a_step_that_computes_nothing_waits_for_a_load(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, idle: bool, waits: list[float]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(bench.engine, "wait_for_news", waited.append)
    bench.pin()
    bench.side.start_loads(StepMetadata(loads=(job(1, 0),)))
    bench.side.take_finished(StepMetadata(idle=idle))
    assert waited == waits
    monkeypatch.undo()
    bench.until_ended(1)
