"""What shapes KV is in the keys: prompts that differ in it never share, and those that agree do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

import torch

from tests.integration.engine.naming_parts import (
    NUM_BLOCKS,
    PICTURE_AT,
    PICTURE_TOKENS,
    PROMPT,
    blue,
    common,
    keys,
    lora,
    make_adapter,
    named,
    picture,
    red,
)
from tests.integration.scheduler_parts import BLOCK, Engine, Loopback
from ucm import handoff as h
from ucm.store.blocks.keys import salt_tag

# What differs, as arguments of a prompt; how many leading blocks may be shared all the same.
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "another picture under one name": (
        {"features": [picture(red())]},
        {"features": [picture(blue())]},
        2,
    ),
    "a picture, and its text alone": ({"features": [picture(red())]}, {}, 2),
    "the same picture elsewhere": (
        {"features": [picture(red())]},
        {"features": [picture(red(), start=PICTURE_AT + 1)]},
        2,
    ),
    "what processor settings make of a picture": (
        {"features": [picture({"pixel_values": red(), "num_crops": torch.tensor(1)})]},
        {"features": [picture({"pixel_values": red(), "num_crops": torch.tensor(2)})]},
        2,
    ),
    "the shape of the same values": (
        {"features": [picture(red())]},
        {"features": [picture(red().reshape(3, 2, 4))]},
        2,
    ),
    "the type of the same bytes": (
        {"features": [picture(red())]},
        {"features": [picture(red().view(torch.int32))]},
        2,
    ),
    "lists that are cut elsewhere": (
        {"features": [picture({"sizes": [[1, 2], [3]]})]},
        {"features": [picture({"sizes": [[1], [2, 3]]})]},
        2,
    ),
    "which tokens stand for the picture": (
        {"features": [picture(red(), embedded=[True, False] * (PICTURE_TOKENS // 2))]},
        {"features": [picture(red(), embedded=[False, True] * (PICTURE_TOKENS // 2))]},
        2,
    ),
    "a picture, and a sound of the same values": (
        {"features": [picture(red())]},
        {"features": [picture(red(), modality="audio")]},
        2,
    ),
    "embeddings of the same tokens": (
        {"embeds": torch.ones(PROMPT, 4)},
        {"embeds": torch.cat([torch.ones(BLOCK, 4), torch.zeros(PROMPT - BLOCK, 4)])},
        1,
    ),
    "where tokens stand between embeddings": (
        {"embeds": torch.ones(PROMPT, 4), "is_token": [False] * PROMPT},
        {"embeds": torch.ones(PROMPT, 4), "is_token": [False] * (PROMPT - 1) + [True]},
        3,
    ),
    "the salt": ({"salt": "one"}, {"salt": "two"}, 0),
    "a salt, and none": ({"salt": ""}, {}, 0),
}


@pytest.mark.parametrize("what", PAIRS)
def test_prompts_that_differ_in_what_shapes_kv_share_only_what_stands_before_it(what: str) -> None:
    one, other, shared = PAIRS[what]

    assert common(keys(**one), keys(**other)) == shared
    # Nor does an engine mix them up that has seen both.
    engine = Engine(Loopback())
    assert common(keys(engine, **one), keys(engine, **other)) == shared


def test_keys_of_a_request_with_a_salt_end_with_its_tag() -> None:
    assert {key[-8:] for key in keys(salt="tenant")} == {salt_tag("tenant")}


@pytest.mark.parametrize("what", PAIRS)
def test_prompts_that_agree_in_all_that_shapes_kv_share_all_of_it(what: str) -> None:
    for prompt in PAIRS[what][:2]:
        assert common(keys(**prompt), keys(**prompt)) == NUM_BLOCKS


# The same content, whatever vLLM or a client calls it: by the path of the model, by a counter of
# the process, by a client's word, by another version's hash.
@pytest.mark.parametrize("name", ["cd" * 16, "renderer0-mm-1-image-0", "my picture"])
def test_what_an_item_is_called_does_not_matter(name: str) -> None:
    expected = keys(features=[picture(red())])

    assert keys(features=[picture(red(), name=name)]) == expected
    assert keys(features=[picture(red(), name=name, embedded=[True] * PICTURE_TOKENS)]) == expected


def handle() -> dict[str, Any]:
    """What vLLM's shared-memory picture cache has the scheduler see."""
    return {"address": 4096, "monotonic_id": 7, "signature": [1, 2]}


@pytest.mark.parametrize(
    "values",
    [
        None,
        handle(),
        {"pixel_values": object()},
        {"pixel_values": np.array([object()])},
        {"pixel_values": torch.ones(2, device="meta")},
    ],
    ids=["not there", "a handle", "of no known kind", "objects", "on a device"],
)
def test_what_can_not_be_seen_bypasses_and_the_text_before_it_is_shared(values: Any) -> None:
    bypassing = keys(features=[picture(values)])

    assert len(bypassing) == 2
    assert common(bypassing, keys()) == 2
    # Also where another one stands behind it.
    later = picture(red(), start=3 * BLOCK)
    assert len(keys(features=[later, picture(values)])) == 2


def test_the_text_before_what_has_no_name_goes_into_the_store_and_comes_out_of_it() -> None:
    engine = Engine(Loopback())
    unseen = [picture(None)]
    stored = engine.add("stored", PROMPT + BLOCK // 2, features=unseen, says=h.Wanted())
    named(engine, stored)
    assert engine.admit(stored) == 0
    engine.step({"stored": PROMPT + BLOCK // 2})
    _, params = engine.side.finished(stored, engine.blocks(stored))
    engine.step({})
    engine.copied(*engine.take_dumping())
    engine.step({})

    receipt = h.parse(params)
    assert isinstance(receipt, h.Receipt)
    assert (receipt.tokens, receipt.is_whole) == (2 * BLOCK, False)
    assert engine.slots()["ready"] == 2
    for features in (unseen, [picture(blue())], []):
        loading = engine.add(f"{len(engine.requests)}", PROMPT, features=features)
        named(engine, loading)
        assert engine.admit(loading) == 2 * BLOCK


def test_an_item_in_the_first_block_leaves_nothing_to_share() -> None:
    engine = Engine(Loopback())
    assert keys(engine, features=[picture(None, start=BLOCK - 1)]) == []
    assert engine.counted("ucm_unnamed_requests", what="item") == 1


def test_an_identifier_that_stood_for_two_contents_names_nothing_more() -> None:
    """vLLM's encoder cache may bring what it has made of the other one."""
    engine = Engine(Loopback())
    assert len(keys(engine, features=[picture(red(), name="mine")])) == NUM_BLOCKS
    assert len(keys(engine, features=[picture(blue(), name="mine")])) == 2
    assert len(keys(engine, features=[picture(red(), name="mine")])) == 2
    assert len(keys(engine, features=[picture(red(), name="yours")])) == NUM_BLOCKS

    engine.side.reset()  # which empties that cache as well
    assert len(keys(engine, features=[picture(red(), name="mine")])) == NUM_BLOCKS


def test_an_encoder_that_uses_adapters_has_one_content_for_each(tmp_path: Path) -> None:
    """vLLM calls what it made with an adapter by the adapter's name, which may be used again."""
    engine = Engine(Loopback())
    adapters = [lora(make_adapter(tmp_path / f"{n}", seed=n), n) for n in (1, 2)]
    seen = [picture(red(), prefix="an adapter:")]

    assert len(keys(engine, features=seen, lora=adapters[0])) == NUM_BLOCKS
    assert len(keys(engine, features=seen, lora=adapters[1])) == 2
    # Where the encoder does not use them, nothing is called by their names.
    plain = [picture(blue(), name="ef" * 32)]
    assert len(keys(engine, features=plain, lora=adapters[0])) == NUM_BLOCKS
    assert len(keys(engine, features=plain, lora=adapters[1])) == NUM_BLOCKS


def test_a_streamed_prompt_bypasses_the_store() -> None:
    engine = Engine(Loopback())
    assert keys(engine, resumable=True) == []
    assert engine.counted("ucm_unnamed_requests", what="streamed") == 1
