"""What clients of every protocol are told through the proxy, before real vLLM servers."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from examples.cluster.client import Client
from tests.e2e.checks import wait_until
from tests.e2e.deployment import Deployment
from tests.e2e.proxies import ONE_TO_ONE, proxy

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

PLACES = {"p1": "chunk512", "d1": "chunk512-layerwise", "d2": "chunk4096-layerwise"}
TWO_DECODERS = (
    "--host localhost --port $port --prefiller-host 127.0.0.1 --prefiller-port $p1"
    " --decoder-host 127.0.0.1 --decoder-ports $d1 $d2 --policy round-robin"
)
# By what it is called in each protocol's usage.
NAMES = ("cached_tokens", "cache_read_input_tokens")
TEXT = "What was cached is what was there when it was asked for. " * 12


def bodies(text: str) -> dict[str, dict[str, Any]]:
    messages = [{"role": "user", "content": text}]
    return {
        "/v1/completions": {"prompt": text, "max_tokens": 4},
        "/v1/chat/completions": {"messages": messages, "max_tokens": 4},
        "/v1/responses": {"input": text, "max_output_tokens": 4},
        "/v1/messages": {"messages": messages, "max_tokens": 4},
    }


def ask(client: Client, path: str, body: dict[str, Any]) -> str:
    model = json.loads(client.get("/v1/models")[1])["data"][0]["id"]
    usage = {"stream_options": {"include_usage": True}} if body.get("stream") else {}
    if path not in ("/v1/completions", "/v1/chat/completions"):
        usage = {}
    status, text = client.post(path, {"model": model, "temperature": 0, **usage, **body})
    assert status == 200, text
    return text


def cached_in(answer: str) -> int:
    """The last number that it says."""
    found = re.findall(rf'"(?:{"|".join(NAMES)})": ?(\d+)', answer)
    assert found, answer
    return int(found[-1])


@pytest.mark.parametrize("handoff", ["chain", "overlap"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_of_a_prompt_that_nobody_has_sent_before_nothing_was_cached(
    float32_fleet: Deployment, handoff: str, stream: bool
) -> None:
    with proxy(float32_fleet, f"{ONE_TO_ONE} --handoff {handoff}", PLACES) as server:
        for path in bodies(""):
            first = f"{path} {handoff} {stream} {TEXT}"

            def cached(text: str, path: str = path) -> int:
                body = {**bodies(text)[path], "stream": stream}
                return cached_in(ask(server.client, path, body))

            assert cached(first) == 0
            once_more = cached(first)
            assert once_more > 512
            # Decode finds all of the longer one as well.
            assert 128 < cached(first + TEXT) <= once_more


def test_a_conversation_goes_on_with_the_decoder_that_keeps_it(float32_fleet: Deployment) -> None:
    with proxy(float32_fleet, TWO_DECODERS, PLACES) as server:
        client = server.client
        before: str | None = None
        for turn in range(6):
            asked = {"input": f"turn {turn}. {TEXT}", "max_output_tokens": 4}
            if before is not None:
                asked["previous_response_id"] = before
            made = json.loads(ask(client, "/v1/responses", asked))
            status, found = client.get(f"/v1/responses/{made['id']}")
            assert (status, json.loads(found)["output"]) == (200, made["output"])
            before = made["id"]
        later = {"input": f"later {TEXT}", "max_output_tokens": 4, "background": True}
        response_id = json.loads(ask(client, "/v1/responses", later))["id"]

        def is_completed() -> bool:
            status, found = client.get(f"/v1/responses/{response_id}")
            assert status == 200, found
            return json.loads(found)["status"] not in ("queued", "in_progress")

        wait_until(is_completed, "the response that is made in the background is there")
        status, found = client.get(f"/v1/responses/{response_id}")
        assert cached_in(found) == 0
        # A second proxy has never heard of it.
        with proxy(float32_fleet, TWO_DECODERS, PLACES) as other:
            for id_ in (before, response_id):
                assert other.client.get(f"/v1/responses/{id_}")[0] == 200
            assert other.client.get("/v1/responses/resp_no")[0] == 404


def test_what_was_prefilled_lately_is_found_by_decode_alone(float32_fleet: Deployment) -> None:
    prefill, decode = (float32_fleet[PLACES[name]].client for name in ("p1", "d1"))
    flags = f"{ONE_TO_ONE} --known-for-s 1000 --max-new-tokens 40"
    with proxy(float32_fleet, flags, PLACES) as server:
        for path in bodies(""):
            body = bodies(f"known at {path} {TEXT}")[path]
            first = ask(server.client, path, body)
            before = prefill.counters(), decode.counters()
            assert cached_in(first) == 0
            # All full blocks of it: there is no receipt for the tail.
            assert cached_in(ask(server.client, path, body)) >= 512
            assert (prefill.counters() - before[0]).external_queries == 0
            assert (decode.counters() - before[1]).computed < 200
        chat = "/v1/chat/completions"
        talk = bodies(f"known at {chat} {TEXT}")[chat]["messages"]
        turns = [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
        before = prefill.counters(), decode.counters()
        more = {"messages": [*talk, *turns], "max_tokens": 4}
        assert cached_in(ask(server.client, chat, more)) >= 512
        assert (prefill.counters() - before[0]).external_queries == 0
        assert (decode.counters() - before[1]).computed < 256
        assert server.client.metrics()['ucm_pd_requests_total{path="skip-known"}'] == 5


def test_every_chat_of_a_batch_is_prefilled(float32_fleet: Deployment) -> None:
    prefill, decode = (float32_fleet[PLACES[name]].client for name in ("p1", "d1"))
    talks = [[{"role": "user", "content": f"batch {i} {TEXT}"}] for i in range(2)]
    with proxy(float32_fleet, f"{ONE_TO_ONE} --handoff overlap", PLACES) as server:
        before = prefill.counters(), decode.counters()
        asked = {"messages": talks, "max_completion_tokens": 4}
        answer = json.loads(ask(server.client, "/v1/chat/completions/batch", asked))
        assert [0, 1] == [choice["index"] for choice in answer["choices"]]
        assert (prefill.counters() - before[0]).computed > 2 * 512
        assert (decode.counters() - before[1]).external_hits >= 2 * 512
        assert server.client.metrics()['ucm_pd_requests_total{path="pd"}'] == 1
        for talk, choice in zip(talks, answer["choices"], strict=True):
            body = {"messages": talk, "max_tokens": 4}
            single = json.loads(ask(server.client, "/v1/chat/completions", body))
            assert single["choices"][0]["message"] == choice["message"]
