"""A conversation: what decode has answered is a part of the next prompt, and is loaded as the
rest is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.conftest import DeploymentMaker
from tests.e2e.deployment import Deployment, Oracle
from tests.e2e.node import Node
from tests.e2e.store import BLOCK_TOKENS
from tests.e2e.talks import (
    ANSWER,
    QUESTION,
    TURNS,
    check_little_is_computed,
    computed_by_turn,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def fleet(deployment: DeploymentMaker, started_oracle: Oracle) -> Iterator[Deployment]:
    """`silent` stores no answers."""
    made = deployment("conversations")
    one, two = Node("talk-one"), Node("talk-two")
    made.start("prefill", one)
    made.start("decode", two)
    made.start("silent", two, store_generated=False)
    with made:
        made.wait_ready()
        yield made


def test_from_the_second_turn_on_prefill_computes_a_block_and_what_is_new(
    fleet: Deployment, oracle: Oracle
) -> None:
    check_little_is_computed(computed_by_turn(fleet, oracle, "decode", "kept"))


def test_without_store_generated_prefill_computes_every_answer_again(
    fleet: Deployment, oracle: Oracle
) -> None:
    found = computed_by_turn(fleet, oracle, "silent", "lost")

    assert all(prefilled > ANSWER for prefilled, _ in found[1:]), found
    lost = sum(prefilled for prefilled, _ in found[1:])
    assert lost >= (TURNS - 1) * (QUESTION + ANSWER - BLOCK_TOKENS)
