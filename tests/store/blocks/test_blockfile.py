from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from ucm.errors import TierError
from ucm.store.blocks import blockfile
from ucm.store.blocks.blockfile import HEADER_BYTES, BlockId, Scratch, decode_header, encode_header
from ucm.store.blocks.keys import Key
from ucm.store.blocks.page_layout import padded_bytes

MIB = 1 << 20
KEY = Key(bytes(range(32)))
FINGERPRINT = bytes(range(32, 64))
BLOCK = BlockId(KEY, FINGERPRINT, 5000)


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("block")
    yield fd
    os.close(fd)


def page_for(block: BlockId, *, fill: int = 0) -> memoryview:
    page = memoryview(mmap.mmap(-1, padded_bytes(block.page_bytes)))
    page[:] = bytes((fill + i) % 251 for i in range(251)) * (len(page) // 251) + bytes(
        len(page) % 251
    )
    return page


def write(fd: int, block: BlockId, page: memoryview) -> None:
    blockfile.write_block(fd, block, page, num_tokens=128, scratch=Scratch())


def read(fd: int, block: BlockId, *, chunk_bytes: int = MIB) -> bytes:
    page = page_for(block, fill=100)
    blockfile.read_block(fd, block, page, scratch=Scratch(), chunk_bytes=chunk_bytes)
    return bytes(page)


def check_that_read_fails(fd: int, block: BlockId, match: str) -> None:
    with pytest.raises(TierError, match=match) as raised:
        read(fd, block)
    assert raised.value.reason == "corrupt"


def flip(fd: int, offset: int, *, bit: int = 0) -> None:
    (byte,) = os.pread(fd, 1, offset)
    os.pwrite(fd, bytes([byte ^ (1 << bit)]), offset)


def rewrite_field(fd: int, fmt: str, offset: int, value: object) -> None:
    """Changes a field of the header and makes the header's checksum right again."""
    header = bytearray(os.pread(fd, HEADER_BYTES, 0))
    struct.pack_into(fmt, header, offset, value)
    struct.pack_into("<Q", header, 4088, xxh3_64_intdigest(bytes(header[:4088])))
    os.pwrite(fd, header, 0)


def test_the_header_has_these_bytes() -> None:
    """Golden: the format of files that are already on disks."""
    header = bytearray(HEADER_BYTES)
    page = memoryview(bytes(range(256)) * 20)[:5000]

    encode_header(BLOCK, page, num_tokens=128, into=memoryview(header))

    assert header[:16].hex() == "55434d424c4f434b" + "01000000" + "00100000"
    assert header[16:80] == KEY + FINGERPRINT
    assert header[80:128].hex() == "8813000000000000" + "0000100000000000" + "80000000" + "00" * 28
    assert header[128:136].hex() == "7a8c2ac8a2bd741b"
    assert not any(header[136:4088])
    assert header[4088:].hex() == "253f88dcd061f626"


def test_a_header_says_what_was_encoded() -> None:
    header = bytearray(HEADER_BYTES)
    page = memoryview(bytes(3 * MIB + 5))
    block = BlockId(KEY, FINGERPRINT, len(page))

    encode_header(block, page, num_tokens=64, into=memoryview(header))

    decoded = decode_header(memoryview(header))
    assert decoded.block == block
    assert decoded.num_tokens == 64
    assert decoded.segment_bytes == MIB
    assert decoded.checksums == tuple(
        xxh3_64_intdigest(page[start : start + MIB]) for start in range(0, len(page), MIB)
    )


def test_a_header_buffer_may_be_used_again() -> None:
    """Nothing of a page with many segments is left in the header of one with few."""
    used, new = bytearray(HEADER_BYTES), bytearray(HEADER_BYTES)
    many = BlockId(KEY, FINGERPRINT, 9 * MIB)
    encode_header(many, memoryview(bytes(9 * MIB)), num_tokens=1, into=memoryview(used))

    for header in (used, new):
        encode_header(BLOCK, memoryview(bytes(5000)), num_tokens=1, into=memoryview(header))

    assert used == new


@given(st.integers(1, 1 << 40))
def test_checksums_of_any_page_fit_into_the_header(page_bytes: int) -> None:
    segment_bytes = blockfile.segment_bytes_for(page_bytes)

    assert segment_bytes % MIB == 0
    assert -(-page_bytes // segment_bytes) <= blockfile.MAX_SEGMENTS
    if segment_bytes > MIB:
        assert -(-page_bytes // (segment_bytes - MIB)) > blockfile.MAX_SEGMENTS


@pytest.mark.parametrize("page_bytes", [1, 4095, 4096, 4097, MIB, MIB + 1, 3 * MIB + 4096])
@pytest.mark.parametrize("chunk_bytes", [4096, 300_000, MIB, 8 * MIB])
def test_a_block_is_read_back_bit_for_bit(fd: int, page_bytes: int, chunk_bytes: int) -> None:
    """Whatever the steps of reading are; the padding comes back as zeros."""
    block = BlockId(KEY, FINGERPRINT, page_bytes)
    page = page_for(block)
    write(fd, block, page)

    found = read(fd, block, chunk_bytes=chunk_bytes)

    assert found == bytes(page[:page_bytes]) + bytes(len(page) - page_bytes)
    assert os.fstat(fd).st_size == block.file_bytes
    assert block.file_bytes % 4096 == 0


@settings(deadline=None, max_examples=300)
@given(offset=st.integers(0, HEADER_BYTES + 8192 - 1), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(offset: int, bit: int) -> None:
    """In the header, the page, or the padding: no byte of the file is unprotected."""
    fd = os.memfd_create("block")
    try:
        write(fd, BLOCK, page_for(BLOCK))
        flip(fd, offset, bit=bit)
        with pytest.raises(TierError):
            read(fd, BLOCK)
    finally:
        os.close(fd)


@pytest.mark.parametrize("segment", [0, 1, 2])
def test_a_flipped_bit_is_found_in_every_segment(fd: int, segment: int) -> None:
    block = BlockId(KEY, FINGERPRINT, 2 * MIB + 5000)
    write(fd, block, page_for(block))
    flip(fd, HEADER_BYTES + min((segment + 1) * MIB, block.page_bytes) - 1, bit=7)

    check_that_read_fails(fd, block, rf"bytes \[{segment * MIB}, ")


def test_swapped_segments_are_found(fd: int) -> None:
    block = BlockId(KEY, FINGERPRINT, 2 * MIB)
    page = page_for(block)
    page[MIB:] = bytes(reversed(page[:MIB]))
    write(fd, block, page)

    os.pwrite(fd, page[MIB:], HEADER_BYTES)
    os.pwrite(fd, page[:MIB], HEADER_BYTES + MIB)

    check_that_read_fails(fd, block, "checksum")


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 8192, 12287])
def test_a_truncated_file_is_found(fd: int, size: int) -> None:
    write(fd, BLOCK, page_for(BLOCK))
    os.ftruncate(fd, size)

    check_that_read_fails(fd, BLOCK, f"{size} bytes long, expected 12288")


def test_a_file_that_is_too_long_is_found(fd: int) -> None:
    write(fd, BLOCK, page_for(BLOCK))
    os.ftruncate(fd, BLOCK.file_bytes + 1)

    check_that_read_fails(fd, BLOCK, "12289 bytes long")


@pytest.mark.parametrize("hole_at", [0, HEADER_BYTES])
def test_a_hole_is_found(fd: int, hole_at: int) -> None:
    """What a crash leaves of a file whose length reached the disk and whose bytes did not."""
    write(fd, BLOCK, page_for(BLOCK))
    os.pwrite(fd, bytes(BLOCK.file_bytes - hole_at), hole_at)

    check_that_read_fails(fd, BLOCK, "magic|checksum")


@pytest.mark.parametrize(
    ("expected", "match"),
    [
        (BlockId(Key(bytes(32)), FINGERPRINT, 5000), "holds block 000102"),
        (BlockId(KEY, bytes(32), 5000), "belongs to namespace 202122"),
        (BlockId(KEY, FINGERPRINT, 5001), "page of 5000 bytes, expected 5001"),
    ],
    ids=["key", "namespace", "page_size"],
)
def test_a_good_file_of_another_block_is_refused(fd: int, expected: BlockId, match: str) -> None:
    """The name of a file is a claim; its header must agree."""
    write(fd, BLOCK, page_for(BLOCK))

    check_that_read_fails(fd, expected, match)


@pytest.mark.parametrize(
    ("fmt", "offset", "value", "match"),
    [
        ("8s", 0, b"SAFETENS", "magic"),
        ("<I", 8, 2, "format version 2, this is version 1"),
        ("<I", 12, 8192, "contradicts itself"),
        ("<Q", 80, 0, "contradicts itself"),
        ("<Q", 80, 1 << 60, "contradicts itself"),
        ("<Q", 88, 0, "contradicts itself"),
        ("<Q", 88, 1, "contradicts itself"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused_though_its_checksum_is_right(
    fd: int, fmt: str, offset: int, value: object, match: str
) -> None:
    write(fd, BLOCK, page_for(BLOCK))
    rewrite_field(fd, fmt, offset, value)

    check_that_read_fails(fd, BLOCK, match)


@given(
    st.sampled_from([b"", blockfile.MAGIC, blockfile.MAGIC + b"\1\0\0\0"]), st.binary(max_size=64)
)
def test_random_bytes_are_no_header(start: bytes, rest: bytes) -> None:
    with pytest.raises(TierError):
        decode_header((start + rest).ljust(HEADER_BYTES, b"\0"))


@given(
    sizes=st.lists(st.integers(1, 50), max_size=5),
    num_done=st.integers(0, 260),
)
def test_what_remains_after_a_short_transfer_is_the_rest(sizes: list[int], num_done: int) -> None:
    data = bytes(i % 256 for i in range(sum(sizes)))
    parts, start = [], 0
    for size in sizes:
        parts.append(memoryview(data)[start : start + size])
        start += size

    rest = blockfile._rest(parts, num_done)

    assert b"".join(rest) == data[num_done:]
    assert all(rest)


def test_old_bytes_in_the_padding_of_a_slot_do_not_reach_the_file(fd: int) -> None:
    page = page_for(BLOCK)
    page[BLOCK.page_bytes :] = b"\xff" * (len(page) - BLOCK.page_bytes)

    write(fd, BLOCK, page)

    assert not any(os.pread(fd, 4096, HEADER_BYTES + BLOCK.page_bytes))


def test_storage_that_takes_no_bytes_fails_the_write(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instead of being asked for ever. Linux filesystems say EIO by themselves; a write of nothing
    that is no error is allowed all the same, and no filesystem here can be made to do it."""
    calls: list[int] = []

    def pwritev(fd: int, parts: list[memoryview], offset: int) -> int:
        calls.append(offset)
        assert len(calls) < 100, "asked for ever"
        return 0

    monkeypatch.setattr(os, "pwritev", pwritev)
    with pytest.raises(OSError, match="takes no more"):
        write(fd, BLOCK, page_for(BLOCK))
