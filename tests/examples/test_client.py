"""The client reads what vLLM sends."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator

import pytest

from examples.cluster.client import Client, Counters, RequestFailed

METRICS = """\
# HELP vllm:prompt_tokens_by_source_total Number of prompt tokens by source.
# TYPE vllm:prompt_tokens_by_source_total counter
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="local_compute"} 44.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="local_cache_hit"} 0.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="external_kv_transfer"} 3456.0
vllm:prompt_tokens_by_source_created{engine="0",model_name="m",source="local_compute"} 1.79e+09
vllm:external_prefix_cache_queries_total{engine="0",model_name="m"} 3.5e+03
vllm:external_prefix_cache_hits_total{engine="0",model_name="m"} 3456.0
"""


DONE = b"data: [DONE]\n\n"


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


USAGE = event(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 2})


@pytest.fixture
def serve() -> Iterator[Callable[[int, bytes], Client]]:
    """Starts a server that gives everybody the same answer."""
    servers: list[http.server.HTTPServer] = []
    threads: list[threading.Thread] = []

    def start(status: int, body: bytes) -> Client:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.do_GET()

            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        servers.append(http.server.HTTPServer(("127.0.0.1", 0), Handler))
        threads.append(threading.Thread(target=servers[-1].serve_forever))
        threads[-1].start()
        return Client("127.0.0.1", servers[-1].server_port)

    yield start
    for server, thread in zip(servers, threads, strict=True):
        server.shutdown()
        thread.join()
        server.server_close()


def test_an_answer_is_put_together_from_its_stream(serve):
    client = serve(
        200,
        event(choices=[{"text": "a", "token_ids": [7]}])
        + event(choices=[{"text": "", "token_ids": [8], "finish_reason": "length"}])
        + USAGE
        + DONE,
    )

    answer = client.complete([1, 2, 3])

    assert ("a", (7, 8), 3, "length") == (
        answer.text,
        answer.token_ids,
        answer.prompt_tokens,
        answer.finish_reason,
    )
    assert 0 < answer.ttft_s <= answer.total_s


def test_each_event_with_tokens_has_its_time_and_the_first_is_told_at_once(serve):
    first = event(choices=[{"text": "a", "token_ids": [7]}])
    client = serve(200, first + event(choices=[{"text": "", "token_ids": [8]}]) + USAGE + DONE)
    told = []

    answer = client.complete("hello", on_first=lambda: told.append(True))

    assert [True] == told
    assert 2 == len(answer.arrived_s)
    assert sorted(answer.arrived_s) == list(answer.arrived_s)
    assert answer.sent_s < answer.arrived_s[0] and answer.arrived_s[-1] <= answer.ended_s
    assert "date" in answer.headers


def test_a_chat_answer_is_in_deltas(serve):
    client = serve(200, event(choices=[{"delta": {"content": "hi"}, "token_ids": [1, 2]}]) + DONE)

    answer = client.chat("hello")

    assert ("hi", (1, 2)) == (answer.text, answer.token_ids)


def test_a_stream_that_stops_early_is_no_answer(serve):
    client = serve(200, event(choices=[{"text": "a", "token_ids": [7]}]))

    with pytest.raises(RequestFailed, match="stopped before"):
        client.complete("hello")


@pytest.mark.parametrize(
    ("status", "body"),
    [(400, b"too long"), (200, event(error={"message": "too long", "code": 500}))],
)
def test_an_error_is_one_wherever_it_comes(serve, status, body):
    with pytest.raises(RequestFailed, match="too long"):
        serve(status, body).complete("hello")


def test_counters_are_read_from_the_metrics_page_and_can_be_subtracted(serve):
    counters = serve(200, METRICS.encode()).counters()

    assert counters == Counters(
        computed=44, local_hits=0, external_hits=3456, external_queries=3500
    )
    assert Counters(computed=0, local_hits=0, external_hits=0, external_queries=0) == (
        counters - counters
    )
