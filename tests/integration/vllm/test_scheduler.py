"""The scheduler side against a real node cache core, with vLLM's part played by the test."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("vllm")

from vllm.v1.request import RequestStatus

from tests.integration.scheduler_parts import BLOCK, Engine, Loopback
from ucm.store.node import protocol as p


def test_a_prompt_that_was_prefilled_is_a_hit_and_its_pins_go_with_the_load():
    engine = Engine(Loopback())
    engine.prefill("a", 100)

    again = engine.add("b", 100)
    assert engine.admit(again) == 96
    (load,) = engine.step({}).loads
    assert engine.slots()["pins"] == 6

    engine.copied(load.job_id)

    assert engine.slots()["pins"] == 0


def test_after_a_failed_load_the_prompt_is_computed_and_its_pins_go():
    engine = Engine(Loopback())
    engine.prefill("a", 100)
    again = engine.add("b", 100)
    engine.admit(again)
    (load,) = engine.step({}).loads

    engine.copied(load.job_id, failed=True)

    assert engine.slots()["pins"] == 0
    assert engine.admit(again) == 0
    assert engine.admit(engine.add("c", 100)) == 96


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_hit_may_be_taken_steps_after_it_was_offered(is_lost: bool) -> None:
    """From 0.33 on vLLM may put off a load that it has asked for. If what was offered is gone by
    then, the load fails, and nothing else does."""
    link = Loopback()
    engine = Engine(link)
    engine.prefill("a", 100)
    request = engine.add("b", 100)
    engine.side.matched_tokens(request, 0)
    engine.step({})
    assert engine.side.matched_tokens(request, 0) == (96, True)
    if is_lost:
        link.restart()
    for _ in range(3):
        engine.step({})

    engine.side.allocated(request, engine.blocks(request), 96)

    (load,) = engine.step({}).loads
    assert (load.generation == link.generation) is not is_lost
    engine.copied(load.job_id, failed=is_lost)
    assert engine.slots()["pins"] == 0
    assert not engine.step({}).loads


def test_layer_by_layer_one_token_is_left_to_compute():
    engine = Engine(Loopback(), layerwise=True)
    engine.prefill("a", 64)
    again = engine.add("b", 64)

    assert engine.admit(again) == 63
    assert len(engine.step({"b": 1}).step_loads) == 1


def test_blocks_are_committed_in_prompt_order_whatever_order_their_copies_end_in():
    engine = Engine(Loopback())
    request = engine.add("a", 64)
    engine.admit(request)
    for _ in range(4):
        engine.step({"a": BLOCK})
    jobs = engine.take_dumping()
    assert len(jobs) == 4

    engine.copied(*reversed(jobs[1:]))
    assert engine.slots()["ready"] == 0
    engine.copied(jobs[0])

    assert engine.slots()["ready"] == 4


def test_a_finished_request_is_held_until_its_copies_have_ended():
    engine = Engine(Loopback())
    request = engine.add("a", 64)
    engine.admit(request)
    engine.step({"a": 64})

    assert engine.side.finished(request, engine.blocks(request))[0]
    jobs = engine.take_dumping()
    assert jobs
    assert engine.step({}).released == ()
    engine.copied(*jobs)

    assert engine.step({}).released == ("a",)
    assert engine.slots()["filling"] == 0


def test_a_failed_copy_is_never_committed():
    engine = Engine(Loopback())
    request = engine.add("a", 32)
    engine.admit(request)
    engine.step({"a": 32})
    jobs = engine.take_dumping()
    assert jobs

    engine.copied(*jobs, failed=True)

    assert engine.slots()["ready"] == engine.slots()["filling"] == 0


def test_preemption_fences_running_copies_and_gives_back_the_other_slots():
    engine = Engine(Loopback())
    request = engine.add("a", 128)
    engine.admit(request)
    for _ in range(3):
        engine.step({"a": BLOCK})
    jobs = engine.take_dumping()
    assert jobs
    request.status = RequestStatus.PREEMPTED

    fence = engine.step({}).fence

    assert set(fence) == set(jobs)
    engine.copied(*jobs)
    assert engine.slots()["filling"] == 0


def test_an_aborted_request_leaves_no_slot_and_no_pin():
    engine = Engine(Loopback())
    engine.prefill("a", 100)
    waiting = engine.add("b", 100)
    extra, _ = engine.side.matched_tokens(waiting, 0)
    assert extra == 96
    assert engine.slots()["pins"] == 6

    assert not engine.side.finished(waiting, [])[0]

    assert engine.slots()["pins"] == 0


def test_when_the_memory_is_full_the_rest_of_a_prompt_is_not_dumped():
    engine = Engine(Loopback(num_slots=2))
    request = engine.add("a", 128)
    engine.admit(request)
    engine.step({"a": 128})
    engine.step({"a": 0})
    engine.copied(*engine.take_dumping())
    held, _ = engine.side.finished(request, engine.blocks(request))

    assert not held
    assert engine.slots()["filling"] == 0


def test_a_new_node_cache_gets_what_the_old_one_lost():
    link = Loopback()
    engine = Engine(link)
    request = engine.add("a", 64)
    engine.admit(request)
    engine.step({"a": 64})

    link.restart()
    engine.step({})
    engine.copied(*engine.take_dumping())

    assert engine.slots()["ready"] == 0
    assert engine.prefill("b", 64) is not None
    assert engine.slots()["ready"] == 4


def test_slots_of_a_node_cache_that_is_lost_in_the_middle_of_a_step_are_no_place_in_the_next():
    """A rank may have the memory of the next one by then, with pages of others in it."""
    link = Loopback()
    engine = Engine(link)
    request = engine.add("a", 12 * BLOCK)
    engine.admit(request)
    engine.step({"a": BLOCK})
    send = link.send

    def send_into_nowhere(message: p.ClientMessage) -> bool:
        """As NodeLink does, which tells of the loss by its generation."""
        if isinstance(message, p.Reserve):
            link.generation += 1
            return False
        return send(message)

    link.send = send_into_nowhere
    step = engine.step({"a": BLOCK})
    assert link.generation == 1
    assert [job.generation for job in step.dumps] == [0]


def test_a_node_cache_that_stops_answering_costs_one_request_its_wait_and_others_nothing():
    link = Loopback()
    engine = Engine(link, timeout_ms=1)
    link.mute = True
    first = engine.add("a", 64)
    answers = [engine.side.matched_tokens(first, 0)[0]]
    while answers[-1] is None:
        answers.append(engine.side.matched_tokens(first, 0)[0])
    assert answers[0] is None
    assert answers[-1] == 0

    second = engine.add("b", 64)
    assert engine.side.matched_tokens(second, 0) == (0, False)

    link.mute = False
    third = engine.add("c", 64)
    engine.step({})
    engine.side.matched_tokens(third, 0)
    assert engine.link.core.counters["lookups"] >= 2


def test_slots_that_come_after_a_dump_was_given_up_are_given_back():
    link = Loopback()
    engine = Engine(link, dump_timeout_ms=1)
    request = engine.add("a", 64)
    engine.admit(request)
    link.mute = True
    engine.step({"a": 64})
    held, _ = engine.side.finished(request, engine.blocks(request))
    assert held
    time.sleep(0.002)
    assert engine.step({}).released == ("a",)
    assert engine.slots()["filling"] == 4

    link.mute = False
    engine.step({})

    assert engine.slots()["filling"] == 0


def test_an_answer_that_came_while_the_machine_stood_still_is_taken():
    link = Loopback()
    engine = Engine(link, timeout_ms=1)
    engine.prefill("a", 64)
    link.mute = True
    request = engine.add("b", 64)
    assert engine.side.matched_tokens(request, 0)[0] is None
    time.sleep(0.6)  # longer than the answer's deadline and its grace
    assert engine.side.matched_tokens(request, 0)[0] is None

    link.mute = False

    assert engine.side.matched_tokens(request, 0)[0] == 64


def test_steps_that_compute_nothing_and_hear_nothing_wait_longer_and_longer_within_a_bound():
    link = Loopback()
    engine = Engine(link)
    link.mute = True
    request = engine.add("a", 64)
    engine.side.matched_tokens(request, 0)
    for _ in range(4):
        engine.step({})
        assert engine.side.matched_tokens(request, 0)[0] is None
    assert link.waits_s == [0.005, 0.01, 0.02, 0.02, 0.02]

    link.mute = False
    engine.step({})
    link.mute = True
    link.waits_s.clear()
    engine.side.matched_tokens(engine.add("b", 100), 0)
    assert link.waits_s == [0.005], "an answer came: more may follow"


def test_a_request_that_has_its_answer_does_not_wait_for_those_of_others():
    link = Loopback()
    engine = Engine(link)
    engine.prefill("stored", 64)
    first, second = engine.add("a", 64), engine.add("b", 64, salt="another")
    engine.step({})
    engine.side.matched_tokens(first, 0)
    link.mute = True
    engine.side.matched_tokens(second, 0)
    engine.step({})
    link.waits_s.clear()
    assert engine.side.matched_tokens(first, 0)[0] == 64
    assert engine.side.matched_tokens(second, 0)[0] is None
    assert link.waits_s == [0.001]
