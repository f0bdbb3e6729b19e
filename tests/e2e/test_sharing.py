"""Several requests, several engines, one store: each block is computed, read and stored once."""

from __future__ import annotations

import itertools
import os
from functools import partial

import pytest

from tests.e2e.checks import at_once, check_answer, check_loaded, counted, make_prompt
from tests.e2e.deployment import Deployment, Oracle
from tests.e2e.node import count
from tests.e2e.watch import OpenFiles

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def test_requests_with_one_prefix_at_once_all_load_it_and_their_node_reads_each_block_once(
    float32_fleet: Deployment, oracle: Oracle
) -> None:
    store, node = float32_fleet.store, float32_fleet["chunk4096"].node
    prefix = make_prompt(9 * 128, "one prefix")
    check_answer(float32_fleet["chunk512"], prefix, oracle.answer(prefix))
    store.wait_stored(prefix)
    prompts = [prefix + make_prompt(60, f"tail {i}") for i in range(8)]
    expected = [oracle.answer(prompt) for prompt in prompts]
    engines = [float32_fleet["chunk4096"], float32_fleet["chunk4096-layerwise"]]
    before = [engine.client.counters() for engine in engines]
    reads_before = count(node.status(), "read_hit")
    at_once(
        partial(check_answer, engine, prompt, tokens)
        for engine, prompt, tokens in zip(itertools.cycle(engines), prompts, expected, strict=False)
    )
    for engine, counters in zip(engines, before, strict=True):
        gained = counted(engine.client, counters, 4 * len(prompts[0]))
        assert gained.external_hits == 4 * len(prefix)
    assert count(node.status(), "read_hit") - reads_before == 9
    node.wait_quiet()


def test_engines_of_a_node_that_compute_one_cold_prompt_at_once_store_each_block_once(
    float32_fleet: Deployment, oracle: Oracle
) -> None:
    prompt = make_prompt(3500, "cold at once")
    expected = oracle.answer(prompt)
    engines = [float32_fleet["chunk512"], float32_fleet["chunk512-layerwise"]]
    node = engines[0].node
    before = count(node.wait_quiet(), "dump_committed")
    at_once(partial(check_answer, engine, prompt, expected) for engine in engines * 2)
    float32_fleet.store.wait_stored(prompt)
    assert count(node.wait_quiet(), "dump_committed") - before == 3500 // 128
    for engine in engines:
        check_loaded(engine, prompt, expected)


def test_no_process_of_vllm_has_a_file_of_the_store_open_while_it_serves(
    float32_fleet: Deployment,
) -> None:
    """That this process, which holds one open, is seen shows that a process of vLLM would be."""
    engines = list(float32_fleet.engines.values())
    vllm = {process.pid for engine in engines for process in engine.server.processes()}
    assert len(vllm) >= 3 * len(engines), "an API server, an engine and a worker each"
    folder = float32_fleet.store.folder
    stored = make_prompt(1500, "open files")
    engines[0].client.complete(stored, max_tokens=1)
    float32_fleet.store.wait_stored(stored)
    a_file = next(folder.rglob("*.kv"))
    with a_file.open("rb"), OpenFiles(folder, {*vllm, os.getpid()}) as files:
        # Each prompt is stored by the first engine and loaded by the others, from memory and files.
        for i in range(3):
            prompt = make_prompt(3500, f"open files {i}")
            for engine in engines:
                engine.client.complete(prompt, max_tokens=1)
    assert files.num_looks >= 50
    assert set(files.seen) == {os.getpid()}
