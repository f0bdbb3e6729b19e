"""Block files with any damage: the page that was written, or none."""

from __future__ import annotations

import mmap
import os
import random
import struct
from functools import partial

import pytest
from xxhash import xxh3_64_intdigest

from tests.fuzz.inputs import bad_inputs, bounded, bounds, few_and_many
from ucm.store.blocks.blockfile import (
    HEADER_BYTES,
    MAX_SEGMENTS,
    BlockId,
    Scratch,
    decode_header,
    read_block,
    write_block,
)
from ucm.store.blocks.keys import Key
from ucm.store.blocks.page_key import PageKey
from ucm.store.blocks.page_layout import padded_bytes

BLOCK = BlockId(Key(bytes(range(32))), bytes(range(32, 64)), 5000)
PAGE_KEYS = {"unsealed": None, "sealed": PageKey.of(b"secret" * 4)}
CHECKSUM = struct.Struct("<Q")


def blank() -> memoryview:
    return memoryview(mmap.mmap(-1, padded_bytes(BLOCK.page_bytes)))


PAGE = blank()
PAGE[: BLOCK.page_bytes] = random.Random(0).randbytes(BLOCK.page_bytes)


def written(page_key: PageKey | None) -> bytes:
    fd = os.memfd_create("block")
    try:
        write_block(fd, BLOCK, PAGE, num_tokens=128, scratch=Scratch(), page_key=page_key)
        return os.pread(fd, 1 << 20, 0)
    finally:
        os.close(fd)


def vouched_for(data: bytes) -> bytes:
    """With a header checksum that is right: what a broken UCM, or somebody else, may write."""
    end = HEADER_BYTES - CHECKSUM.size
    return data[:end] + CHECKSUM.pack(xxh3_64_intdigest(data[:end])) + data[HEADER_BYTES:]


@few_and_many
def test_any_header_is_an_error_or_says_what_can_be(num_inputs: int) -> None:
    headers = [written(page_key)[:HEADER_BYTES] for page_key in PAGE_KEYS.values()]
    rng = random.Random(1)
    with bounds():
        for data in bad_inputs(headers, num_inputs):
            header = data[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0")
            header = vouched_for(header) if rng.random() < 0.7 else header
            with bounded(header):
                said = decode_header(header)
                assert len(said.checksums) <= MAX_SEGMENTS
                assert 0 < said.block.page_bytes <= said.segment_bytes * len(said.checksums)


@few_and_many
@pytest.mark.parametrize("page_key", PAGE_KEYS.values(), ids=PAGE_KEYS)
def test_a_file_with_any_damage_gives_the_page_that_was_written_or_none(
    num_inputs: int, page_key: PageKey | None
) -> None:
    """Also where the header's own checksum vouches for the damage."""
    whole, page, scratch, rng = written(page_key), blank(), Scratch(), random.Random(2)
    read = partial(read_block, scratch=scratch, chunk_bytes=4096, page_key=page_key)
    fd = os.memfd_create("block")
    num_right = 0
    with bounds():
        for data in bad_inputs([whole], num_inputs):
            if rng.random() < 0.5:
                data = vouched_for(data)
            if rng.random() < 0.8:
                data = data[: len(whole)].ljust(len(whole), b"\0")
            os.ftruncate(fd, 0)
            os.pwrite(fd, data, 0)
            with bounded(data):
                read(fd, BLOCK, page)
                assert page == PAGE
                num_right += 1
    os.close(fd)
    # What says nothing of the page, or was damaged and mended: most are refused.
    assert num_right < num_inputs / 2
