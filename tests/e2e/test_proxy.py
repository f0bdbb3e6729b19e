"""The proxy's command lines as the documents have them, before real vLLM servers."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from string import Template

import pytest

from examples.cluster.client import Client
from examples.cluster.processes import VLLM_ENVIRONMENT, HttpServer, free_port
from tests.e2e.checks import LENGTHS, Prompt, at_once, counted, make_prompt
from tests.e2e.deployment import MAX_TOKENS, Deployment, Oracle
from ucm.pd import toy_proxy_server

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

ONE_TO_ONE = {
    "1p1d": (
        "--pd-disaggregation --host localhost --port $port --prefiller-host 127.0.0.1"
        " --prefiller-port $p1 --decoder-host 127.0.0.1 --decoder-port $d1"
    ),
    "cross-platform": (
        "--host localhost --port $port --prefiller-host 127.0.0.1 --prefiller-port $p1"
        " --decoder-host 127.0.0.1 --decoder-port $d2"
    ),
    "vllm-ascend": (
        "--host localhost --port $port --prefiller-hosts 127.0.0.1 --prefiller-port $p1"
        " --decoder-hosts 127.0.0.1 --decoder-ports $d1"
    ),
}
X_TO_Y = (
    "--pd-disaggregation --host localhost --port $port --prefiller-hosts 127.0.0.1 127.0.0.1"
    " --prefiller-port $p1 $p2 --decoder-hosts 127.0.0.1 127.0.0.1 --decoder-ports $d1 $d2"
)

# `vllm bench serve`, whose command line asks for a package called vllm: the CPU build has another
# name.
BENCH_SERVE = """\
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@contextmanager
def proxy(fleet: Deployment, flags: str) -> Iterator[HttpServer]:
    """Started with its script's name in its own folder, as the documents do."""
    port = free_port()
    places = {"p1": "chunk512", "p2": "chunk4096", "d1": "chunk512-layerwise"}
    places["d2"] = "chunk4096-layerwise"
    ports = {name: fleet[engine].server.port for name, engine in places.items()}
    line = Template(flags).substitute(ports, port=port)
    command = [sys.executable, "toy_proxy_server.py", *shlex.split(line)]
    cwd = Path(toy_proxy_server.__file__).parent
    log = fleet.folder / f"proxy-{port}.log"
    with HttpServer(command, port=port, log=log, cwd=cwd) as server:
        server.wait_ready()
        yield server


def seed_curl(client: Client, model: str) -> dict[str, object]:
    """The documents' request, which is shorter than a block."""
    body = {"prompt": "What date is today?", "max_tokens": 20, "temperature": 0}
    status, text = client.post("/v1/completions", {"model": model, **body})
    assert status == 200, text
    answer: dict[str, object] = json.loads(text)
    return answer


@pytest.mark.parametrize("document", ONE_TO_ONE)
def test_behind_a_documents_line_decode_answers_with_what_prefill_has_just_stored(
    float32_fleet: Deployment, oracle: Oracle, document: str
) -> None:
    decoder = float32_fleet[
        "chunk4096-layerwise" if "$d2" in ONE_TO_ONE[document] else "chunk512-layerwise"
    ]
    with proxy(float32_fleet, ONE_TO_ONE[document]) as server:
        # All lengths behind one of them: what differs between the documents is how they say it.
        for length in LENGTHS if document == "1p1d" else (129, 1500):
            prompt = make_prompt(length, f"proxy {document}")
            before = decoder.client.counters()
            answer = server.client.complete(prompt, max_tokens=MAX_TOKENS)
            assert answer.token_ids == oracle.answer(prompt)
            gained = counted(decoder.client, before, length)
            if decoder.node is float32_fleet["chunk512"].node:
                # On another node the last files may not be there yet.
                assert gained.external_hits == decoder.full_hit_tokens(prompt), gained
        text = "A page that was computed once need not be computed again. " * 20
        assert server.client.chat(text).token_ids == oracle.server.client.chat(text).token_ids
        models = json.loads(server.client.get("/v1/models")[1])
        answer_of_seed = seed_curl(server.client, models["data"][0]["id"])
        assert answer_of_seed["usage"]["completion_tokens"] == 20  # type: ignore[index]


def test_two_prefillers_and_two_decoders_answer_32_clients_rightly_and_all_have_work(
    float32_fleet: Deployment, oracle: Oracle
) -> None:
    prompts = [make_prompt(300 + 40 * i, f"xpyd {i}") for i in range(16)]
    expected = {prompt: oracle.answer(prompt) for prompt in prompts}

    def client(server: HttpServer, prompt: Prompt) -> None:
        answer = server.client.complete(prompt, max_tokens=MAX_TOKENS)
        assert answer.token_ids == expected[prompt]

    with proxy(float32_fleet, X_TO_Y) as server:
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
    with proxy(float32_fleet, X_TO_Y) as server:
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
