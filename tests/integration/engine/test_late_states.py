"""Models with states: what vLLM has of one in this step it need not have in the next, and slots may
come too late."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("vllm")

from tests.integration.engine.state_parts import (
    LAST,
    offer,
    prefill,
    started,
    state_keys_of,
)
from tests.integration.engine.stored_parts import PROMPT, stored
from tests.integration.scheduler_parts import BLOCK, Engine, Loopback
from tests.store.tiers.memory_tier import MemoryTier
from ucm import handoff as h
from ucm.store.node import protocol as p


def test_a_state_that_has_no_slot_in_its_step_is_a_hole_and_no_receipt_promises_it(
    tier: MemoryTier,
) -> None:
    engine = started(tier)
    request = engine.add("r", PROMPT, says=h.Wanted())
    engine.admit(request)
    engine.step({"r": 6 * BLOCK})
    engine.link.mute = True
    offer(engine, "r", 7 * BLOCK)
    engine.step({"r": BLOCK})
    engine.link.mute = False
    engine.step({"r": 2 * BLOCK})
    engine.step({"r": BLOCK})
    receipt = engine.end(request)

    assert receipt is None
    assert not stored(tier) & set(state_keys_of(engine))
    slots = engine.slots()
    assert (slots["pins"], slots["filling"]) == (0, 0)


def test_a_slot_that_comes_when_the_request_has_ended_gets_no_state(tier: MemoryTier) -> None:
    """Where a kernel keeps a state in the middle of a step, it may be the last step."""
    engine = started(tier)
    request = engine.add("r", PROMPT, says=h.Wanted())
    engine.admit(request)
    engine.step({"r": 4 * BLOCK})
    # Nobody could foresee this one.
    engine.link.mute = True
    offer(engine, "r", 6 * BLOCK)
    engine.step({"r": 6 * BLOCK})
    engine.side.finished(request, engine.blocks(request))
    engine.link.mute = False
    parts = [part for job in engine.step({}).dumps for part in job.parts]
    engine.copied(*engine.take_dumping())
    engine.step({})

    assert not [part for part in parts if part.target]
    assert not stored(tier) & set(state_keys_of(engine))
    slots = engine.slots()
    assert (slots["pins"], slots["filling"]) == (0, 0)


def test_a_slot_that_comes_late_is_given_back_though_the_request_goes_on(tier: MemoryTier) -> None:
    engine = started(tier)
    request = engine.add("r", PROMPT)
    engine.admit(request)
    engine.step({"r": 7 * BLOCK})
    offer(engine, "r", LAST)
    engine.step({"r": 2 * BLOCK})
    engine.copied(*engine.take_dumping())
    # All that was foreseen is done.
    engine.link.mute = True
    offer(engine, "r", PROMPT)
    engine.step({"r": BLOCK})
    engine.link.mute = False
    for _ in range(3):
        engine.step({"r": 1})
        engine.copied(*engine.take_dumping())

    assert engine.slots()["filling"] == 0


class LateReserves(Loopback):
    """Slots come a moment later than a poll that does not wait; lookups that are `held` are never
    answered, so that who waits for them waits for as long as it may."""

    is_held = False

    def __init__(self, tier: MemoryTier) -> None:
        self._held: set[int] = set()
        super().__init__(tier=tier)

    def send(self, message: p.ClientMessage) -> bool:
        if isinstance(message, p.Lookup) and self.is_held:
            self._held.add(message.id)
        return super().send(message)

    def poll(self, timeout_s: float = 0.0) -> list[p.NodeMessage]:
        late = [
            each
            for each in self.inbox
            if (isinstance(each, p.ReserveReply) and timeout_s <= 0)
            or getattr(each, "id", None) in self._held
        ]
        self.inbox[:] = [each for each in self.inbox if each not in late]
        if not self.inbox:
            time.sleep(max(0.0, timeout_s))
        messages = super().poll(timeout_s)
        self.inbox[:] = late
        return messages


def test_a_state_is_waited_for_though_a_lookup_has_used_up_what_the_step_may_wait(
    tier: MemoryTier,
) -> None:
    """A prompt of one step has its slots asked for in the step that has the state."""
    link = LateReserves(tier)
    engine = Engine(link, states=True)
    engine.step({})
    link.is_held = True
    slow = engine.add("slow", PROMPT + 7 * BLOCK)
    assert engine.side.matched_tokens(slow, 0)[0] is None
    link.is_held = False
    request = engine.add("r", 4 * BLOCK)
    extra = None
    while extra is None:
        engine.side.matched_tokens(slow, 0)
        extra, _ = engine.side.matched_tokens(request, 0)
        engine.step({})
    engine.side.matched_tokens(slow, 0)
    engine.side.allocated(request, engine.blocks(request), 0)
    offer(engine, "r", 3 * BLOCK)
    jobs = engine.step({"r": 4 * BLOCK}).dumps

    assert [part.block_ids for job in jobs for part in job.parts if part.target == 1] == [(203,)]


def test_a_producer_promises_what_vllm_has_itself_though_its_lookup_is_under_way(
    tier: MemoryTier,
) -> None:
    """It doesn't wait for its lookups; the store has it all."""
    prefill(started(tier))
    link = LateReserves(tier)
    engine = Engine(link, states=True, loads=False)
    request = engine.add("r", PROMPT, says=h.Wanted())
    link.is_held = True
    assert engine.side.matched_tokens(request, LAST)[0] == 0
    engine.side.allocated(request, engine.blocks(request), 0)
    request.num_computed_tokens = LAST
    engine.step({"r": BLOCK})
    _, receipt = engine.side.finished(request, engine.blocks(request))
    said = h.parse(receipt)

    assert isinstance(said, h.Receipt) and said.tokens == LAST
