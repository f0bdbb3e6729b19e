"""Prefill and decode with files near and a bucket far: `Cache|Posix|S3`."""

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

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", params=("moto", SEAWEEDFS))
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[S3Server]:
    with s3_server(request.param, tmp_path_factory.mktemp("server")) as made:
        yield made


@pytest.fixture(scope="module", params=("own", "shared"))
def fleet(
    request: pytest.FixtureRequest,
    server: S3Server,
    fleets: Fleets,
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    started_oracle: Oracle,
) -> Iterator[S3Fleet]:
    fleets.end()
    near: str = request.param
    with S3Fleet(tmp_path_factory.mktemp(near), tiny_model, server, near) as made:
        made.wait_ready()
        yield made


def test_decode_loads_every_full_block_from_where_it_is_nearest_and_says_what_a_cold_server_says(
    fleet: S3Fleet, oracle: Oracle
) -> None:
    prompts = [make_prompt(length, "near and far") for length in LENGTHS]
    for prompt in prompts:
        check_answer(fleet["prefill"], prompt, oracle.answer(prompt))
    fleet["prefill"].node.wait_quiet()
    for prompt in prompts:
        check_loaded(fleet["decode"], prompt, oracle.answer(prompt))
    status = fleet["decode"].node.wait_quiet()
    num_blocks = sum(len(prompt) // 128 for prompt in prompts)
    near, far = (count(status, f"{of}tier_read_pages") for of in ("", "far_"))
    assert (near, far) == ((0, num_blocks) if fleet.near == "own" else (num_blocks, 0))


def test_decode_asked_at_once_loads_every_promised_token_of_every_prompt(
    fleet: S3Fleet, oracle: Oracle
) -> None:
    race(fleet, oracle, PLACES, "chain", num_prompts=20, salt=fleet.near)


def test_without_the_bucket_what_is_near_is_loaded_and_answers_are_right(
    fleet: S3Fleet, oracle: Oracle
) -> None:
    """What decode has read far is in files near it since then; from memory it has gone with its
    node cache."""
    stored, new = make_prompt(1500, "near and far"), make_prompt(1500, "near alone")
    fleet["decode"].node.kill()
    fleet.server.kill()
    try:
        check_answer(fleet["prefill"], new, oracle.answer(new))
        wait_for_hit(fleet["decode"], stored)
        check_loaded(fleet["decode"], stored, oracle.answer(stored))
        check_answer(fleet["decode"], new, oracle.answer(new))
    finally:
        fleet.server.start()
