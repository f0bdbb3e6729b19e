"""The proxy's command lines as the documents have them, before real vLLM servers."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from string import Template

import pytest

from examples.cluster.client import Client
from examples.cluster.processes import VLLM_ENVIRONMENT, HttpServer
from tests.e2e import proxies
from tests.e2e.checks import LENGTHS, Prompt, at_once, counted, make_prompt, metric, wait_until
from tests.e2e.deployment import MAX_TOKENS, Deployment, Oracle
from tests.e2e.proxies import ONE_TO_ONE, PLACES, TWO_TO_TWO
from ucm.pd.flags import ProxySettings

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

DOCUMENTS = {
    "1p1d": ONE_TO_ONE,
    "cross-platform": (
        "--host localhost --port $port --prefiller-host 127.0.0.1 --prefiller-port $p1"
        " --decoder-host 127.0.0.1 --decoder-port $d2"
    ),
    "vllm-ascend": (
        "--host localhost --port $port --prefiller-hosts 127.0.0.1 --prefiller-port $p1"
        " --decoder-hosts 127.0.0.1 --decoder-ports $d1"
    ),
}
TEXT = "A page that was computed once need not be computed again. " * 20
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {"type": "object", "properties": {"page": {"type": "integer"}}},
    },
}
AS_DECODE_SAYS: dict[str, tuple[str, dict[str, object]]] = {
    "best_of": ("/v1/completions", {"prompt": TEXT, "best_of": 2}),
    # Decode refuses it; the prefill request is a right one.
    "n at temperature 0": ("/v1/completions", {"prompt": TEXT, "n": 4}),
    "required tool": (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": TEXT}],
            "tools": [TOOL],
            "tool_choice": "required",
        },
    ),
}

# `vllm bench serve`, whose command line asks for a package called vllm: the CPU build has another
# name.
BENCH_SERVE = """\
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def proxy(fleet: Deployment, flags: str) -> AbstractContextManager[HttpServer]:
    return proxies.proxy(fleet, flags, PLACES)


def seed_curl(client: Client, model: str) -> dict[str, object]:
    """The documents' request, which is shorter than a block."""
    body = {"prompt": "What date is today?", "max_tokens": 20, "temperature": 0}
    status, text = client.post("/v1/completions", {"model": model, **body})
    assert status == 200, text
    answer: dict[str, object] = json.loads(text)
    return answer


@pytest.mark.parametrize("document", DOCUMENTS)
def test_behind_a_documents_line_decode_answers_with_what_prefill_has_just_stored(
    float32_fleet: Deployment, oracle: Oracle, document: str
) -> None:
    decoder = float32_fleet[
        "chunk4096-layerwise" if "$d2" in DOCUMENTS[document] else "chunk512-layerwise"
    ]
    with proxy(float32_fleet, DOCUMENTS[document]) as server:
        # All lengths behind one of them: what differs between the documents is how they say it.
        for length in LENGTHS if document == "1p1d" else (129, 1500):
            prompt = make_prompt(length, f"proxy {document}")
            before = decoder.client.counters()
            answer = server.client.complete(prompt, max_tokens=MAX_TOKENS)
            assert answer.token_ids == oracle.answer(prompt)
            gained = counted(decoder.client, before, length)
            # Whether it is on prefill's node or on another one.
            is_prefilled = length >= ProxySettings.min_prefill_tokens
            wanted = decoder.handed_over_tokens(prompt) if is_prefilled else 0
            assert gained.external_hits == wanted, gained
        assert server.client.chat(TEXT).token_ids == oracle.server.client.chat(TEXT).token_ids
        models = json.loads(server.client.get("/v1/models")[1])
        answer_of_seed = seed_curl(server.client, models["data"][0]["id"])
        assert answer_of_seed["usage"]["completion_tokens"] == 20  # type: ignore[index]


def one_prefill(fleet: Deployment, path: str, body: dict[str, object]) -> tuple[int, str]:
    """What the client gets. The prefill server has generated one token for it."""
    prefill = fleet["chunk512"].client
    before = metric(prefill, "vllm:generation_tokens_total")
    with proxy(fleet, ONE_TO_ONE) as server:
        answer = server.client.post(path, body)
    # vLLM counts a little after it answers, and in order.
    prefill.complete(make_prompt(1, "fence"), max_tokens=1)

    def generated() -> int:
        return metric(prefill, "vllm:generation_tokens_total") - before

    wait_until(lambda: generated() >= 2, "prefill's token and the fence's are counted")
    assert generated() == 2
    return answer


def test_for_a_client_who_wants_four_answers_prefill_computes_one_token_of_one(
    float32_fleet: Deployment, oracle: Oracle
) -> None:
    prompt = make_prompt(300, "four answers")
    # vLLM refuses several answers at temperature 0; among one token, nothing is left to chance.
    likeliest = {"n": 4, "temperature": 1, "top_k": 1}
    asked = {"prompt": prompt, "max_tokens": MAX_TOKENS, "ignore_eos": True, **likeliest}
    status, text = one_prefill(
        float32_fleet, "/v1/completions", {**asked, "return_token_ids": True}
    )
    assert status == 200, text
    choices = json.loads(text)["choices"]
    assert [tuple(choice["token_ids"]) for choice in choices] == [oracle.answer(prompt)] * 4


def said(answer: tuple[int, str]) -> tuple[int, object]:
    """Status and choices, or the error, without what vLLM makes up for each answer."""
    status, text = answer
    body = json.loads(re.sub(r"chatcmpl-tool-\w+", "an id", text))
    return status, body["choices"] if status == 200 else body["error"]


@pytest.mark.parametrize("case", AS_DECODE_SAYS)
def test_the_client_gets_what_decode_says_and_prefill_computes_one_token(
    float32_fleet: Deployment, case: str
) -> None:
    path, fields = AS_DECODE_SAYS[case]
    body = {"max_tokens": MAX_TOKENS, "temperature": 0, "return_token_ids": True, **fields}
    answer = one_prefill(float32_fleet, path, body)
    decode = float32_fleet["chunk512-layerwise"].client
    assert said(answer) == said(decode.post(path, body))


def test_two_prefillers_and_two_decoders_answer_32_clients_rightly_and_all_have_work(
    float32_fleet: Deployment, oracle: Oracle
) -> None:
    prompts = [make_prompt(300 + 40 * i, f"xpyd {i}") for i in range(16)]
    expected = {prompt: oracle.answer(prompt) for prompt in prompts}

    def client(server: HttpServer, prompt: Prompt) -> None:
        answer = server.client.complete(prompt, max_tokens=MAX_TOKENS)
        assert answer.token_ids == expected[prompt]

    with proxy(float32_fleet, TWO_TO_TWO) as server:
        at_once(partial(client, server, prompt) for prompt in prompts * 2)
        instances = json.loads(server.client.get("/instances")[1])["instances"]
    assert [each["role"] for each in instances] == ["prefill"] * 2 + ["decode"] * 2
    assert all(each["served"] > 0 and each["running"] == 0 for each in instances), instances


def test_vllms_own_load_generator_gets_every_answer_through_the_proxy(
    float32_fleet: Deployment, tiny_model: Path
) -> None:
    line = (
        "--backend vllm --dataset-name random --random-input-len 400"
        " --random-output-len 8 --num-prompts 32 --ignore-eos --model $model --tokenizer $model"
        " --host localhost --port $port --endpoint /v1/completions --request-rate inf"
        " --max-concurrency 16 --save-result --result-dir $folder --result-filename bench.json"
    )
    folder = float32_fleet.folder
    with proxy(float32_fleet, TWO_TO_TWO) as server:
        places = {"model": tiny_model, "port": server.port, "folder": folder}
        flags = shlex.split(Template(line).substitute(places))
        command = [sys.executable, "-c", BENCH_SERVE, *flags]
        done = subprocess.run(
            command,
            env={**os.environ, **VLLM_ENVIRONMENT},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads((folder / "bench.json").read_text())
    assert (result["completed"], result.get("failed", 0)) == (32, 0)
