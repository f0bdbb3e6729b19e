"""Who may say what of a hand-off: the proxy alone, and of prompts that are long enough for one."""

from __future__ import annotations

import json

import pytest

from tests.pd.conftest import Bench, Fleet, answering, until
from tests.pd.legs.handoff_parts import a_receipt
from ucm import handoff
from ucm.handoff import Expected

PATHS = [
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/inference/v1/generate",
    "/v1/chat/completions/batch",
    "/invocations",
]
LONG = "x" * 300
EXPECTED = handoff.params(Expected())


def words_in(value: object) -> bool:
    """Anywhere in a body."""
    if isinstance(value, dict):
        return "ucm" in value or any(map(words_in, value.values()))
    return isinstance(value, list) and any(map(words_in, value))


def request_with_words(**more: object) -> dict[str, object]:
    return {
        "prompt": "a",
        "kv_transfer_params": EXPECTED,
        "sampling_params": {"extra_args": {"kv_transfer_params": EXPECTED, "mine": 1}},
        **more,
    }


ESCAPED = json.dumps(request_with_words()).replace("kv_transfer", r"\u006bv_transfer")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [
        json.dumps(request_with_words()).encode(),
        ESCAPED.encode(),
        json.dumps(request_with_words()).encode("utf-16"),
        json.dumps(request_with_words()).encode("utf-8-sig"),
    ],
    ids=["plain", "escaped", "utf-16", "with a mark"],
)
async def test_no_client_can_tell_an_engine_to_wait_for_a_prefill(fleet: Fleet, path, body):
    await fleet.start(1, 1, min_prefill_tokens=1 << 20)
    fleet.prefill[0].answer = refuse

    async with fleet.client.post(fleet.proxy.with_path(path), data=body) as response:
        assert 200 == response.status

    (asked,) = fleet.decode[0].asked
    got = json.loads(asked.body)
    assert not words_in(got)
    assert {"mine": 1, "kv_transfer_params": None} == got["sampling_params"]["extra_args"]


async def refuse(_):
    raise AssertionError("nothing here is prefilled")


async def test_what_a_client_says_to_another_connector_stays(bench: Bench):
    both = {**EXPECTED, "do_remote_prefill": True}
    (await bench.post("/v1/embeddings", input="a", kv_transfer_params=both)).close()

    (asked,) = bench.decode.asked
    assert {"do_remote_prefill": True} == asked.fields["kv_transfer_params"]


async def test_a_request_without_words_passes_byte_by_byte(bench: Bench):
    body = b'{ "input" : "caf\\u00e9",  "kv_transfer_params": {"b" :1} }'
    async with bench.client.post(bench.proxy / "v1/embeddings", data=body):
        pass

    assert body == bench.decode.asked[0].body


@pytest.mark.parametrize("mode", ["chain", "overlap"])
@pytest.mark.parametrize(
    ("prompt", "prefilled"),
    [
        (["a", LONG], [LONG]),
        ([LONG, "", LONG], [LONG, LONG]),
        ([[5], [7] * 300], [[7] * 300]),
    ],
)
async def test_a_short_prompt_has_no_hand_off_because_its_neighbour_has(
    fleet: Fleet, mode, prompt, prefilled
):
    await fleet.start(1, 1, min_prefill_tokens=128, handoff=mode)

    async with await fleet.post(prompt=prompt) as response:
        assert "pd" == response.headers["x-ucm-pd-path"]

    (first,), (second,) = fleet.prefill[0].asked, fleet.decode[0].asked
    assert prefilled == first.fields["prompt"]
    assert {"prompt": prompt} == second.fields


async def test_decode_is_told_of_a_list_of_long_prompts(fleet: Fleet):
    await fleet.start(1, 1, min_prefill_tokens=128, handoff="overlap")
    fleet.prefill[0].answer = fleet.prefill[0].never

    (await fleet.post(prompt=[LONG, LONG])).close()

    assert Expected() == fleet.decode[0].asked[0].handoff


def said_by_decode(words: object, **more: object) -> bytes:
    params = {"ucm": words, **more}
    return json.dumps({"choices": [], "kv_transfer_params": params, "id": "x"}).encode()


A_RECEIPT = handoff.params(a_receipt(is_whole=False))["ucm"]


@pytest.mark.parametrize(
    ("answer", "told", "stored"),
    [
        (said_by_decode(A_RECEIPT), None, 129),
        (said_by_decode(A_RECEIPT, more=[1]), {"more": [1]}, 129),
        (said_by_decode({"kind": "unknown"}), None, 0),
        (said_by_decode(["no words"]), None, 0),
        (said_by_decode(handoff.params(Expected())["ucm"]), None, 0),
    ],
)
async def test_what_decode_says_of_the_conversation_is_told_in_the_log_and_no_client(
    bench: Bench, caplog: pytest.LogCaptureFixture, answer: bytes, told: object, stored: int
):
    async def is_logged() -> bool:
        return '"route":"POST /v1/completions"' in caplog.text

    bench.decode.answer = answering(answer)
    with caplog.at_level("INFO"):
        async with await bench.post("/v1/completions", prompt=LONG) as response:
            body = await response.read()
        await until(is_logged)

    assert {"choices": [], "kv_transfer_params": told, "id": "x"} == json.loads(body)
    assert len(body) == int(response.headers["Content-Length"])
    assert (f'"stored_tokens":{stored}' in caplog.text) == bool(stored)


@pytest.mark.parametrize(
    "answer",
    [
        b'{ "choices": [{"text": "\\"ucm\\": {}"}], "kv_transfer_params": null}',
        b'{ "choices": [],  "kv_transfer_params": {"of": "another", "in": {"ucm": 1}}}',
        b'{"ucm": 1}',
        b'"ucm"',
        b'{"kv_transfer_params": {"ucm": 1}',
    ],
)
async def test_an_answer_without_words_reaches_the_client_byte_by_byte(bench: Bench, answer: bytes):
    bench.decode.answer = answering(answer)
    async with await bench.post("/v1/completions", prompt=LONG) as response:
        assert answer == await response.read()
