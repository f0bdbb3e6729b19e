"""Which pages beside the base a promise covers: those are waited for, though others are lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("vllm")

from tests.integration.engine.state_parts import LAST, prefill, started, state_keys
from tests.integration.engine.stored_parts import PROMPT, damage, prefill_by_twos, strand_keys
from tests.integration.scheduler_parts import BLOCK, Engine, Loopback
from tests.store.tiers.memory_tier import MemoryTier
from ucm import handoff as h
from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key


def take(tier: MemoryTier, key: Key) -> Callable[[], None]:
    """Takes a page away. Returns what brings it."""
    (at,) = [each for each in tier._pages if each[1] == key]
    page = tier._pages.pop(at)
    return lambda: tier._pages.update({at: page})


def answer_in(engine: Engine, name: str, most_s: float) -> int | None:
    """What vLLM is told within so many seconds, in tenths; None for nothing yet."""
    for _ in range(round(most_s * 10)):
        found, _ = engine.side.matched_tokens(engine.requests[name], 0)
        if found is not None:
            return found
        engine.link.now_s += 0.1
        engine.link.core.tick()
        engine.link.timers.fire()
    return None


def waits_for(engine: Engine, bring: Callable[[], None]) -> int | None:
    """What it is told once a page is brought that it had waited for."""
    assert answer_in(engine, "s", 1.0) is None, "a page that is promised is waited for"
    bring()
    return answer_in(engine, "s", 2.0)


@pytest.mark.parametrize("says_expected", [False, True])
def test_a_promised_state_is_waited_for_though_all_of_the_base_is_there(
    tier: MemoryTier, says_expected: bool
) -> None:
    """It is larger than a page of the base, and the base may be that of a longer prompt: that the
    base is there doesn't say that the state was lost."""
    _, receipt = prefill(started(tier), says=h.Wanted())
    decode = started(tier)
    decode.add("s", PROMPT, says=h.Expected() if says_expected else receipt)

    assert waits_for(decode, take(tier, state_keys(decode, "s")[8])) == LAST


def test_of_a_receipt_for_a_shorter_prompt_the_state_at_its_end_is_waited_for(
    tier: MemoryTier,
) -> None:
    """At that place no prefill of the longer prompt keeps one."""
    short = 6 * BLOCK
    _, receipt = prefill(started(tier), num_tokens=short + 3, at=(short,), says=h.Wanted())
    decode = started(tier)
    decode.add("s", PROMPT, says=receipt)

    assert waits_for(decode, take(tier, state_keys(decode, "s")[5])) == short


def with_window(tier: MemoryTier, interval_tokens: int) -> Engine:
    link = Loopback(tier=tier)
    return Engine(link, window=2 * BLOCK + 1, window_interval=interval_tokens)


@pytest.mark.parametrize(
    ("prefill_interval", "found"), [(4 * BLOCK, 8 * BLOCK), (6 * BLOCK, 0), (0, 0)]
)
def test_behind_a_damaged_window_a_hit_ends_at_one_that_is_there_and_waits_for_none(
    tier: MemoryTier, prefill_interval: int, found: int
) -> None:
    """What is kept before what is promised was published before it. Prefill may have another
    interval, by which nobody ever keeps what decode looks for."""
    num_tokens = 11 * BLOCK
    receipt = prefill_by_twos(with_window(tier, prefill_interval), num_tokens, says=h.Wanted())
    decode = with_window(tier, 4 * BLOCK)
    decode.add("s", num_tokens, says=h.parse(receipt))
    damage(tier, strand_keys(decode, "s", "w")[10])

    assert answer_in(decode, "s", 0.5) == found
    assert decode.side._hits.reason("s") is Outcome.CORRUPT


@pytest.mark.parametrize("lost", [5, 9])
def test_behind_a_damaged_page_of_the_base_nothing_else_is_blamed_or_waited_for(
    tier: MemoryTier, lost: int
) -> None:
    """Where the base ends then nobody keeps a window."""
    num_tokens = 11 * BLOCK
    receipt = prefill_by_twos(with_window(tier, 0), num_tokens, says=h.Wanted())
    decode = with_window(tier, 2 * BLOCK)
    decode.add("s", num_tokens, says=h.parse(receipt))
    damage(tier, decode.side._states["s"].prompt.keys[lost])

    assert answer_in(decode, "s", 0.5) == 0
    assert decode.side._hits.reason("s") is Outcome.CORRUPT


@pytest.mark.parametrize("is_promised", [False, True])
def test_behind_a_damaged_page_of_the_base_no_state_is_blamed(
    tier: MemoryTier, is_promised: bool
) -> None:
    _, receipt = prefill(started(tier), says=h.Wanted())
    decode = started(tier)
    decode.add("s", PROMPT, says=receipt if is_promised else None)
    damage(tier, decode.side._states["s"].prompt.keys[5])

    assert answer_in(decode, "s", 0.5) == 0
    assert decode.side._hits.reason("s") is Outcome.CORRUPT
    if not is_promised:
        num_blocks = len(decode.side._states["s"].prompt.keys)
        missed = decode.counted("ucm_lookup_missed_blocks", reason="corrupt")
        assert missed in (num_blocks, num_blocks - 1)


def test_where_every_strand_keeps_all_a_page_is_waited_for_wherever_the_base_ends(
    tier: MemoryTier,
) -> None:
    receipt = prefill_by_twos(Engine(Loopback(tier=tier), indexer=True), says=h.Wanted())
    decode = Engine(Loopback(tier=tier), indexer=True)
    decode.add("s", PROMPT, says=h.parse(receipt))
    take(tier, decode.side._states["s"].prompt.keys[7])

    assert waits_for(decode, take(tier, strand_keys(decode, "s", "i")[6])) == 7 * BLOCK
