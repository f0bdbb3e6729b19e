"""The ledger of device blocks, by itself."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from ucm.integration.engine.device_blocks import BlockLedger, BlockReturn


def test_a_ledger_says_once_that_a_request_may_go():
    ledger = BlockLedger()
    ledger.dump("a", 1)
    assert ledger.finish("a", more_to_dump=False) is BlockReturn.HELD
    assert not ledger.release("a")
    ledger.ended(1)
    assert ledger.release("a")
    assert not ledger.release("a")
    assert not len(ledger)


def test_a_ledger_leaves_the_word_to_the_load():
    ledger = BlockLedger()
    ledger.load("a", 1)
    assert ledger.finish("a", more_to_dump=True) is BlockReturn.BY_LOAD
    assert not ledger.release("a")
    ledger.ended(1)
    assert not ledger.release("a")
    ledger.check()


def test_what_vllm_took_away_is_fenced_and_no_longer_waited_for():
    ledger = BlockLedger()
    ledger.dump("a", 1)
    ledger.dump("a", 2)
    ledger.ended(1)
    assert ledger.take_back("a") == [2]
    assert ledger.finish("a", more_to_dump=False) is BlockReturn.AT_ONCE
    ledger.ended(2)
    ledger.check()
    assert not len(ledger)
