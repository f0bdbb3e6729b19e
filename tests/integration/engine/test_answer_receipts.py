"""Receipts for a conversation: of a prompt with what was answered to it."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from hypothesis import given
from hypothesis import strategies as st

from tests.integration.engine.answer_parts import (
    begin,
    finish,
    found_by_next_turn,
    stored_pages,
)
from tests.integration.scheduler_parts import BLOCK, Engine, Loopback
from tests.store.tiers.memory_tier import MemoryTier
from ucm import handoff as h

ASKED = h.Wanted(with_answer=True)


def test_who_was_promised_a_prompt_gets_a_receipt_for_it_with_its_answer():
    tier = MemoryTier()
    first = Engine(Loopback(tier=tier)).prefill("p", 2 * BLOCK, says=h.Wanted())
    promise = h.parse(first.receipt)
    assert isinstance(promise, h.Receipt)
    engine = Engine(Loopback(tier=tier))
    request = begin(engine, 2 * BLOCK, says=promise)
    engine.answer(request, 2 * BLOCK)
    receipt = h.parse(finish(engine, request))

    assert isinstance(receipt, h.Receipt)
    assert (receipt.tokens, receipt.namespace) == (4 * BLOCK, promise.namespace)
    assert found_by_next_turn(engine, request) == receipt.tokens


def test_an_answer_that_fills_no_block_has_no_receipt():
    tier = MemoryTier()
    promise = h.parse(Engine(Loopback(tier=tier)).prefill("p", 2 * BLOCK, says=h.Wanted()).receipt)
    engine = Engine(Loopback(tier=tier))
    request = begin(engine, 2 * BLOCK, says=promise)
    engine.answer(request, 3)

    assert finish(engine, request) is None


@given(
    stored=st.integers(0, 4 * BLOCK),
    num_prompt=st.integers(1, 5 * BLOCK),
    num_answered=st.integers(0, 3 * BLOCK),
    num_slots=st.integers(2, 12),
    store_generated=st.sampled_from([True, False, "end"]),
    window=st.sampled_from([None, BLOCK + 1]),
)
def test_a_receipt_with_the_answer_is_for_what_the_next_turn_finds(
    stored: int,
    num_prompt: int,
    num_answered: int,
    num_slots: int,
    store_generated: bool | str,
    window: int | None,
):
    tier = MemoryTier()
    # What is asked for when a request ends is promised before anybody knows whether there is room.
    memory = Loopback(num_slots=24 if store_generated == "end" else num_slots, tier=tier)
    engine = Engine(memory, window=window, store_generated=store_generated)
    if stored:
        engine.prefill("before", stored)
    request = begin(engine, num_prompt, says=ASKED)
    engine.answer(request, num_answered)
    receipt = h.parse(finish(engine, request))

    # Where there is room to load it.
    found = found_by_next_turn(Engine(Loopback(tier=tier), window=window), request, more=BLOCK)
    assert receipt is None or isinstance(receipt, h.Receipt)
    promised = receipt.tokens if receipt is not None else 0
    assert promised <= found
    if window is None:
        assert promised == found
    engine.link.core.check()


@pytest.mark.parametrize(("num_answered", "store_generated"), [(3, True), (3 * BLOCK, False)])
def test_where_nothing_of_the_answer_is_kept_it_is_for_the_prompt(
    num_answered: int, store_generated: bool
):
    engine = Engine(Loopback(), store_generated=store_generated)
    request = begin(engine, 2 * BLOCK + 1, says=ASKED)
    engine.answer(request, num_answered)
    receipt = h.parse(finish(engine, request))

    assert isinstance(receipt, h.Receipt)
    assert (receipt.tokens, receipt.is_whole) == (2 * BLOCK, False)


def test_who_stores_nothing_gives_none():
    tier = MemoryTier()
    Engine(Loopback(tier=tier)).prefill("p", 2 * BLOCK)
    engine = Engine(Loopback(tier=tier), dumps=False)
    request = begin(engine, 2 * BLOCK, says=ASKED)
    engine.answer(request, 2 * BLOCK)

    assert finish(engine, request) is None


def test_prefills_own_receipt_is_for_its_prompt_whatever_it_answers():
    engine = Engine(Loopback())
    request = begin(engine, 2 * BLOCK + 5, says=h.Wanted())
    engine.answer(request, 2 * BLOCK)
    receipt = h.parse(finish(engine, request))

    assert isinstance(receipt, h.Receipt)
    assert (receipt.tokens, receipt.is_whole) == (2 * BLOCK + 5, True)


def test_for_a_receipt_with_the_answer_no_tail_is_stored():
    engine = Engine(Loopback())
    request = begin(engine, 2 * BLOCK + 5, says=ASKED)
    finish(engine, request)

    assert stored_pages(engine) == 2
