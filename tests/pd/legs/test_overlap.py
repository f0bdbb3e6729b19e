"""Prefill and decode asked at once, and what becomes of a request whose prefill turns out badly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from aiohttp import web

from tests.pd.conftest import Fleet, answering
from tests.pd.legs.handoff_parts import (
    BODY,
    PATIENCE_S,
    PIECES,
    RECEIPT,
    TOLD_RECEIPT,
    a_receipt,
    after,
    giving,
    hang_up,
    send,
    streaming,
    told,
    unless_expecting,
    until_no_prefill_runs,
)
from ucm.handoff import Expected, Handoff, Wanted, Withdrawn, params
from ucm.pd.legs.delivery import Answer
from ucm.pd.legs.prefill import PrefillOutcome, Share
from ucm.pd.legs.prefill_promise import PrefillPromise
from ucm.pd.metrics import ProxyMetrics
from ucm.pd.trace import RequestTrace


@pytest_asyncio.fixture
async def overlap(fleet: Fleet) -> AsyncIterator[Fleet]:
    """One of each, asked at once. Prefill gives a receipt when decode has been asked."""
    await fleet.start(1, 1, handoff="overlap")
    fleet.prefill[0].answer = after(fleet.decode[0].started, giving(RECEIPT))
    return fleet


async def test_decode_is_asked_while_prefill_still_runs_and_may_wait_for_it(overlap: Fleet):
    (prefill,), (decode,) = overlap.prefill, overlap.decode

    async def when_prefilled(_: web.Request) -> web.StreamResponse:
        await until_no_prefill_runs(overlap)
        return web.json_response({"from": "decode0"})

    decode.answer = when_prefilled
    assert (200, b'{"from": "decode0"}', "pd") == await send(overlap)
    expected = json.dumps(params(Expected()), separators=(",", ":")).encode()
    assert [TOLD_RECEIPT.replace(RECEIPT, expected)] == [each.body for each in decode.asked]
    assert not prefill.cancelled.is_set()
    assert 0 == await overlap.metric("ucm_pd_withdrawn_total")


async def test_a_client_can_not_speak_for_prefill(overlap: Fleet):
    body = b'{"kv_transfer_params": {"ucm": {"kind": "withdrawn"}}, "prompt": "hi"}'
    await send(overlap, body)
    assert [Wanted()] == told(overlap.prefill[0])
    assert [Expected()] == told(overlap.decode[0])


FAILURES = {
    "400": "4xx",
    "500": "5xx",
    "hangs up": "refused",
    "is late": "timeout",
    "is cancelled": "cancelled",
}


async def fail(fleet: Fleet, how: str) -> None:
    """Makes prefill fail so when decode has been asked."""
    decode, (prefill, other) = fleet.decode[0], fleet.prefill
    if how.isdecimal():
        for engine in fleet.prefill:
            engine.answer = after(decode.started, answering(b"no", status=int(how)))
    elif how == "hangs up":
        # And nobody else is there.
        await fleet.kill(other)
        prefill.answer = after(decode.started, hang_up)
    else:
        prefill.answer, other.answer = prefill.never, other.never
    if how == "is cancelled":
        await prefill.started.wait()
        await decode.started.wait()
        for task in asyncio.all_tasks():
            if "Prefills._send" in repr(task):
                task.cancel()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("how", FAILURES)
async def test_a_prefill_that_fails_is_withdrawn_and_the_same_decoder_asked_anew(
    fleet: Fleet, how: str, stream: bool
):
    """The one that is cancelled for it has done nothing wrong: its breaker stays closed."""
    await fleet.start(
        *(2, 2), handoff="overlap", policy="round-robin", prefill_timeout_s=1.0, breaker_failures=1
    )
    decode, other = fleet.decode
    answer = streaming(*PIECES) if stream else answering(b"".join(PIECES))
    decode.answer = unless_expecting(decode, answer)
    failing = asyncio.create_task(fail(fleet, how))

    got = await send(fleet, **{"X-Request-Id": "mine"})
    await failing
    assert (200, b"".join(PIECES), "decode-only") == got
    assert [Expected(), Withdrawn()] == told(decode)
    assert ["mine", "mine-w"] == [each.headers["X-Request-Id"] for each in decode.asked]
    assert [] == other.asked
    await asyncio.wait_for(decode.cancelled.wait(), PATIENCE_S)
    reason = f'ucm_pd_not_prefilled_total{{reason="{FAILURES[how]}"}}'
    state = f'ucm_pd_instance_state{{role="decode",state="closed",url="{decode.url.origin()}"}}'
    for line, value in (
        ("ucm_pd_withdrawn_total", 1),
        (reason, 1),
        (state, 1),
        ('ucm_pd_retries_total{role="decode"}', 0),
        ('ucm_pd_instance_running{role="decode"', 0),
    ):
        assert value == await fleet.metric(line), line


async def test_a_prefill_that_another_instance_takes_over_is_still_expected(fleet: Fleet):
    await fleet.start(2, 1, handoff="overlap", policy="round-robin")
    (one, two), (decode,) = fleet.prefill, fleet.decode
    one.answer, two.answer = after(decode.started, hang_up), giving(RECEIPT)
    decode.answer = after(two.started, answering(b"{}"))

    assert (200, b"{}", "pd") == await send(fleet)
    assert [Expected()] == told(decode)


@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_prefill_that_decode_did_not_wait_for_is_cancelled(
    overlap: Fleet, stream: bool, status: int
):
    (prefill,), (decode,) = overlap.prefill, overlap.decode
    prefill.answer = prefill.never
    # While the stream still runs.
    then = prefill.cancelled.wait
    whole = after(prefill.started, answering(b"".join(PIECES), status=status))
    decode.answer = after(prefill.started, streaming(*PIECES, then=then)) if stream else whole

    got = await asyncio.wait_for(send(overlap), PATIENCE_S)
    assert (200 if stream else status, b"".join(PIECES), "pd") == got
    await asyncio.wait_for(prefill.cancelled.wait(), PATIENCE_S)
    assert [Expected()] == told(decode)
    assert 0 == await overlap.metric("ucm_pd_not_prefilled_total")


async def test_a_prefill_that_others_wait_for_goes_on_and_its_failure_reaches_only_those(
    overlap: Fleet,
):
    (prefill,), (decode,) = overlap.prefill, overlap.decode
    failed, release = asyncio.Event(), asyncio.Event()
    prefill.answer = after(failed, answering(b"no", status=500))
    answers = {
        1: streaming(*PIECES, then=release.wait),
        2: unless_expecting(decode, answering(b"{}")),
        3: answering(b"at once"),
    }

    async def by_length(request: web.Request) -> web.StreamResponse:
        return await answers[json.loads(await request.read())["max_tokens"]](request)

    decode.answer = by_length
    waiting = asyncio.create_task(send(overlap, b'{"prompt": "hi", "max_tokens": 2}'))
    await asyncio.wait_for(decode.started.wait(), PATIENCE_S)
    at_once = await send(overlap, b'{"prompt": "hi", "max_tokens": 3}')
    assert (200, b"at once", "shared-prefill") == at_once
    async with await overlap.post(prompt="hi", max_tokens=1) as response:
        assert "shared-prefill" == response.headers["x-ucm-pd-path"]
        first = await response.content.readany()
        assert not prefill.cancelled.is_set()
        failed.set()
        assert (200, b"{}", "decode-only") == await asyncio.wait_for(waiting, PATIENCE_S)
        release.set()
        assert b"".join(PIECES) == first + await response.read()
    assert [Expected(), Expected(), Expected(), Withdrawn()] == told(decode)
    assert 1 == len(prefill.asked)


@pytest.mark.parametrize("mark", ["expected", "receipt", "withdrawn"])
async def test_another_decoder_is_told_what_is_true_by_then(fleet: Fleet, mark: str):
    await fleet.start(1, 2, handoff="overlap", policy="round-robin")
    (prefill,), (one, two) = fleet.prefill, fleet.decode

    async def leave_it(request: web.Request) -> web.StreamResponse:
        if mark != "expected":
            await until_no_prefill_runs(fleet)
        return await hang_up(request)

    one.answer = unless_expecting(one, hang_up) if mark == "withdrawn" else leave_it
    prefill.answer = {
        "expected": prefill.never,
        "receipt": after(one.started, giving(RECEIPT)),
        "withdrawn": after(one.started, answering(b"no", status=500)),
    }[mark]

    path = "decode-only" if mark == "withdrawn" else "pd"
    got = await asyncio.wait_for(send(fleet, **{"X-Request-Id": "mine"}), PATIENCE_S)
    assert (200, b'{"from": "decode1"}', path) == got
    (asked,) = two.asked
    assert "mine-r2" == asked.headers["X-Request-Id"]
    expected = {"expected": params(Expected()), "withdrawn": params(Withdrawn())}
    assert expected.get(mark, json.loads(RECEIPT)) == asked.fields["kv_transfer_params"]


def handing_over(*, is_whole: bool) -> bytes:
    return json.dumps(params(a_receipt(is_whole=is_whole))).encode()


@pytest.mark.parametrize(
    ("handed_over", "then"),
    [(None, Withdrawn()), (handing_over(is_whole=False), a_receipt(is_whole=False))],
    ids=["nothing", "less"],
)
async def test_a_prefill_that_promises_less_than_expected_is_waited_for_no_more(
    overlap: Fleet, handed_over: bytes | None, then: Handoff
):
    (prefill,), (decode,) = overlap.prefill, overlap.decode
    answer = answering(b"{}") if handed_over is None else giving(handed_over)
    prefill.answer = after(decode.started, answer)
    decode.answer = unless_expecting(decode, answering(b"right"))

    assert (200, b"right", "pd") == await send(overlap)
    assert [Expected(), then] == told(decode)


async def test_a_whole_receipt_is_what_decode_waits_for(overlap: Fleet):
    (prefill,), (decode,) = overlap.prefill, overlap.decode
    prefill.answer = after(decode.started, giving(handing_over(is_whole=True)))

    async def when_prefilled(_: web.Request) -> web.StreamResponse:
        await until_no_prefill_runs(overlap)
        return web.Response()

    decode.answer = when_prefilled
    assert (200, b"", "pd") == await send(overlap)
    assert [Expected()] == told(decode)


async def test_a_client_that_leaves_cancels_both_legs(overlap: Fleet):
    (prefill,), (decode,) = overlap.prefill, overlap.decode
    prefill.answer, decode.answer = prefill.never, decode.never
    leaving = asyncio.create_task(send(overlap))
    for engine in (prefill, decode):
        await asyncio.wait_for(engine.started.wait(), PATIENCE_S)
    leaving.cancel()

    for engine in (prefill, decode):
        await asyncio.wait_for(engine.cancelled.wait(), PATIENCE_S)
    await overlap.until_metric('ucm_pd_failed_total{reason="client_left"}', 1)
    assert (1, 1) == (len(prefill.asked), len(decode.asked))
    assert 0 == await overlap.metric("ucm_pd_withdrawn_total")


async def test_a_request_that_is_turned_away_needs_no_prefill(fleet: Fleet):
    await fleet.start(1, 1, handoff="overlap", max_running=1, max_queued=0)
    (prefill,), (decode,) = fleet.prefill, fleet.decode
    decode.answer = decode.never
    running = asyncio.create_task(send(fleet))
    await asyncio.wait_for(decode.started.wait(), PATIENCE_S)
    await until_no_prefill_runs(fleet)
    prefill.answer = prefill.never

    got = await asyncio.wait_for(send(fleet, b'{"prompt": "another"}'), PATIENCE_S)
    assert 503 == got[0]
    await until_no_prefill_runs(fleet)
    running.cancel()


async def test_who_waits_for_decode_while_its_prefill_fails_is_asked_once_as_it_came(fleet: Fleet):
    await fleet.start(1, 1, handoff="overlap", max_running=1)
    (prefill,), (decode,) = fleet.prefill, fleet.decode
    release = asyncio.Event()
    prefill.answer = giving(handing_over(is_whole=True))
    decode.answer = after(release, answering(b"{}"))
    running = asyncio.create_task(send(fleet, b'{"prompt": "another"}'))
    await asyncio.wait_for(decode.started.wait(), PATIENCE_S)
    await until_no_prefill_runs(fleet)
    prefill.answer = answering(b"no", status=500)
    waiting = asyncio.create_task(send(fleet))
    await fleet.until_metric('ucm_pd_not_prefilled_total{reason="5xx"}', 1)
    release.set()

    assert (200, b"{}", "pd") == await running
    assert (200, b"{}", "decode-only") == await waiting
    assert [BODY] == [each.body for each in decode.asked[1:]]
    assert 0 == await fleet.metric("ucm_pd_withdrawn_total")


async def test_an_answer_that_comes_as_its_client_leaves_is_closed():
    closed: list[str] = []

    class Upstream:
        def close(self) -> None:
            closed.append("closed")

    async def ask(body: bytes | None, suffix: str) -> Answer | str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass
        return Answer(Upstream(), b"", is_whole=False, heard=lambda: None)

    async def prefill() -> PrefillOutcome:
        await asyncio.Event().wait()
        raise AssertionError

    task = asyncio.create_task(prefill())
    trace = RequestTrace(ProxyMetrics(lambda: ()), route="POST /", request_id=None)
    promise = PrefillPromise(Share(task, is_shared=False, on_leave=task.cancel), trace)
    keeping = asyncio.create_task(promise.keep(ask, BODY))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    keeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await keeping
    promise.leave()
    assert ["closed"] == closed
