"""Whatever is killed, at whatever moment: right answers, and nothing held for the dead."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http.client import HTTPException

import pytest

from examples.cluster.client import RequestFailed
from tests.e2e.checks import (
    Prompt,
    abandon,
    at_once,
    check_answer,
    check_loaded,
    make_prompt,
    wait_for_hit,
)
from tests.e2e.deployment import Deployment, Engine, Oracle
from tests.e2e.node import count, engines_of

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def test_two_nodes_that_store_the_same_cold_prompts_at_once_leave_only_whole_files(
    float32_fleet: Deployment, oracle: Oracle
) -> None:
    store = float32_fleet.store
    prompts = [make_prompt(length, "two nodes") for length in (3500, 1500, 1300, 700)]
    expected = [oracle.answer(prompt) for prompt in prompts]
    prefills = [float32_fleet["chunk512"], float32_fleet["chunk4096"]]
    at_once(
        partial(check_answer, engine, prompt, tokens)
        for prompt, tokens in zip(prompts, expected, strict=True)
        for engine in prefills
    )
    for prompt in prompts:
        store.wait_stored(prompt)
    for engine in prefills:
        status = engine.node.wait_quiet()
        assert count(status, "write_done") + count(status, "write_already_there") > 0
    assert store.bad_files() == []
    assert store.unfinished() == []

    # Without what is in memory, decode has only the files.
    for engine in prefills:
        engine.node.leave()
    for decode in (float32_fleet["chunk512-layerwise"], float32_fleet["chunk4096-layerwise"]):
        wait_for_hit(decode, make_prompt(1500, "identity chunk512"))
        for prompt, tokens in zip(prompts, expected, strict=True):
            check_loaded(decode, prompt, tokens)
        assert count(decode.node.status(), "read_hit") >= sum(len(p) // 128 for p in prompts)


def test_a_node_cache_that_hangs_costs_seconds_and_no_answer_and_holds_nothing_afterwards(
    float32_fleet: Deployment, oracle: Oracle
) -> None:
    engines = [float32_fleet["chunk512"], float32_fleet["chunk512-layerwise"]]
    node = engines[0].node
    stored = make_prompt(1500, "identity chunk512")
    fresh = [make_prompt(1500, f"while it hangs {engine.name}") for engine in engines]
    expected = {prompt: oracle.answer(prompt) for prompt in (stored, *fresh)}
    for engine in engines:
        wait_for_hit(engine, stored)
    pid = node.status().pid
    os.kill(pid, signal.SIGSTOP)
    try:
        for engine in engines:
            # Gone while its lookup has no answer.
            abandon(engine.client, stored, after_s=0.5)
        at_once(
            partial(check_answer, engine, prompt, expected[prompt])
            for engine, prompt in zip(engines * 2, [stored, stored, *fresh], strict=True)
        )
    finally:
        os.kill(pid, signal.SIGCONT)
    node.wait_quiet()
    assert node.status().pid == pid
    for engine in engines:
        wait_for_hit(engine, stored)
        check_loaded(engine, stored, expected[stored])
    assert float32_fleet.store.bad_files() == []


def test_a_killed_node_cache_costs_no_answer_and_seconds_later_its_engines_hit_again(
    float32_fleet: Deployment, oracle: Oracle
) -> None:
    engines = [float32_fleet["chunk512"], float32_fleet["chunk512-layerwise"]]
    node = engines[0].node
    stored = [make_prompt(1500, f"identity {name}") for name in float32_fleet.engines]
    fresh = [make_prompt(1100, f"while it is killed {i}") for i in range(8)]
    expected = {prompt: oracle.answer(prompt) for prompt in [*stored, *fresh]}
    for engine in engines:
        wait_for_hit(engine, stored[0])
    for prompt in stored:
        check_answer(engines[0], prompt, expected[prompt])
        float32_fleet.store.wait_stored(prompt)
    stop = threading.Event()

    def client(engine: Engine, offset: int) -> int:
        prompts = [*stored, *fresh]
        asked = 0
        while not stop.is_set():
            prompt = prompts[(asked + offset) % len(prompts)]
            check_answer(engine, prompt, expected[prompt])
            asked += 1
        return asked

    def killer() -> int:
        killed = set()
        try:
            for _ in range(3):
                time.sleep(1.5)
                node.wait("serving again", lambda status: len(engines_of(status)) > 0)
                killed.add(node.kill())
        finally:
            stop.set()
        return len(killed)

    calls: list[Callable[[], int]] = [killer]
    calls += [partial(client, engine, offset) for engine in engines for offset in (0, 3, 6)]
    answered = at_once(calls)
    assert answered[0] == 3
    assert all(answered)
    for engine in engines:
        wait_for_hit(engine, stored[1])
        check_loaded(engine, stored[2], expected[stored[2]])
    node.wait_quiet()
    assert float32_fleet.store.bad_files() == []


def test_a_prefill_engine_killed_while_it_stores_leaves_no_pin_no_slot_and_no_wrong_block(
    float32_fleet: Deployment, oracle: Oracle
) -> None:
    victim, decode = float32_fleet["chunk512"], float32_fleet["chunk512-layerwise"]
    store, node = float32_fleet.store, victim.node
    other = float32_fleet["chunk4096"]
    for engine in (victim, decode, other):
        wait_for_hit(engine, make_prompt(1500, "identity chunk512"))
    before = node.wait_quiet()
    assert len(engines_of(before)) == 2
    committed = count(before, "dump_committed")
    prompts = [make_prompt(3500, f"killed while storing {i}") for i in range(4)]
    asking = [threading.Thread(target=_ask_in_vain, args=(victim, prompt)) for prompt in prompts]
    for thread in asking:
        thread.start()
    node.wait(
        "in the middle of it",
        lambda status: status.slots["filling"] > 0 and count(status, "dump_committed") > committed,
    )
    victim.server.kill()
    for thread in asking:
        thread.join()

    node.wait("rid of the dead", lambda status: len(engines_of(status)) == 1)
    after = node.wait_quiet()
    assert count(after, "dump_aborted") > count(before, "dump_aborted")
    assert count(after, "dump_committed") - committed < 4 * (3500 // 128), "it was done already"
    assert store.bad_files() == []
    for prompt in prompts:
        check_answer(decode, prompt, oracle.answer(prompt))
        store.wait_stored(prompt)
    for prompt in prompts:
        check_loaded(decode, prompt, oracle.answer(prompt))
        check_loaded(other, prompt, oracle.answer(prompt))
    assert store.bad_files() == []


def _ask_in_vain(engine: Engine, prompt: Prompt) -> None:
    with suppress(OSError, HTTPException, RequestFailed):
        engine.client.complete(prompt)
