"""Models whose layers all have windows: no strand has every block, hits are found from windows."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from tests.integration.engine.stored_parts import (
    PROMPT,
    parts_of,
    prefill_by_twos,
    stored,
    strand_keys,
)
from tests.integration.scheduler_parts import BLOCK, Engine, Loopback
from tests.store.tiers.memory_tier import MemoryTier
from ucm import handoff as h
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p

# What the last token of a prompt needs: three blocks of the one strand, two of the other.
WINDOW, OTHER = 2 * BLOCK + 1, BLOCK + 1


def started(tier: MemoryTier, **more: object) -> Engine:
    more.setdefault("window_interval", 0)
    return Engine(Loopback(tier=tier), window=OTHER, base_window=WINDOW, **more)  # type: ignore[arg-type]


def keys_of(engine: Engine, name: str) -> tuple[list[Key], list[Key]]:
    return list(engine.side._states[name].prompt.keys), strand_keys(engine, name, "w")


def remove(tier: MemoryTier, *keys: Key) -> None:
    for at in [each for each in tier._pages if each[1] in keys]:
        del tier._pages[at]


def test_a_prefill_stores_the_windows_at_its_end_and_nothing_else(tier: MemoryTier) -> None:
    engine = started(tier)
    prefill_by_twos(engine)
    engine.add("s", PROMPT)
    keys, sides = keys_of(engine, "s")

    assert stored(tier) == {*keys[7:], *sides[8:]}


def test_a_hit_is_all_but_the_last_token_and_loads_the_windows_alone(tier: MemoryTier) -> None:
    prefill_by_twos(started(tier))
    engine = started(tier)
    request = engine.add("s", PROMPT)

    assert engine.admit(request) == PROMPT - 1
    (job,) = engine.step({}).loads
    assert parts_of(job, 0) == [(1 + block,) for block in range(7, 10)]
    assert parts_of(job, 1) == [(101 + block,) for block in range(8, 10)]
    assert engine.counted("ucm_hit_tokens", source="files") == PROMPT - 1
    engine.copied(job.job_id)
    assert engine.slots()["pins"] == 0


@pytest.mark.parametrize("length", [PROMPT + 5, 14 * BLOCK, 31 * BLOCK + 3])
def test_a_conversation_goes_on_where_its_last_prompt_ended(tier: MemoryTier, length: int) -> None:
    """That is no boundary of the longer prompt."""
    prefill_by_twos(started(tier))
    engine = started(tier, window_interval=4 * BLOCK)
    assert engine.admit(engine.add("s", length)) == PROMPT
    missed = -(-length // BLOCK) - 10 - bool(length % BLOCK)
    assert engine.counted("ucm_lookup_missed_blocks", reason="never_stored") == missed


def test_a_shorter_prompt_ends_at_a_boundary_of_the_longer(tier: MemoryTier) -> None:
    prefill_by_twos(started(tier, window_interval=4 * BLOCK))
    engine = started(tier, window_interval=4 * BLOCK)
    assert engine.admit(engine.add("s", 7 * BLOCK)) == 4 * BLOCK


@pytest.mark.parametrize("lost", ["of the longest window", "of the other"])
def test_without_a_page_of_any_window_a_hit_ends_at_the_boundary_before(
    tier: MemoryTier, lost: str
) -> None:
    prefill_by_twos(started(tier, window_interval=4 * BLOCK))
    engine = started(tier, window_interval=4 * BLOCK)
    request = engine.add("s", PROMPT)
    keys, sides = keys_of(engine, "s")
    remove(tier, keys[8] if lost == "of the longest window" else sides[8])

    assert engine.admit(request) == 8 * BLOCK
    assert engine.counted("ucm_lookup_missed_blocks", reason="never_stored") == 2
    (job,) = engine.step({}).loads
    engine.copied(job.job_id)
    assert engine.slots()["pins"] == 0


def test_without_any_window_nothing_is_loaded_and_nothing_stays_pinned(tier: MemoryTier) -> None:
    prefill_by_twos(started(tier))
    engine = started(tier)
    request = engine.add("s", PROMPT)
    gone = keys_of(engine, "s")[1][8:]
    remove(tier, *gone)

    assert engine.admit(request) == 0
    assert engine.counted("ucm_lookup_missed_blocks", reason="never_stored") == 10
    assert engine.slots()["pins"] == 0
    # What is computed then is stored, as far as it is not there.
    while request.num_computed_tokens < PROMPT:
        engine.step({"s": 2 * BLOCK})
    engine.side.finished(request, engine.blocks(request))
    engine.step({})
    engine.copied(*engine.take_dumping())
    assert set(gone) <= stored(tier)


def test_a_hit_may_end_wherever_what_it_needs_is_there(tier: MemoryTier) -> None:
    """What is kept for those who go on a token before the end is enough a block before."""
    prefill_by_twos(started(tier))
    engine = started(tier)
    request = engine.add("s", PROMPT)
    for keys in keys_of(engine, "s"):
        remove(tier, keys[9])
    assert engine.admit(request) == 9 * BLOCK


def test_a_page_that_can_not_be_read_is_the_reason_for_all_that_is_lost_with_it(
    tier: MemoryTier,
) -> None:
    """Nothing is asked for besides that nobody has kept."""
    prefill_by_twos(started(tier, window_interval=4 * BLOCK))
    engine = started(tier, window_interval=4 * BLOCK)
    request = engine.add("s", PROMPT)
    damaged = keys_of(engine, "s")[0][8]
    tier._pages.update({at: page[:-1] for at, page in tier._pages.items() if at[1] == damaged})

    assert engine.admit(request) == 8 * BLOCK
    assert engine.counted("ucm_lookup_missed_blocks", reason="corrupt") == 2
    assert engine.counted("ucm_lookup_missed_blocks", reason="never_stored") == 0


def test_behind_windows_that_are_broken_an_earlier_prompt_s_is_found(tier: MemoryTier) -> None:
    prefill_by_twos(started(tier), 4 * BLOCK)
    prefill_by_twos(started(tier), 9 * BLOCK)
    engine = started(tier)
    request = engine.add("s", 14 * BLOCK)
    remove(tier, keys_of(engine, "s")[0][7])
    assert engine.admit(request) == 4 * BLOCK


def test_a_cold_prompt_is_looked_for_in_few_places_and_no_page_is_asked_for(
    tier: MemoryTier,
) -> None:
    engine = started(tier)
    sent: list[p.ClientMessage] = []
    send = engine.link.send
    engine.link.send = lambda message: (sent.append(message), send(message))[1]  # type: ignore[method-assign]
    assert engine.admit(engine.add("s", PROMPT)) == 0

    assert [len(each.keys) for each in sent if isinstance(each, p.Find)] == [5]
    assert not any(isinstance(each, p.Lookup) for each in sent)


def test_behind_what_vllm_has_itself_only_the_rest_of_the_windows_is_loaded(
    tier: MemoryTier,
) -> None:
    prefill_by_twos(started(tier))
    engine = started(tier)
    request = engine.add("s", PROMPT)
    has = 9 * BLOCK
    while (hit := engine.side.matched_tokens(request, has)) == (None, False):
        engine.step({})
    assert hit == (BLOCK - 1, True)
    request.num_computed_tokens = has
    engine.side.allocated(request, engine.blocks(request), BLOCK - 1)
    (job,) = engine.step({}).loads
    assert parts_of(job, 0) == [(10,)] and parts_of(job, 1) == [(110,)]


def test_an_engine_that_loads_nothing_asks_for_nothing_and_stores_what_is_not_there(
    tier: MemoryTier,
) -> None:
    engine = started(tier, loads=False)
    prefill_by_twos(engine)
    num_lookups = engine.link.core.status(1, pid=1, arena="", check=True).counters.get("lookups", 0)
    assert (num_lookups, len(stored(tier))) == (0, 5)


def test_a_window_block_that_vllm_has_taken_back_is_a_hole_and_the_rest_is_stored(
    tier: MemoryTier,
) -> None:
    engine = started(tier, window_interval=2 * BLOCK)
    request = engine.add("r", PROMPT)
    engine.admit(request)
    keys, _ = keys_of(engine, "r")
    engine.link.mute = True  # slots come too late
    engine.step({"r": 4 * BLOCK})
    engine.step({"r": 2 * BLOCK})
    engine.link.mute = False
    while request.num_computed_tokens < PROMPT:
        step = engine.step({"r": BLOCK})
        assert {job.job_id for job in step.dumps} == set(step.at_once)
    engine.side.finished(request, engine.blocks(request))
    engine.step({})
    engine.copied(*engine.take_dumping())

    assert not stored(tier) & set(keys[:4])
    assert stored(tier) & set(keys[7:]) == set(keys[7:])
    slots = engine.slots()
    assert slots["filling"] == slots["pins"] == 0


@pytest.mark.parametrize("lost", [None, 0, 1])
def test_a_receipt_is_given_only_if_every_window_at_its_end_is_kept(
    tier: MemoryTier, lost: int | None
) -> None:
    engine = started(tier)
    request = engine.add("r", PROMPT, says=h.Wanted())
    engine.admit(request)
    if lost is not None:
        engine.side._dumps._dumps["r"].strands[lost].cursor.holes.add(9)
    while request.num_computed_tokens < PROMPT:
        engine.step({"r": 2 * BLOCK})
    receipt = h.parse(engine.side.finished(request, engine.blocks(request))[1])
    if lost is None:
        assert isinstance(receipt, h.Receipt) and receipt.tokens == PROMPT
    else:
        assert receipt is None


@pytest.mark.parametrize("strand", [0, 1])
def test_a_promised_window_is_waited_for(tier: MemoryTier, strand: int) -> None:
    receipt = prefill_by_twos(started(tier), PROMPT + 5, says=h.Wanted())
    decode = started(tier)
    request = decode.add("s", PROMPT + 5, says=h.parse(receipt))
    late = keys_of(decode, "s")[strand][10]
    (at,) = [each for each in tier._pages if each[1] == late]
    page = tier._pages.pop(at)
    assert decode.side.matched_tokens(request, 0) == (None, False)
    tier._pages[at] = page
    for _ in range(20):
        decode.link.now_s += 0.1
        decode.link.core.tick()
        decode.link.timers.fire()
    assert decode.side.matched_tokens(request, 0) == (PROMPT + 4, True)


def test_what_was_promised_of_a_shorter_prompt_is_waited_for_at_its_end(tier: MemoryTier) -> None:
    receipt = prefill_by_twos(started(tier), says=h.Wanted())
    decode = started(tier)
    request = decode.add("s", PROMPT + 3 * BLOCK, says=h.parse(receipt))
    assert decode.admit(request) == PROMPT


@pytest.mark.parametrize("num_boundaries", range(4))
def test_a_prompt_whose_prefill_is_under_way_is_waited_for_from_boundary_to_boundary(
    tier: MemoryTier, num_boundaries: int
) -> None:
    """Each takes nearly as long as decode waits for one. If prefill ends before the prompt does,
    what it has stored is loaded."""
    ends = [4 * BLOCK, 8 * BLOCK, PROMPT + 5][:num_boundaries]
    prefill_by_twos(started(tier, window_interval=4 * BLOCK), PROMPT + 5, says=h.Wanted())
    decode = started(tier, window_interval=4 * BLOCK)
    request = decode.add("s", PROMPT + 5, says=h.Expected())
    keys, sides = keys_of(decode, "s")
    coming, tier._pages = tier._pages, {}

    def passes(seconds: float) -> tuple[int | None, bool]:
        hit = decode.side.matched_tokens(request, 0)
        for _ in range(int(seconds * 10)):
            decode.link.now_s += 0.1
            decode.link.core.tick()
            decode.link.timers.fire()
            hit = decode.side.matched_tokens(request, 0)
            if hit[0] is not None:
                break
        return hit

    for end in ends:
        assert passes(25) == (None, False)
        there = {*keys[: -(-end // BLOCK)], *sides[: -(-end // BLOCK)]}
        tier._pages.update({at: page for at, page in coming.items() if at[1] in there})
    loaded = min(ends[-1], PROMPT + 4) if ends else 0
    assert passes(40) == (loaded, bool(loaded))
    decode.side.finished(request, ())
    assert decode.slots()["pins"] == 0


def test_who_leaves_while_a_prefill_is_under_way_leaves_nothing_behind(tier: MemoryTier) -> None:
    prefill_by_twos(started(tier, window_interval=4 * BLOCK))
    decode = started(tier, window_interval=4 * BLOCK)
    request = decode.add("s", PROMPT, says=h.Expected())
    remove(tier, *(key for keys in keys_of(decode, "s") for key in keys[8:]))
    for _ in range(5):
        assert decode.side.matched_tokens(request, 0) == (None, False)
    decode.side.finished(request, ())
    assert decode.slots()["pins"] == 0
    assert decode.link.core.lookups.num_open == 0


def test_a_node_cache_that_is_lost_while_it_is_asked_is_asked_anew(tier: MemoryTier) -> None:
    prefill_by_twos(started(tier))
    engine = started(tier)
    request = engine.add("s", PROMPT)
    engine.link.mute = True
    assert engine.side.matched_tokens(request, 0) == (None, False)
    engine.link.restart()
    engine.link.mute = False
    engine.step({})
    assert engine.admit(request) == PROMPT - 1
