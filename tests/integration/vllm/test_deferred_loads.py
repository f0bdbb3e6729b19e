"""From 0.33 on vLLM may give device blocks to a hit some steps after it has asked for it, when
the steps before have left those blocks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.v1.request import RequestStatus

from tests.integration.scheduler_parts import BLOCK, Engine, Loopback

NUM_TOKENS = 4 * BLOCK


def asked(engine: Engine) -> SimpleNamespace:
    """A request that has its hit, and no device blocks yet: another is computed meanwhile."""
    engine.prefill("stored", NUM_TOKENS)
    other, request = engine.add("other", 8 * BLOCK, salt="other"), engine.add("r", NUM_TOKENS)
    engine.admit(other)
    assert engine.side.matched_tokens(request, 0) == (NUM_TOKENS, True)
    request.status = RequestStatus.WAITING_FOR_REMOTE_KVS
    for _ in range(3):
        assert engine.step({"other": BLOCK}).loads == ()
    return request


def pinned(engine: Engine) -> int:
    return engine.slots()["pins"]


def test_the_load_begins_when_the_blocks_are_there() -> None:
    engine = Engine(Loopback())
    request = asked(engine)
    engine.side.allocated(request, engine.blocks(request), NUM_TOKENS)
    (load,) = engine.step({"other": BLOCK}).loads
    assert [b for part in load.parts for b in part.block_ids] == engine.blocks(request)[0]
    assert pinned(engine) == 4
    engine.copied(load.job_id)
    engine.step({})
    assert pinned(engine) == 0


def test_a_request_that_is_given_up_before_leaves_nothing() -> None:
    engine = Engine(Loopback())
    request = asked(engine)
    request.status = RequestStatus.FINISHED_ABORTED
    assert engine.side.finished(request, engine.blocks(request)) == (False, None)
    assert engine.step({}).loads == ()
    assert pinned(engine) == 0


def test_where_the_node_cache_has_gone_meanwhile_the_load_fails_in_the_open() -> None:
    """vLLM counts on the tokens, and waits until it hears of them."""
    link = Loopback()
    engine = Engine(link)
    request = asked(engine)
    link.restart()
    engine.step({"other": BLOCK})
    engine.side.allocated(request, engine.blocks(request), NUM_TOKENS)
    (load,) = engine.step({"other": BLOCK}).loads
    assert load.generation < 0, "of no node cache: every rank says that it has failed"
    engine.copied(load.job_id, failed=True)
    request.status = RequestStatus.WAITING
    assert engine.side.matched_tokens(request, 0) == (0, False)
