"""Pages are brought into a node cache's memory before anybody wants them."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.cli.parts import PAGE_BYTES, Store, keys_of, manifest
from tests.store.conftest import place as place
from tests.store.node.support import Place, engine, wait_until
from ucm.store.blocks.namespace import Manifest
from ucm.store.blocks.strands import ALL, Reach, ReachKind
from ucm.store.inspect.asked_prompt import AskedPrompt, in_strand
from ucm.store.inspect.node_memory import keys_in_memory
from ucm.store.inspect.warm import warm
from ucm.store.inspect.warm_pages import Warmed, runs_of

pytestmark = pytest.mark.process

TOKENS = list(range(100))


def in_memory(place: Place, made: Manifest, prompt: AskedPrompt, number: int = 0) -> list[int]:
    keys = prompt.keys_by_strand()[number]
    found = keys_in_memory(place.settings(), made, keys, page_bytes=PAGE_BYTES)
    return [block for block, key in enumerate(keys) if key in found]


def test_what_is_stored_of_prompts_is_in_memory_then(place: Place) -> None:
    made = manifest("a")
    keys, salted = keys_of(made, TOKENS), keys_of(made, TOKENS, salt="s")
    store = Store(place.store)
    store.put(made, [*keys, *salted[:3]])
    prompts = [
        AskedPrompt(made, TOKENS),
        AskedPrompt(made, TOKENS[:40]),
        AskedPrompt(made, TOKENS, salt="s"),
        AskedPrompt(made, [7] * 50),
        AskedPrompt(made, [7]),
    ]
    steps: list[tuple[int, int]] = []

    warmed = warm(
        place.settings(), prompts, [PAGE_BYTES], on_progress=lambda *step: steps.append(step)
    )

    capacity = place.settings().cache_capacity_bytes
    assert warmed.memory_bytes <= capacity
    assert warmed == Warmed(
        num_prompts=5,
        in_memory=2,
        read=9,
        missing=6,
        warm_bytes=11 * PAGE_BYTES,
        memory_bytes=warmed.memory_bytes,
    )
    assert steps == [(done, 5) for done in range(1, 6)]
    assert in_memory(place, made, prompts[0]) == [0, 1, 2, 3, 4, 5]
    assert in_memory(place, made, prompts[2]) == [0, 1, 2]


def test_more_than_memory_has_room_for_is_said(place: Place) -> None:
    made = manifest("a")
    prompts = [AskedPrompt(made, [number, *TOKENS]) for number in range(8)]
    store = Store(place.store)
    for prompt in prompts:
        store.put(made, prompt.keys()[:6])
    settings = place.settings(cache_capacity_bytes=1 << 20)

    warmed = warm(settings, prompts, [PAGE_BYTES])

    assert warmed.read == 48 and warmed.warm_bytes == 48 * PAGE_BYTES
    assert warmed.memory_bytes < warmed.warm_bytes or warmed.memory_bytes <= 1 << 20


def strands(*reaches: Reach) -> dict[str, Any]:
    shape = {"num_layers": 2, "num_kv_heads": 1, "k_size": 8, "v_size": 8, "item_bytes": 2}
    return {
        "strands": [
            {"name": f"{number or ''}", "reach": str(reach), "layout": "canonical", **shape}
            for number, reach in enumerate(reaches)
        ]
    }


def test_of_a_window_the_stretches_that_are_kept_are_read(place: Place) -> None:
    made = manifest("w", **strands(ALL, Reach(ReachKind.WINDOW, 20)))
    prompt = AskedPrompt(made, TOKENS)
    keys = prompt.keys()[:6]
    window = [in_strand(key, prompt.strands()[1], is_salted=False) for key in keys]
    Store(place.store).put(made, [*keys, window[1], window[4], window[5]])

    warmed = warm(place.settings(), [prompt], [PAGE_BYTES, PAGE_BYTES])

    assert (warmed.read, warmed.missing) == (9, 0)
    assert in_memory(place, made, prompt) == [0, 1, 2, 3, 4, 5]
    assert in_memory(place, made, prompt, 1) == [1, 4, 5]


def test_a_page_that_is_damaged_is_not_brought_and_ends_its_prompt(place: Place) -> None:
    made = manifest("a")
    keys = keys_of(made, TOKENS)
    store = Store(place.store)
    store.put(made, keys)
    file = next(path for path in place.store.rglob(f"*{keys[2].hex()}*"))
    data = bytearray(file.read_bytes())
    data[-9000] ^= 1
    file.write_bytes(data)

    warmed = warm(place.settings(), [AskedPrompt(made, TOKENS)], [PAGE_BYTES])

    assert (warmed.read, warmed.damaged, warmed.missing) == (2, 4, 0)


def test_nothing_stays_pinned(place: Place) -> None:
    made = manifest("a")
    Store(place.store).put(made, keys_of(made, TOKENS))
    prompt = AskedPrompt(made, TOKENS)
    warm(place.settings(), [prompt], [PAGE_BYTES])

    from ucm.store.inspect.node_client import connect_tool, first_answer
    from ucm.store.node import protocol as p

    def pins() -> int:
        with connect_tool(place.settings(), timeout_s=10) as client:
            client.send(p.GetStatus(id=1))
            status = first_answer(client, lambda said: isinstance(said, p.Status), timeout_s=10)
            assert isinstance(status, p.Status)
            return status.slots["pins"]

    wait_until(lambda: pins() == 0, "no page is pinned")


def test_a_node_cache_is_held_until_somebody_uses_it(place: Place) -> None:
    made = manifest("a")
    settings = place.settings(idle_exit_s=1.0)
    Store(place.store).put(made, keys_of(made, TOKENS))
    prompt = AskedPrompt(made, TOKENS)
    alone: list[Warmed] = []
    began_s = time.monotonic()
    assert not warm(settings, [prompt], [PAGE_BYTES], hold_s=3, on_warmed=alone.append).is_used
    assert time.monotonic() - began_s >= 3
    assert [each.read for each in alone] == [6]
    assert in_memory(place, made, prompt) == [0, 1, 2, 3, 4, 5]

    with engine(settings):
        again = warm(settings, [prompt], [PAGE_BYTES], hold_s=60)
        assert again.is_used and again.in_memory == 6
    assert time.monotonic() - began_s < 60


def test_runs_are_stretches_of_what_is_anywhere() -> None:
    keys = keys_of(manifest("a"), TOKENS)
    assert list(runs_of(keys, bytes([0, 1, 4, 0, 2, 0]))) == [keys[1:3], keys[4:5]]
    assert list(runs_of(keys, bytes([1] * 6))) == [keys]
    assert list(runs_of(keys, bytes(6))) == []
