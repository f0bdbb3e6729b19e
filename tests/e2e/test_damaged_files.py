"""A file that is not, bit for bit, the block that its name says: absent, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.checks import at_once, check_all_load, check_answer, counted, make_prompt
from tests.e2e.deployment import Deployment, Oracle
from tests.e2e.store import cut_short, flip_bit, make_empty, make_foreign

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

BAD_BLOCK = 2


@pytest.mark.parametrize("damage", [flip_bit, cut_short, make_empty, make_foreign])
def test_a_damaged_file_is_absent_moved_aside_once_computed_again_and_stored_again(
    float32_fleet: Deployment, oracle: Oracle, damage: Callable[[Path], None]
) -> None:
    store = float32_fleet.store
    prompt = make_prompt(900, f"damage {damage.__name__}")
    expected = oracle.answer(prompt)
    check_answer(float32_fleet["chunk512"], prompt, expected)
    store.wait_stored(prompt)
    file = store.files(prompt)[BAD_BLOCK]
    sound = file.read_bytes()
    damage(file)
    assert len(store.bad_files()) == 1
    quarantined = set(store.quarantined())

    # Both engines of a node that never had these blocks, at once.
    engines = [float32_fleet["chunk4096"], float32_fleet["chunk4096-layerwise"]]
    before = [engine.client.counters() for engine in engines]
    at_once(partial(check_answer, engine, prompt, expected) for engine in engines)
    for engine, counters in zip(engines, before, strict=True):
        gained = counted(engine.client, counters, len(prompt))
        # The later of the two may find what the earlier one has computed meanwhile.
        assert gained.external_hits in (BAD_BLOCK * 128, 7 * 128)
    (moved,) = set(store.quarantined()) - quarantined
    assert moved.name.startswith(file.name)

    engines[0].node.wait_quiet()
    assert file.read_bytes() == sound
    assert store.bad_files() == []
    check_all_load(float32_fleet.engines.values(), prompt, expected)
    assert len(store.quarantined()) == len(quarantined) + 1
