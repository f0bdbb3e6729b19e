"""Routes of vLLM's own that have prompts, and how they take both legs."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.pd.conftest import Fleet, answering
from tests.pd.legs.handoff_parts import RECEIPT, giving
from ucm import handoff

BATCH = "v1/chat/completions/batch"
INVOCATIONS = "invocations"
TALK = [{"role": "user", "content": "why? " * 100}]
HANDOFFS = pytest.mark.parametrize("mode", ["chain", "overlap"])


@HANDOFFS
async def test_a_batch_of_chats_is_prefilled_before_decode_is_asked(fleet: Fleet, mode):
    await fleet.start(1, 1, handoff=mode)
    fleet.prefill[0].answer = fleet.prefill[0].never

    asking = fleet.post(BATCH, messages=[TALK, TALK], max_completion_tokens=9, logprobs=True)
    task = asyncio.create_task(asking)
    await asyncio.wait_for(fleet.prefill[0].started.wait(), 10)
    await fleet.until_metric('ucm_pd_instance_running{role="prefill"', 1)
    assert 0 == await fleet.metric('ucm_pd_instance_running{role="decode"')
    task.cancel()
    # Or the next one would share it.
    await asyncio.wait_for(fleet.prefill[0].cancelled.wait(), 10)

    fleet.prefill[0].answer = answering(b'{"choices": []}')
    async with await fleet.post(
        BATCH, messages=[TALK, TALK], max_completion_tokens=9, logprobs=True
    ) as response:
        assert (200, "pd") == (response.status, response.headers["x-ucm-pd-path"])
        assert "x-ucm-pd-reason" not in response.headers
    first, second = fleet.prefill[0].asked[-1].fields, fleet.decode[0].asked[0].fields
    assert {
        "messages": [TALK, TALK],
        "max_completion_tokens": 1,
        "max_tokens": 1,
        "stream": False,
    } == first
    assert {"messages": [TALK, TALK], "max_completion_tokens": 9, "logprobs": True} == second


@pytest.mark.parametrize(
    "fields", [{"messages": TALK}, {"prompt": "why?"}, {"prompt": [1, 2], "stream": True}]
)
async def test_an_invocation_that_is_a_chat_or_completion_takes_both_legs(fleet: Fleet, fields):
    await fleet.start(1, 1)
    fleet.prefill[0].answer = giving(RECEIPT)

    async with await fleet.post(INVOCATIONS, max_tokens=9, **fields) as response:
        assert (200, "pd") == (response.status, response.headers["x-ucm-pd-path"])
    (first,), (second,) = fleet.prefill[0].asked, fleet.decode[0].asked
    assert ("/invocations", 1, False) == (
        first.path,
        first.fields["max_tokens"],
        first.fields["stream"],
    )
    assert isinstance(first.handoff, handoff.Wanted)
    assert 9 == second.fields["max_tokens"]
    assert json.loads(RECEIPT) == second.fields["kv_transfer_params"]


@pytest.mark.parametrize("body", [b'{"input": "a"}', b"[1]", b"no JSON", b""])
async def test_any_other_invocation_is_passed_on_as_it_is(fleet: Fleet, body):
    await fleet.start(1, 1)
    async with fleet.client.post(fleet.proxy / INVOCATIONS, data=body) as response:
        assert (200, "route") == (response.status, response.headers["x-ucm-pd-reason"])
    assert [] == fleet.prefill[0].asked
    assert body == fleet.decode[0].asked[0].body


async def test_an_invocation_in_a_session_is_for_who_keeps_the_session(fleet: Fleet):
    await fleet.start(1, 1)
    headers = {"X-Amzn-SageMaker-Session-Id": "s"}
    url = fleet.proxy / INVOCATIONS
    async with fleet.client.post(url, json={"messages": TALK}, headers=headers) as response:
        assert "continued" == response.headers["x-ucm-pd-reason"]
    assert [] == fleet.prefill[0].asked
