"""A page of a window, or a state, that storage does not bring in time: a shorter hit or none, and
the right answer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.checks import make_prompt, missed_blocks
from tests.e2e.deployment import Fleets
from tests.e2e.hybrid_fleet import HybridFleet, ask, ask_counted, longest_end
from tests.e2e.hybrid_models import MODELS, HybridModel
from tests.e2e.node import Node
from tests.faults.fuse import FuseMount, mount_fuse, needs_fuse

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(900), needs_fuse]


@pytest.fixture(scope="module", params=["gemma3-w129", "qwen3-next"])
def model(request: pytest.FixtureRequest) -> HybridModel:
    return MODELS[request.param]


@pytest.fixture(scope="module")
def mount(
    model: HybridModel, fleets: Fleets, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[HybridFleet, FuseMount]]:
    """`decode` sees the store through the mount."""
    fleets.end()
    made = HybridFleet(tmp_path_factory.mktemp(f"{model.name}-late"), model)
    with mount_fuse(made.store.folder, made.folder / "mount") as mounted, made:
        made.start("prefill", Node(f"{model.name}-late-one"), chunk=512)
        made.start("decode", Node(f"{model.name}-late-two", mounted_at=mounted.path))
        made.wait_ready()
        yield made, mounted
        mounted.release()


@pytest.mark.parametrize("length", [1500, 3400])
def test_a_side_page_that_is_late_costs_what_lies_behind_an_earlier_boundary(
    mount: tuple[HybridFleet, FuseMount], length: int
) -> None:
    fleet, mounted = mount
    prefill, decode = fleet["prefill"], fleet["decode"]
    prompt = make_prompt(length, "late")
    ask(prefill.client, prompt)
    fleet.wait_kept(prompt)
    *_, side = fleet.kept_files(prompt).values()
    file = side[max(side)]
    before = missed_blocks(decode.client)
    mounted.hang("read", file=file)
    try:
        said, local, hits = ask_counted(decode, prompt)
    finally:
        mounted.release()
    assert said.is_like(fleet.expected(prompt))
    assert local == 0
    assert hits in (0, longest_end(fleet.store, fleet.model, prompt, without=file))
    gained = missed_blocks(decode.client)
    gained.subtract(before)
    num_missed = (fleet.hit_tokens(prompt) - hits) // fleet.model.block_size
    assert gained["timeout"] == num_missed, gained
    # It was late, and not lost: prompts that come later are loaded to their end.
    again = (*prompt, 7)
    decode.node.wait_quiet()
    said, _, _ = ask_counted(decode, again)
    assert said.is_like(fleet.expected(again))
    assert fleet.store.bad_files() == []
