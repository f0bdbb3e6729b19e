"""Receipts, promises and tails: the scheduler sides of a prefill and a decode engine."""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace

import msgspec
import pytest

pytest.importorskip("vllm")

from tests.integration.scheduler_parts import BLOCK, MANIFEST, Engine, Loopback
from tests.store.tiers.memory_tier import MemoryTier
from ucm import handoff as h
from ucm.store.blocks.keys import TailKey


def receipt_of(params: object) -> h.Receipt:
    receipt = h.parse(params)
    assert isinstance(receipt, h.Receipt)
    return receipt


def two_nodes(**decode: object) -> tuple[Engine, Engine]:
    """A prefill and a decode engine on nodes of their own, over one storage."""
    tier = MemoryTier()
    return Engine(Loopback(tier=tier)), Engine(Loopback(tier=tier), **decode)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_tokens", [5, BLOCK, BLOCK + 1, 100])
def test_with_a_receipt_decode_has_the_whole_prompt_its_tail_included(num_tokens: int):
    prefill, decode = two_nodes()
    receipt = receipt_of(prefill.prefill("a", num_tokens, says=h.Wanted()).receipt)
    assert (receipt.tokens, receipt.is_whole) == (num_tokens, True)

    request = decode.add("b", num_tokens, says=receipt)
    assert decode.admit(request) == num_tokens
    (load,) = decode.step({}).loads
    copied = sum(len(part.block_ids) for part in load.parts)
    assert copied == -(-num_tokens // BLOCK)

    assert decode.counted("ucm_handoff_promised_tokens") == num_tokens - 1
    assert decode.counted("ucm_handoff_loaded_tokens") == num_tokens - 1
    assert decode.counted("ucm_receipts", outcome="taken") == 1
    assert prefill.counted("ucm_receipts", outcome="issued") == 1


def test_layer_by_layer_one_token_of_a_tail_is_left_to_compute():
    prefill, decode = two_nodes(layerwise=True)
    receipt = receipt_of(prefill.prefill("a", 100, says=h.Wanted()).receipt)

    assert decode.admit(decode.add("b", 100, says=receipt)) == 99
    assert decode.counted("ucm_handoff_loaded_tokens") == 99


def test_who_does_not_ask_for_a_receipt_gets_none_and_stores_no_tail():
    prefill, decode = two_nodes()
    assert prefill.prefill("a", 100).receipt is None

    assert not any(isinstance(key, TailKey) for _, key in prefill.link.tier._pages)
    assert decode.admit(decode.add("b", 100)) == 96


def test_where_tails_are_turned_off_the_receipt_is_for_the_full_blocks():
    tier = MemoryTier()
    prefill = Engine(Loopback(tier=tier), store_tail=False)
    decode = Engine(Loopback(tier=tier), store_tail=False)
    receipt = receipt_of(prefill.prefill("a", 100, says=h.Wanted()).receipt)
    # Who expected the tail must be told.
    assert (receipt.tokens, receipt.is_whole) == (96, False)
    assert decode.admit(decode.add("b", 100, says=receipt)) == 96
    assert not decode.counted("ucm_handoff_recomputed_tokens", reason="unsupported")


def test_a_tail_serves_the_very_prompt_and_none_that_goes_on():
    prefill, decode = two_nodes()
    receipt = receipt_of(prefill.prefill("a", 100, says=h.Wanted()).receipt)

    assert decode.admit(decode.add("longer", 101, says=h.Wanted())) == 96
    assert decode.admit(decode.add("plain", 100)) == 96
    # The longer prompt's own blocks are others.
    longer = msgspec.structs.replace(receipt, tokens=101)
    assert decode.admit(decode.add("claimed", 101, says=longer)) == 96
    assert decode.counted("ucm_handoff_recomputed_tokens", reason="unsupported") == 4


def test_decode_is_told_to_ask_again_while_promised_pages_are_on_their_way():
    prefill, decode = two_nodes()
    receipt = receipt_of(prefill.prefill("a", 100, says=h.Wanted()).receipt)
    # On decode's side nothing is there yet: its storage lags behind.
    pages, decode.link.tier._pages = decode.link.tier._pages, {}
    request = decode.add("b", 100, says=receipt)
    for _ in range(3):
        assert decode.side.matched_tokens(request, 0) == (None, False)
        decode.link.timers.fire()

    decode.link.tier._pages = pages
    decode.link.timers.fire()
    assert decode.admit(request) == 100


@pytest.mark.parametrize("says", ["receipt", "expected"])
def test_what_is_late_is_computed_and_counted(says: str):
    prefill, decode = two_nodes()
    receipt = receipt_of(prefill.prefill("a", 100, says=h.Wanted()).receipt)
    pages = decode.link.tier._pages
    for key in list(pages)[3:]:
        del pages[key]
    last = receipt if says == "receipt" else h.Expected()
    request = decode.add("b", 100, says=last)
    assert decode.side.matched_tokens(request, 0) == (None, False)
    decode.link.now_s += 31
    decode.link.core.tick()

    assert decode.admit(request) == 3 * BLOCK
    assert decode.counted("ucm_handoff_recomputed_tokens", reason="late") == 99 - 3 * BLOCK
    assert decode.counted("ucm_handoff_promised_tokens") == 99


def test_an_expectation_that_is_withdrawn_is_not_waited_for():
    _, decode = two_nodes()
    assert decode.admit(decode.add("b", 100, says=h.Withdrawn())) == 0
    assert decode.counted("ucm_handoff_recomputed_tokens", reason="withdrawn") == 99


def test_a_receipt_of_another_namespace_is_refused_by_name_and_once(
    caplog: pytest.LogCaptureFixture,
):
    tier = MemoryTier()
    prefill = Engine(
        Loopback(tier=tier), manifest=msgspec.structs.replace(MANIFEST, kv_dtype="bfloat16")
    )
    decode = Engine(Loopback(tier=tier))
    with caplog.at_level(logging.WARNING, logger="ucm"):
        for name in "ab":
            receipt = receipt_of(prefill.prefill(name, 100, says=h.Wanted()).receipt)
            assert decode.admit(decode.add(name, 100, says=receipt)) == 0
            decode.step({})
    (refusal,) = [each.getMessage() for each in caplog.records if "refused" in each.getMessage()]
    assert "kv_dtype: bfloat16 (prefill) / float32 (here)" in refusal
    assert decode.counted("ucm_receipts", outcome="refused_namespace") == 2
    assert decode.counted("ucm_handoff_recomputed_tokens", reason="namespace") == 198


def test_a_namespace_that_this_store_does_not_know_is_said_to_be_of_another_store(
    caplog: pytest.LogCaptureFixture,
):
    prefill = Engine(Loopback(), manifest=msgspec.structs.replace(MANIFEST, kv_dtype="bfloat16"))
    decode = Engine(Loopback())
    receipt = receipt_of(prefill.prefill("a", 100, says=h.Wanted()).receipt)
    decode.admit(decode.add("b", 100, says=receipt))
    decode.step({})
    assert "not in this store" in caplog.text


@pytest.mark.parametrize(
    "words",
    [{"kind": "receipt", "tokens": -1}, {"\ud800": 1}, {"kind": "\ud800"}, None, [], "\ud800"],
)
def test_words_that_make_no_sense_are_counted_and_the_request_is_served(words: object):
    engine = Engine(Loopback())
    request = engine.add("a", 100)
    engine.side.finished(request, [])
    request.kv_transfer_params = {"ucm": words}
    engine.side.on_new_request(request)
    assert engine.admit(request) == 0
    assert engine.counted("ucm_receipts", outcome="unreadable") == 1


def test_words_that_make_no_sense_do_not_fill_the_log(caplog: pytest.LogCaptureFixture):
    engine = Engine(Loopback())
    for i in range(20):
        request = engine.add(f"r{i}", 100)
        engine.side.finished(request, [])
        request.kv_transfer_params = {"ucm": "nonsense"}
        engine.side.on_new_request(request)

    said = [each.getMessage() for each in caplog.records if "unreadable" in each.getMessage()]
    assert said == ["unreadable receipt: r0: 'nonsense'"]
    assert engine.counted("ucm_receipts", outcome="unreadable") == 20


def test_a_receipt_promises_what_there_was_room_for():
    prefill = Engine(Loopback(num_slots=4))
    request = prefill.add("a", 100, says=h.Wanted())
    prefill.admit(request)
    for _ in range(6):
        prefill.step({"a": BLOCK})
    prefill.step({"a": 4})
    _, params = prefill.side.finished(request, prefill.blocks(request))

    receipt = receipt_of(params)
    assert (receipt.tokens, receipt.is_whole) == (4 * BLOCK, False)


def test_a_request_that_ends_early_promises_what_it_has_computed():
    prefill = Engine(Loopback())
    request = prefill.add("a", 100, says=h.Wanted())
    prefill.admit(request)
    prefill.step({"a": 3 * BLOCK + 1})
    _, params = prefill.side.finished(request, prefill.blocks(request))
    assert receipt_of(params).tokens == 3 * BLOCK


def test_after_the_node_cache_was_lost_nothing_is_promised():
    prefill = Engine(Loopback())
    request = prefill.add("a", 100, says=h.Wanted())
    prefill.admit(request)
    prefill.step({"a": 64})
    prefill.link.restart()
    prefill.step({"a": 36})
    _, params = prefill.side.finished(request, prefill.blocks(request))
    assert params is None


def test_after_a_reset_nothing_that_was_stored_is_found_and_what_follows_is_found_again():
    engine = Engine(Loopback())
    before = receipt_of(engine.prefill("a", 100, says=h.Wanted()).receipt)
    engine.side.reset()
    engine.step({})

    for name, says in (("b", None), ("told", before)):
        request = engine.add(name, 100, says=says)
        assert engine.admit(request) == 0
        engine.side.finished(request, engine.blocks(request))
    assert engine.counted("ucm_handoff_recomputed_tokens", reason="namespace") == 99
    after = receipt_of(engine.prefill("c", 100, says=h.Wanted()).receipt)
    assert after.namespace != before.namespace
    assert engine.admit(engine.add("d", 100)) == 96
    assert engine.counted("ucm_epochs") == 1


def test_what_a_reset_finds_under_way_is_not_stored():
    engine = Engine(Loopback())
    request = engine.add("a", 100)
    engine.admit(request)
    engine.step({"a": 64})
    engine.side.reset()
    engine.step({"a": 36})
    engine.copied(*engine.take_dumping())
    engine.side.finished(request, engine.blocks(request))
    engine.step({})

    slots = engine.slots()
    assert (slots["filling"], slots["ready"], slots["pins"]) == (0, 0, 0)
    assert not engine.link.tier._pages


def test_two_engines_that_were_reset_do_not_share_until_they_are_told_to():
    """They may have got different weights."""
    tier = MemoryTier()
    one, two = Engine(Loopback(tier=tier)), Engine(Loopback(tier=tier))
    for engine in (one, two):
        engine.side.reset()
        engine.step({})
    one.prefill("a", 100)
    assert two.admit(two.add("b", 100)) == 0


def admit_unanswered(engine: Engine) -> SimpleNamespace:
    """A request of 64 tokens that nobody answers for: the node cache is found silent."""
    request = engine.add("a", 64, says=h.Wanted())
    engine.link.mute = True
    for _ in range(2):
        assert engine.side.matched_tokens(request, 0)[0] is None
        time.sleep(0.6)  # longer than the lookup's deadline and its grace
    assert engine.admit(request) == 0
    return request


def test_what_a_silent_node_cache_has_not_taken_yet_is_promised_and_dumped_when_it_speaks_again():
    engine = Engine(Loopback(), timeout_ms=1)
    request = admit_unanswered(engine)
    engine.step({"a": 64})
    held, params = engine.side.finished(request, engine.blocks(request))
    assert (held, receipt_of(params).tokens) == (True, 64)

    engine.link.mute = False
    engine.step({})
    engine.copied(*engine.take_dumping())
    assert engine.step({}).released == ("a",)
    assert engine.slots()["ready"] == 4


def test_nothing_is_promised_or_kept_for_a_node_cache_silent_for_longer_than_a_dump_may_take():
    engine = Engine(Loopback(), timeout_ms=1, dump_timeout_ms=1)
    request = admit_unanswered(engine)
    time.sleep(0.002)
    engine.step({"a": 64})
    assert engine.side.finished(request, engine.blocks(request)) == (True, None)
    assert engine.step({}).released == ("a",)
