"""Models with windows: what a prefill stores of them, where a hit ends, and what may be missing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.integration.engine.stored_parts import (
    PROMPT,
    parts_of,
    prefill_by_twos,
    stored,
    strand_keys,
)
from tests.integration.scheduler_parts import BLOCK, MANIFEST, Engine, Loopback
from tests.store.tiers.memory_tier import MemoryTier
from ucm import handoff as h
from ucm.errors import TierError
from ucm.integration.engine.epoch import EngineEpochs
from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p
from ucm.store.tiers.tier import Staged, TierNamespace

# The last token of a prompt needs two blocks before its own.
WINDOW = 2 * BLOCK + 1


def started(tier: MemoryTier, **more: object) -> Engine:
    more.setdefault("window_interval", 0)
    return Engine(Loopback(tier=tier), window=WINDOW, **more)  # type: ignore[arg-type]


def side_keys(engine: Engine, name: str) -> list[Key]:
    return strand_keys(engine, name, "w")


def remove(tier: MemoryTier, key: Key) -> bytes:
    (at,) = [each for each in tier._pages if each[1] == key]
    return tier._pages.pop(at)


def test_a_prefill_stores_all_of_the_base_and_of_a_window_what_its_end_needs(
    tier: MemoryTier,
) -> None:
    engine = started(tier)
    prefill_by_twos(engine)
    engine.add("s", PROMPT)
    keys, sides = engine.side._states["s"].prompt.keys, side_keys(engine, "s")

    assert set(keys) <= stored(tier)
    # At the end, and one token before it.
    assert stored(tier) & set(sides) == set(sides[7:])


def test_a_hit_is_all_but_the_last_token_and_loads_the_window_alone_of_the_other_strand(
    tier: MemoryTier,
) -> None:
    prefill_by_twos(started(tier))
    engine = started(tier)
    request = engine.add("s", PROMPT)

    assert engine.admit(request) == PROMPT - 1
    (job,) = engine.step({}).loads
    assert parts_of(job, 0) == [(1 + block,) for block in range(10)]
    assert parts_of(job, 1) == [(101 + block,) for block in range(7, 10)]
    engine.copied(job.job_id)
    assert engine.slots()["pins"] == 0


def test_without_a_page_of_the_window_a_hit_ends_at_the_boundary_before(tier: MemoryTier) -> None:
    prefill_by_twos(started(tier, window_interval=4 * BLOCK))
    engine = started(tier, window_interval=4 * BLOCK)
    request = engine.add("s", PROMPT)
    remove(tier, side_keys(engine, "s")[8])

    assert engine.admit(request) == 8 * BLOCK
    assert engine.counted("ucm_lookup_missed_blocks", reason="never_stored") == 2
    (job,) = engine.step({}).loads
    assert parts_of(job, 0) == [(1 + block,) for block in range(8)]
    assert parts_of(job, 1) == [(101 + block,) for block in range(6, 8)]
    engine.copied(job.job_id)
    assert engine.slots()["pins"] == 0


@pytest.mark.parametrize("is_promised", [False, True])
def test_where_every_strand_keeps_all_a_hit_ends_before_the_first_page_that_is_lost(
    tier: MemoryTier, is_promised: bool
) -> None:
    """As with MLA and an indexer: each block is a boundary, and none lies far before it."""
    prefill = Engine(Loopback(tier=tier), indexer=True)
    receipt = prefill_by_twos(prefill, says=h.Wanted())
    engine = Engine(Loopback(tier=tier), indexer=True)
    says = {"says": h.parse(receipt)} if is_promised else {}
    request = engine.add("s", PROMPT, **says)
    remove(tier, strand_keys(engine, "s", "i")[7])

    assert engine.admit(request) == 7 * BLOCK
    (job,) = engine.step({}).loads
    assert parts_of(job, 0) == parts_of(job, 1) == [(1 + block,) for block in range(7)]
    engine.copied(job.job_id)
    assert engine.slots()["pins"] == 0


def test_without_any_boundary_nothing_is_loaded_and_nothing_stays_pinned(tier: MemoryTier) -> None:
    prefill_by_twos(started(tier))
    engine = started(tier)
    request = engine.add("s", PROMPT)
    remove(tier, side_keys(engine, "s")[9])

    assert engine.admit(request) == 0
    assert engine.counted("ucm_lookup_missed_blocks", reason="never_stored") == 10
    assert engine.slots()["pins"] == 0


def test_a_window_block_that_vllm_has_taken_back_is_a_hole_and_the_rest_is_stored(
    tier: MemoryTier,
) -> None:
    engine = started(tier, window_interval=2 * BLOCK)
    request = engine.add("r", PROMPT)
    engine.admit(request)
    sides = side_keys(engine, "r")
    engine.link.mute = True  # slots come too late
    engine.step({"r": 4 * BLOCK})
    engine.step({"r": 2 * BLOCK})
    engine.link.mute = False
    while request.num_computed_tokens < PROMPT:
        engine.step({"r": BLOCK})
    engine.side.finished(request, engine.blocks(request))
    engine.step({})
    engine.copied(*engine.take_dumping())

    assert not stored(tier) & set(sides[:4])
    assert stored(tier) & set(sides[7:]) == set(sides[7:])
    slots = engine.slots()
    assert slots["filling"] == slots["pins"] == 0


def test_copies_of_a_window_end_with_their_step(tier: MemoryTier) -> None:
    engine = started(tier)
    request = engine.add("r", PROMPT)
    engine.admit(request)
    engine.step({"r": 4 * BLOCK})
    step = engine.step({"r": 6 * BLOCK})
    windows = {job.job_id for job in step.dumps if parts_of(job, 1)}
    assert windows and windows == set(step.at_once)


@pytest.mark.parametrize("has_window", [True, False])
def test_a_receipt_is_given_only_if_the_window_at_its_end_is_kept(
    tier: MemoryTier, has_window: bool
) -> None:
    engine = started(tier)
    request = engine.add("r", PROMPT, says=h.Wanted())
    engine.admit(request)
    if not has_window:
        engine.side._dumps._dumps["r"].strands[1].cursor.give_up()
    while request.num_computed_tokens < PROMPT:
        engine.step({"r": 2 * BLOCK})
    _, params = engine.side.finished(request, engine.blocks(request))
    assert (params is not None) == has_window


def test_a_receipt_does_not_end_where_no_window_is_kept(tier: MemoryTier) -> None:
    """Decode would wait for pages that nobody ever writes."""
    engine = started(tier)
    request = engine.add("r", PROMPT, says=h.Wanted())
    engine.admit(request)
    engine.side._dumps._dumps["r"].strands[0].cursor.lose(5)
    while request.num_computed_tokens < PROMPT:
        engine.step({"r": 2 * BLOCK})
    assert engine.side.finished(request, engine.blocks(request))[1] is None


def test_a_window_that_could_not_be_copied_costs_its_own_boundary_alone(tier: MemoryTier) -> None:
    engine = started(tier, window_interval=4 * BLOCK)
    request = engine.add("r", PROMPT, says=h.Wanted())
    engine.admit(request)
    step = engine.step({"r": 4 * BLOCK})
    engine.take_dumping()
    for job in step.dumps:
        engine.copied(job.job_id, failed=bool(parts_of(job, 1)))
    while request.num_computed_tokens < PROMPT:
        engine.step({"r": 2 * BLOCK})
    receipt = h.parse(engine.side.finished(request, engine.blocks(request))[1])
    assert isinstance(receipt, h.Receipt) and receipt.tokens == PROMPT
    engine.step({})
    engine.copied(*engine.take_dumping())
    assert not stored(tier) & set(side_keys(engine, "r")[1:4])


def test_a_receipt_is_not_given_for_a_window_that_storage_has_refused(tier: MemoryTier) -> None:
    engine = started(tier)
    request = engine.add("r", PROMPT, says=h.Wanted())
    engine.admit(request)
    while request.num_computed_tokens < PROMPT:
        engine.step({"r": 2 * BLOCK})
    refused: list[bytes] = [side_keys(engine, "r")[8]]
    engine.side._promises.on_saving(p.SavingNews(refused=refused, saved=[], reason=Outcome.FULL))
    assert engine.side.finished(request, engine.blocks(request))[1] is None


def test_a_promised_window_is_not_waited_for_where_no_prefill_keeps_one(tier: MemoryTier) -> None:
    receipt = prefill_by_twos(started(tier), says=h.Wanted())
    decode = started(tier)
    request = decode.add("s", PROMPT, says=h.parse(receipt))
    remove(tier, decode.side._states["s"].prompt.keys[5])
    for _ in range(4):  # well before the promise is over
        decode.side.matched_tokens(request, 0)
        decode.link.now_s += 0.1
        decode.link.core.tick()
        decode.link.timers.fire()
    assert decode.side.matched_tokens(request, 0) == (0, False)


def test_there_are_no_tails_where_one_strand_has_pages_of_units_larger_than_a_token() -> None:
    side = started(MemoryTier()).side
    base, window = side._facts.strands
    assert side._epochs.rules.keeps_tails
    opaque = replace(window, geometry=replace(window.geometry, unit_tokens=BLOCK))
    facts = replace(side._facts, strands=(base, opaque))
    assert not EngineEpochs(side._settings, facts, MANIFEST).rules.keeps_tails


def test_a_promised_window_is_waited_for(tier: MemoryTier) -> None:
    receipt = prefill_by_twos(started(tier), says=h.Wanted())
    decode = started(tier)
    request = decode.add("s", PROMPT, says=h.parse(receipt))
    late = side_keys(decode, "s")[9]
    (at,) = [each for each in tier._pages if each[1] == late]
    page = tier._pages.pop(at)
    assert decode.side.matched_tokens(request, 0) == (None, False)
    tier._pages[at] = page
    for _ in range(20):
        decode.link.now_s += 0.1
        decode.link.core.tick()
        decode.link.timers.fire()
    assert decode.side.matched_tokens(request, 0) == (PROMPT - 1, True)


def test_the_last_page_of_a_window_is_published_after_all_others_of_it(tier: MemoryTier) -> None:
    """Who waits for a promised window takes a page that is missing before its last one for gone."""
    engine = started(tier)
    engine.add("s", PROMPT)
    sides = side_keys(engine, "s")

    def stage(namespace: TierNamespace, key: Key, *args: Any, **kwargs: Any) -> Staged | None:
        if key == sides[7]:
            raise TierError("no", reason=Outcome.IO_ERROR)
        return MemoryTier.stage(tier, namespace, key, *args, **kwargs)

    tier.stage = stage  # type: ignore[method-assign]
    prefill_by_twos(engine)
    assert stored(tier).isdisjoint(sides)
