"""Prefill on one node, decode on another, and between them nothing but a bucket.

In `make test` its server is one that keeps objects in memory; in `make test-cluster` SeaweedFS.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.checks import LENGTHS, check_answer, check_loaded, make_prompt, wait_for_hit
from tests.e2e.deployment import Fleets, Oracle
from tests.e2e.node import count
from tests.e2e.races import race
from tests.e2e.s3_fleet import PLACES, SEAWEEDFS, S3Fleet, s3_server
from tests.faults.s3_server import S3Server

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", params=("moto", SEAWEEDFS))
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[S3Server]:
    with s3_server(request.param, tmp_path_factory.mktemp("server")) as made:
        yield made


@pytest.fixture(scope="module")
def fleet(
    server: S3Server,
    fleets: Fleets,
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    started_oracle: Oracle,
) -> Iterator[S3Fleet]:
    fleets.end()
    with S3Fleet(tmp_path_factory.mktemp("s3"), tiny_model, server) as made:
        made.wait_ready()
        yield made


def test_decode_loads_every_full_block_from_the_bucket_and_says_what_a_cold_server_says(
    fleet: S3Fleet, oracle: Oracle
) -> None:
    prompts = [make_prompt(length, "by a bucket") for length in LENGTHS]
    for prompt in prompts:
        check_answer(fleet["prefill"], prompt, oracle.answer(prompt))
    fleet["prefill"].node.wait_quiet()
    for prompt in prompts:
        check_loaded(fleet["decode"], prompt, oracle.answer(prompt))
    status = fleet["decode"].node.wait_quiet()
    num_blocks = sum(len(prompt) // 128 for prompt in prompts)
    assert (status.tier, count(status, "read_hit")) == ("s3", num_blocks)


def test_decode_asked_at_once_loads_every_promised_token_of_every_prompt(
    fleet: S3Fleet, oracle: Oracle
) -> None:
    race(fleet, oracle, PLACES, "chain", num_prompts=20, salt="by a bucket")


def test_a_server_that_is_killed_costs_hits_and_no_answer_and_serves_again_when_it_is_back(
    fleet: S3Fleet, oracle: Oracle
) -> None:
    kept, during = make_prompt(1500, "before the bucket died"), make_prompt(1500, "while dead")
    check_answer(fleet["prefill"], kept, oracle.answer(kept))
    fleet["prefill"].node.wait_quiet()

    fleet.server.kill()
    for engine in (fleet["prefill"], fleet["decode"]):
        check_loaded(engine, during, oracle.answer(during), hit_tokens=0)
    check_loaded(fleet["decode"], kept, oracle.answer(kept), hit_tokens=0)
    fleet.server.start()

    # What was computed meanwhile is written now, and of a server with a disk nothing is lost.
    wait_for_hit(fleet["decode"], during)
    if fleet.server.keeps_objects:
        check_loaded(fleet["decode"], kept, oracle.answer(kept))
    num_prompts = 20 if fleet.server.keeps_objects else 4
    race(fleet, oracle, PLACES, "chain", num_prompts=num_prompts, salt="after an outage")


def test_without_credentials_that_are_good_servers_answer_as_before(
    fleet: S3Fleet, oracle: Oracle
) -> None:
    prompt = make_prompt(1500, "nobody is let in")
    fleet.server.kill()
    fleet.server.change_locks()
    fleet.server.start()
    for engine in (fleet["prefill"], fleet["decode"]):
        check_loaded(engine, prompt, oracle.answer(prompt), hit_tokens=0)
    # From memory.
    check_loaded(fleet["prefill"], prompt, oracle.answer(prompt))
