"""From a request to keys, and from tokens to the parts of pages that the ranks copy."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")

from ucm.integration.vllm.engine_facts import AdapterDigests
from ucm.integration.vllm.requests import part_of_block, parts_of_tokens, request_keys

BLOCK = 128
FINGERPRINT = b"f" * 32


@dataclass
class Request:
    """What the scheduler side reads of vLLM's request."""

    prompt_token_ids: list[int] | None = field(default_factory=lambda: list(range(300)))
    prompt_embeds: object = None
    resumable: bool = False
    mm_features: list[object] = field(default_factory=list)
    lora_request: object = None
    cache_salt: str | None = None


def image(content: str, start: int = 10, length: int = 20) -> object:
    place = SimpleNamespace(offset=start, length=length)
    return SimpleNamespace(mm_hash=content, identifier=content, mm_position=place)


def keys(request: Request):
    return request_keys(
        request, fingerprint=FINGERPRINT, block_tokens=BLOCK, adapters=AdapterDigests()
    )


def test_only_full_blocks_have_keys():
    assert len(keys(Request())) == 2
    assert keys(Request(prompt_token_ids=[1] * 127)) == []


def test_salt_and_images_change_the_keys():
    image_hash = "ab" * 32
    plain = keys(Request())
    salted = keys(Request(cache_salt="tenant"))
    pictured = keys(Request(mm_features=[image(image_hash)]))

    assert len({plain[0], salted[0], pictured[0]}) == 3
    assert pictured == keys(Request(mm_features=[image(image_hash)]))
    assert pictured != keys(Request(mm_features=[image("cd" * 32)]))


@pytest.mark.parametrize(
    "request_",
    [
        Request(prompt_token_ids=None),
        Request(prompt_embeds=object()),
        Request(resumable=True),
        Request(mm_features=[image("my-own-name-for-it")]),
    ],
    ids=["no tokens", "embeddings", "streamed prompt", "image named by the client"],
)
def test_a_request_whose_content_cant_be_named_bypasses_the_store(request_: Request):
    assert keys(request_) == []


def test_an_unreadable_adapter_bypasses_the_store(tmp_path):
    lora = SimpleNamespace(lora_int_id=1, lora_path=str(tmp_path / "gone"), load_inplace=False)

    assert keys(Request(lora_request=lora)) == []


@given(
    unit=st.sampled_from([16, 32, 64, 128]),
    start_units=st.integers(0, 40),
    num_tokens=st.integers(1, 1000),
)
def test_parts_cover_exactly_the_device_blocks_of_the_tokens(unit, start_units, num_tokens):
    start, end = start_units * unit, start_units * unit + num_tokens
    device_blocks = [1000 + i for i in range(-(-end // unit))]
    slots = {block: block * 4096 for block in range(-(-end // BLOCK))}

    parts = parts_of_tokens(start, end, slots, device_blocks, block_tokens=BLOCK, unit=unit)

    covered = [
        (part.slot_offset // 4096 * BLOCK + part.first_token + i * unit, block)
        for part in parts
        for i, block in enumerate(part.block_ids)
    ]
    assert covered == [(i * unit, 1000 + i) for i in range(start // unit, -(-end // unit))]
    for part in parts:
        assert part.first_token + len(part.block_ids) * unit <= BLOCK


@given(unit=st.sampled_from([16, 32, 64, 128]), block=st.integers(0, 20))
def test_a_block_is_copied_from_all_of_its_device_blocks(unit, block):
    per_block = BLOCK // unit
    device_blocks = list(range(100, 100 + 21 * per_block))

    part = part_of_block(
        block, 4096, device_blocks, num_tokens=BLOCK, block_tokens=BLOCK, unit=unit
    )

    assert part.block_ids == tuple(range(100 + block * per_block, 100 + (block + 1) * per_block))
    assert (part.slot_offset, part.first_token) == (4096, 0)
