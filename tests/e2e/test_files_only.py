"""Prefill has come and gone before decode starts: there is nothing between them but files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from examples.cluster.client import Counters
from tests.e2e.checks import LENGTHS, Prompt, check_answer, check_loaded, counted, make_prompt
from tests.e2e.conftest import DeploymentMaker
from tests.e2e.deployment import Deployment, Engine, Fleets, Oracle
from tests.e2e.node import Node, count, is_alive
from tests.e2e.store import Store

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

PREFIX = make_prompt(6 * 128, "files only, shared")


@dataclass(frozen=True)
class Past:
    """What a prefill server that is no more has done. `asked_again` is what its counters gained
    when it was asked a stored prompt twice."""

    store: Store
    deployment: Deployment
    prompts: list[Prompt]
    asked_again: Counters
    exit_code: int
    last_words: str


@pytest.fixture(scope="module")
def past(
    fleets: Fleets, deployment: DeploymentMaker, started_oracle: Oracle, refused: object
) -> Iterator[Past]:
    """With time to spare for `refused`: one server that starts alone keeps one core busy."""
    fleets.end()
    with deployment("files-only") as made:
        node = Node("files-past")
        prefill = made.start("prefill", node, chunk=512, layerwise=True, role="kv_producer")
        made.wait_ready()
        prompts = [make_prompt(length, "files only") for length in LENGTHS]
        prompts.append(PREFIX + make_prompt(50, "first"))
        for prompt in prompts:
            check_answer(prefill, prompt, started_oracle.answer(prompt))
            made.store.wait_stored(prompt)
        before = prefill.client.counters()
        check_answer(prefill, prompts[4], started_oracle.answer(prompts[4]))
        asked_again = counted(prefill.client, before, len(prompts[4]))
        pid = node.status().pid
        prefill.server.stop()
        node.leave()
        assert not is_alive(pid)
        exit_code = prefill.server.exit_code
        assert exit_code is not None
        del made.engines["prefill"]
        last_words = prefill.server.log_tail()
        made.start("decode", Node("files-now"), role="kv_consumer")
        made.wait_ready()
        yield Past(made.store, made, prompts, asked_again, exit_code, last_words)


@pytest.fixture
def decode(past: Past) -> Engine:
    return past.deployment["decode"]


def test_decode_started_after_prefill_was_stopped_loads_everything_from_files(
    past: Past, decode: Engine, oracle: Oracle
) -> None:
    assert past.exit_code == 0, past.last_words
    for prompt in past.prompts:
        check_loaded(decode, prompt, oracle.answer(prompt))
    # Each block was read once; the first block of the shared prefix counts among them.
    num_blocks = sum(len(prompt) // 128 for prompt in past.prompts)
    assert count(decode.node.wait_quiet(), "read_hit") == num_blocks


def test_a_prefix_shared_by_two_prompts_loads_for_both(
    past: Past, decode: Engine, oracle: Oracle
) -> None:
    first = past.prompts[-1]
    second = PREFIX + make_prompt(300, "second")
    check_loaded(decode, first, oracle.answer(first))
    check_loaded(decode, second, oracle.answer(second), hit_tokens=len(PREFIX))


def test_a_producer_never_loads_and_a_consumer_never_stores(
    past: Past, decode: Engine, oracle: Oracle
) -> None:
    assert past.asked_again.external_hits == 0
    assert past.asked_again.computed == 1500
    fresh = make_prompt(1500, "never stored")
    files = past.store.blocks()
    for _ in range(2):
        check_loaded(decode, fresh, oracle.answer(fresh), hit_tokens=0)
    status = decode.node.wait_quiet()
    assert count(status, "dump_committed") == 0
    assert past.store.blocks() == files
