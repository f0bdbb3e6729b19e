"""What has to be over when a step is: the next may give its blocks to others."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")

from tests.integration.copies.kv_layouts import page_in
from tests.integration.rank_parts import GEOMETRY
from tests.integration.vllm.test_worker import BLOCKS, Bench, job
from ucm.integration.vllm.metadata import StepMetadata


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    made = Bench(monkeypatch)
    yield made
    made.close()


def test_a_dump_that_ends_with_its_step_has_read_its_blocks_before_the_next_writes_them(
    bench: Bench,
) -> None:
    """Blocks that a window has left, which the scheduler gives to another request at once."""
    bench.warm_up()

    bench.device.streams["ucm-dump"].put(lambda: time.sleep(0.3))
    step = StepMetadata(dumps=(job(2, 0),), at_once=(2,))
    bench.connector.bind_connector_metadata(step)
    bench.connector.wait_for_save()
    bench.write(0, BLOCKS)
    assert bench.until_ended(2) == set()
    assert bool((page_in(bench.arena, GEOMETRY, 0) == 3).all())


def test_a_step_whose_end_is_left_out_ends_before_the_next_writes_its_blocks(bench: Bench) -> None:
    """As on the stages of a pipeline that don't sample, if vLLM speculates: without an end the dump
    would never begin, and the engine would keep its blocks for good."""
    bench.pin()
    bench.write(3)
    step = StepMetadata(dumps=(job(1, 0),))
    bench.connector.handle_preemptions(step)
    bench.connector.bind_connector_metadata(step)
    bench.side.take_finished(step)

    after = StepMetadata(fence=(1,))
    bench.connector.handle_preemptions(after)
    bench.write(0, BLOCKS)
    bench.connector.bind_connector_metadata(after)
    bench.connector.wait_for_save()
    assert bench.until_ended(1) == set()
    assert bool((page_in(bench.arena, GEOMETRY, 0) == 3).all())


def test_a_step_that_computes_nothing_needs_no_end_for_its_dumps(bench: Bench) -> None:
    """Before 0.31 vLLM has none for them. Another step need not come for the copies to begin."""
    bench.pin()
    bench.write(3)
    step = StepMetadata(idle=True, dumps=(job(1, 0),))
    bench.connector.handle_preemptions(step)
    bench.connector.bind_connector_metadata(step)
    bench.connector.start_load_kv(None)
    bench.connector.get_finished(set())
    assert bench.until_ended(1) == set()
    assert bool((page_in(bench.arena, GEOMETRY, 0) == 3).all())

    bench.write(5)
    bench.connector.wait_for_save()  # vLLM's V2 runner may still bring it, after get_finished
    assert bench.side.take_report() is None
    assert bool((page_in(bench.arena, GEOMETRY, 0) == 3).all())


def test_a_step_that_computes_is_not_ended_by_what_comes_before_its_end(bench: Bench) -> None:
    """With a draft model on the V2 runner get_finished comes first: not all is computed yet."""
    bench.pin()
    step = StepMetadata(dumps=(job(1, 0),))
    bench.connector.handle_preemptions(step)
    bench.connector.bind_connector_metadata(step)
    bench.connector.get_finished(set())
    bench.write(3)
    bench.connector.wait_for_save()
    assert bench.until_ended(1) == set()
    assert bool((page_in(bench.arena, GEOMETRY, 0) == 3).all())
