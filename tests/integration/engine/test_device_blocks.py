"""Device blocks: who reads and writes them until vLLM has them back, and how often vLLM is told."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.request import RequestStatus

from tests.integration.scheduler_parts import BLOCK, Engine, Loopback
from ucm import handoff as h
from ucm.integration.vllm.metadata import RankReport


def engine_that_lost_its_head(**more: Any) -> Engine:
    """The first two of six blocks are in vLLM's own prefix cache, and nowhere else."""
    engine = Engine(Loopback(), **more)
    engine.prefill("a", 6 * BLOCK + 4)
    keys = engine.side._state_of(engine.add("probe", 6 * BLOCK + 4)).prompt.keys
    engine.side.finished(engine.requests["probe"], [])
    engine.link.restart()  # nothing is in memory any more
    for stored in [each for each in engine.link.tier._pages if each[1] in keys[:2]]:
        del engine.link.tier._pages[stored]
    engine.step({})
    return engine


def test_a_request_that_leaves_during_its_load_is_told_of_once_though_its_head_was_to_be_dumped():
    engine = engine_that_lost_its_head()
    request = engine.add("b", 6 * BLOCK + 4)
    extra, is_async = engine.side.matched_tokens(request, 2 * BLOCK)
    assert (extra, is_async) == (4 * BLOCK, True)
    engine.side.allocated(request, engine.blocks(request), extra)
    request.num_computed_tokens = 6 * BLOCK
    request.status = RequestStatus.WAITING_FOR_REMOTE_KVS
    (load,) = engine.step({}).loads

    request.status = RequestStatus.FINISHED_ABORTED
    held, _ = engine.side.finished(request, engine.blocks(request))
    later = [engine.step({}) for _ in range(3)]
    engine.copied(load.job_id)
    later += [engine.step({}) for _ in range(3)]

    assert not held, "vLLM waits for the load by itself"
    assert not [each.released for each in later if each.released]
    assert not [each.dumps for each in later if each.dumps], "blocks that may be somebody else's"
    assert engine.slots()["pins"] == engine.slots()["filling"] == 0


@pytest.mark.parametrize("has_head", [True, False])
@pytest.mark.parametrize("has_failed", [True, False])
def test_a_request_that_leaves_while_another_connector_loads_is_neither_read_nor_held(
    has_failed: bool, has_head: bool
):
    """vLLM frees it when it hears of that load, and ends if it hears of it twice."""
    engine = Engine(Loopback())
    request = engine.add("b", 6 * BLOCK)
    engine.side.matched_tokens(request, 2 * BLOCK * has_head)
    engine.step({})
    assert engine.side.matched_tokens(request, 2 * BLOCK * has_head) == (0, False)
    engine.side.allocated(request, engine.blocks(request), 0)
    request.num_computed_tokens = 5 * BLOCK  # with what is being loaded
    request.status = RequestStatus.WAITING_FOR_REMOTE_KVS
    engine.step({})

    if has_failed:
        request.num_computed_tokens = 2 * BLOCK * has_head
    request.status = RequestStatus.FINISHED_ABORTED
    held, _ = engine.side.finished(request, engine.blocks(request))
    later = [engine.step({}) for _ in range(3)]

    assert not held
    assert not [each for each in later if each.dumps or each.released]
    assert engine.slots()["pins"] == engine.slots()["filling"] == 0


def test_what_another_connector_has_loaded_is_stored_when_a_step_has_gone_on_behind_it():
    engine = Engine(Loopback())
    request = engine.add("b", 6 * BLOCK)
    engine.admit(request)
    request.num_computed_tokens = 5 * BLOCK
    engine.step({})
    engine.side.allocated(request, engine.blocks(request), 0)
    engine.step({"b": BLOCK})
    engine.side.finished(request, engine.blocks(request))
    engine.step({})
    engine.copied(*engine.take_dumping())
    assert engine.slots()["ready"] == 6


def test_a_head_that_was_lost_is_dumped_when_the_load_behind_it_has_ended():
    engine = engine_that_lost_its_head()
    request = engine.add("b", 6 * BLOCK + 4)
    extra, _ = engine.side.matched_tokens(request, 2 * BLOCK)
    engine.side.allocated(request, engine.blocks(request), extra)
    request.num_computed_tokens = 6 * BLOCK
    first = engine.step({})
    assert first.loads and not first.dumps
    engine.copied(first.loads[0].job_id)

    (head,) = engine.step({"b": 4}).dumps

    assert [part.block_ids for part in head.parts] == [(1,), (2,)]
    engine.copied(head.job_id)
    assert engine.slots()["ready"] == 6


def test_a_request_preempted_between_steps_and_then_aborted_is_fenced():
    """A reset preempts outside of a step; the next one may write into its blocks."""
    engine = Engine(Loopback())
    request = engine.add("a", 64)
    engine.admit(request)
    engine.step({"a": 64})
    engine.step({"a": 0})
    jobs = engine.take_dumping()
    assert jobs
    request.status, request.num_computed_tokens = RequestStatus.PREEMPTED, 0

    request.status = RequestStatus.FINISHED_ABORTED
    held, _ = engine.side.finished(request, [])

    assert not held, "vLLM has its blocks already"
    assert set(engine.step({}).fence) == set(jobs)


def test_blocks_computed_behind_a_load_that_failed_in_the_same_step_are_not_committed():
    engine = Engine(Loopback(), layerwise=True)
    engine.prefill("a", 4 * BLOCK)
    engine.link.restart()
    engine.step({})
    again = engine.add("b", 8 * BLOCK)
    assert engine.admit(again) == 4 * BLOCK
    step = engine.step({"b": 4 * BLOCK})
    (load,), (dump,) = step.step_loads, step.dumps

    engine.side.ranks_reported(_report(ended=[dump.job_id, load.job_id], failed=[load.job_id]))

    assert engine.slots()["ready"] == 4, "only what was read from storage"
    assert engine.slots()["filling"] == engine.slots()["pins"] == 0


def test_blocks_computed_behind_a_load_of_another_connector_that_failed_are_not_committed():
    engine = Engine(Loopback())
    for name in "ab":
        engine.admit(engine.add(name, 6 * BLOCK, salt=name))
    engine.requests["b"].num_computed_tokens = 2 * BLOCK  # loaded in the step that computes
    engine.blocks_of = {"b": ([*range(21, 27)],)}
    engine.step({"a": 3 * BLOCK, "b": 3 * BLOCK})

    engine.side.blocks_invalid({22})
    engine.copied(*engine.take_dumping())
    engine.step({"a": BLOCK, "b": BLOCK})
    engine.copied(*engine.take_dumping())

    assert engine.slots()["ready"] == 4, "those of the other request"


def test_a_load_of_its_own_that_fails_spoils_no_dump_of_its_request():
    engine = engine_that_lost_its_head()
    request = engine.add("b", 6 * BLOCK + 4)
    extra, _ = engine.side.matched_tokens(request, 2 * BLOCK)
    engine.side.allocated(request, engine.blocks(request), extra)
    (load,) = engine.step({}).loads

    engine.side.blocks_invalid({block for part in load.parts for block in part.block_ids})
    engine.copied(load.job_id, failed=True)
    request.num_computed_tokens = 2 * BLOCK
    engine.step({"b": BLOCK})
    engine.copied(*engine.take_dumping())

    assert engine.link.core.counters["dump_committed"] == 2, "its head"


def test_a_finished_request_that_vllm_asks_about_again_is_released_once():
    engine = Engine(Loopback())
    request = engine.add("a", 64)
    engine.admit(request)
    engine.step({"a": 64})
    request.status = RequestStatus.FINISHED_STOPPED
    assert engine.side.finished(request, engine.blocks(request))[0]
    assert engine.side.finished(request, engine.blocks(request))[0]
    released = list(engine.step({}).released)
    engine.copied(*engine.take_dumping())

    released += [name for _ in range(3) for name in engine.step({}).released]

    assert released == ["a"]


def test_a_prompt_of_one_token_is_never_offered_as_a_whole():
    """vLLM computes the last token again, and would find nothing computed and ask for ever."""
    engine = Engine(Loopback())
    engine.prefill("a", 1, says=h.Wanted())
    assert engine.admit(engine.add("b", 1, says=h.Wanted())) == 0
    engine.prefill("c", 2, says=h.Wanted())
    assert engine.admit(engine.add("d", 2, says=h.Wanted())) == 2


def _report(*, ended: list[int], failed: list[int]):
    return RankReport(ended=dict.fromkeys(ended, 1), failed=dict.fromkeys(failed, 1))
