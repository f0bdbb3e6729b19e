"""Models with states: which are stored, where a hit ends, and what may be missing."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from tests.integration.engine.state_parts import (
    LAST,
    offer,
    prefill,
    started,
    state_keys,
    state_keys_of,
)
from tests.integration.engine.stored_parts import PROMPT, damage, stored
from tests.integration.scheduler_parts import BLOCK
from tests.store.tiers.memory_tier import MemoryTier
from ucm import handoff as h
from ucm.outcome import Outcome


def test_of_states_what_vllm_offers_is_stored_and_every_block_of_the_base(tier: MemoryTier) -> None:
    engine = started(tier)
    jobs, _ = prefill(engine)
    engine.add("s", PROMPT)
    keys, states = engine.side._states["s"].prompt.keys, state_keys(engine, "s")

    assert set(keys) <= stored(tier)
    assert stored(tier) & set(states) == {states[8]}
    parts = [part for job in jobs for part in job.parts if part.target]
    # Both fields of both groups, in one page.
    assert [part.block_ids for part in parts] == [(209,), (209,), (309,), (309,)]
    offsets = [part.slot_offset - parts[0].slot_offset for part in parts]
    assert offsets[0] == offsets[2] == 0 and offsets[1] == offsets[3] > 0


def test_a_hit_ends_where_a_state_is_and_loads_it_into_one_block_of_each_group(
    tier: MemoryTier,
) -> None:
    prefill(started(tier))
    engine = started(tier)

    assert engine.admit(engine.add("s", PROMPT)) == LAST
    (job,) = engine.step({}).loads
    of_base = [part.block_ids for part in job.parts if part.target == 0]
    assert of_base == [(1 + block,) for block in range(9)]
    assert [part.block_ids for part in job.parts if part.target] == [
        (209,),
        (209,),
        (309,),
        (309,),
    ]
    engine.copied(job.job_id)
    assert engine.slots()["pins"] == 0


def test_a_longer_prompt_goes_on_where_the_shorter_one_has_kept_a_state(tier: MemoryTier) -> None:
    """Of a prompt that ended with a block it lies one block before that."""
    prefill(started(tier))
    for num_tokens in (PROMPT + 5, PROMPT + 3 * BLOCK):
        assert started_hit(tier, num_tokens) == LAST
    assert started_hit(tier, LAST) == 0


def started_hit(tier: MemoryTier, num_tokens: int) -> int:
    engine = started(tier)
    found = engine.admit(engine.add("s", num_tokens))
    engine.copied(*(job.job_id for job in engine.step({}).loads))
    assert engine.slots()["pins"] == 0
    return found


def test_without_its_state_nothing_is_loaded_and_the_reason_is_counted(tier: MemoryTier) -> None:
    prefill(started(tier))
    engine = started(tier)
    request = engine.add("s", PROMPT)
    (at,) = [each for each in tier._pages if each[1] == state_keys(engine, "s")[8]]
    tier._pages.pop(at)

    assert engine.admit(request) == 0
    assert engine.counted("ucm_lookup_missed_blocks", reason="never_stored") == 9
    assert engine.slots()["pins"] == 0


@pytest.mark.parametrize("says_expected", [False, True])
def test_behind_a_promised_state_that_is_damaged_none_is_waited_for_that_nobody_kept(
    tier: MemoryTier, says_expected: bool
) -> None:
    """One block before, where only a prompt that ended here would have kept one."""
    _, receipt = prefill(started(tier), says=h.Wanted())
    decoder = started(tier)
    request = decoder.add("s", PROMPT, says=h.Expected() if says_expected else receipt)
    damage(tier, state_keys(decoder, "s")[8])
    for _ in range(3):  # well before the promise is over
        decoder.side.matched_tokens(request, 0)

    assert decoder.side.matched_tokens(request, 0) == (0, False)
    assert decoder.side._hits.reason("s") is Outcome.CORRUPT
    assert decoder.slots()["pins"] == 0


@pytest.mark.parametrize("is_promised", [False, True])
def test_behind_a_damaged_state_a_hit_ends_where_a_shorter_prompt_kept_one(
    tier: MemoryTier, is_promised: bool
) -> None:
    _, receipt = prefill(started(tier), at=(8 * BLOCK, LAST), says=h.Wanted())
    decoder = started(tier)
    request = decoder.add("s", PROMPT, says=receipt if is_promised else None)
    damage(tier, state_keys(decoder, "s")[8])

    assert decoder.admit(request) == 8 * BLOCK


def test_a_state_where_prompts_part_is_stored_though_nobody_expects_it(tier: MemoryTier) -> None:
    engine = started(tier)
    prefill(engine, at=(4 * BLOCK, LAST))
    engine.add("s", PROMPT)
    states = state_keys(engine, "s")
    assert stored(tier) & set(states) == {states[3], states[8]}
    # Who shares no more than that goes on there.
    assert started_hit(tier, 4 * BLOCK + 1) == 4 * BLOCK


@pytest.mark.parametrize("num_tokens", [PROMPT, PROMPT + 5])
def test_a_receipt_promises_what_the_last_state_goes_on_from(
    tier: MemoryTier, num_tokens: int
) -> None:
    end = (num_tokens - 1) // BLOCK * BLOCK
    engine = started(tier)
    _, receipt = prefill(engine, num_tokens=num_tokens, at=(end,), says=h.Wanted())
    assert isinstance(receipt, h.Receipt)
    assert (receipt.tokens, receipt.is_whole) == (end, True), "no more can be promised"

    decoder = started(tier)
    assert decoder.admit(decoder.add("s", num_tokens, says=receipt)) == end
    assert decoder.counted("ucm_handoff_promised_tokens") == end
    assert decoder.counted("ucm_handoff_loaded_tokens") == end


def test_who_loads_a_prompt_can_promise_it_again(tier: MemoryTier) -> None:
    """vLLM offers no state a second time, neither what it has found itself nor what was loaded."""
    prefill(started(tier))
    engine = started(tier)
    jobs, receipt = prefill(engine, at=(), says=h.Wanted())

    assert not jobs, "the store has it all"
    assert isinstance(receipt, h.Receipt) and receipt.tokens == LAST


def test_a_state_of_vllms_own_cache_is_stored_again_if_the_store_has_lost_it(
    tier: MemoryTier,
) -> None:
    engine = started(tier)
    request = engine.add("r", PROMPT, says=h.Wanted())
    extra = None
    while extra is None:
        extra, _ = engine.side.matched_tokens(request, LAST)
        engine.step({})
    engine.side.allocated(request, engine.blocks(request), 0)
    request.num_computed_tokens = LAST
    engine.step({"r": BLOCK})
    receipt = engine.end(request)

    assert receipt is not None
    assert stored(tier) & set(state_keys_of(engine))
    assert started_hit(tier, PROMPT) == LAST


@pytest.mark.parametrize(
    "what", ["a load of another request into its blocks has failed", "a reset"]
)
def test_states_computed_from_what_keys_do_not_name_are_not_stored(
    tier: MemoryTier, what: str
) -> None:
    """vLLM goes on to offer them."""
    engine = started(tier)
    request = engine.add("r", PROMPT)
    engine.admit(request)
    keys = state_keys(engine, "r")
    engine.step({"r": 6 * BLOCK})
    if what == "a reset":
        engine.side.reset()
    else:
        engine.side.blocks_invalid({2})
    for end in (7 * BLOCK, LAST):
        offer(engine, "r", end)
        engine.step({"r": end - request.num_computed_tokens})
    engine.step({"r": BLOCK})
    engine.end(request)

    assert not stored(tier) & set(keys)
    slots = engine.slots()
    assert (slots["pins"], slots["filling"]) == (0, 0)


def test_of_a_prompt_under_way_what_its_last_state_needs_is_waited_for(tier: MemoryTier) -> None:
    decoder = started(tier)
    decoder.link.mute = True
    decoder.add("s", PROMPT, says=h.Expected())
    promise = decoder.side._promises.promise("s")

    assert promise is not None
    assert (promise.num_blocks, promise.tokens) == (9, LAST)


def test_what_vllm_has_up_to_the_middle_of_a_block_is_not_gone_on_from(tier: MemoryTier) -> None:
    prefill(started(tier))
    engine = started(tier)
    request = engine.add("s", PROMPT)
    extra = None
    while extra is None:
        extra, _ = engine.side.matched_tokens(request, 2 * BLOCK + 3)
        engine.step({})

    assert extra == 0
    assert engine.slots()["pins"] == 0
