"""A page's file (`blockfile.py`) as bytes in memory, for storage that takes and gives it whole."""

from __future__ import annotations

from xxhash import xxh3_64_intdigest

from ucm.store.blocks.blockfile import (
    HEADER_BYTES,
    BlockId,
    Header,
    bad_block,
    check_identity,
    check_key_id,
    check_seal,
    decode_header,
    encode_header,
)
from ucm.store.blocks.page_key import NO_KEY_ID, PageKey


def block_header(
    block: BlockId, page: memoryview, *, num_tokens: int, page_key: PageKey | None = None
) -> bytes:
    """The header for `page`, whose padding doesn't count."""
    header = memoryview(bytearray(HEADER_BYTES))
    content = page[: block.page_bytes]
    encode_header(block, content, num_tokens=num_tokens, into=header, page_key=page_key)
    return bytes(header)


def block_parts(block: BlockId, header: bytes, page: memoryview) -> list[bytes | memoryview]:
    """The whole file, without a copy of the page. What lies in the padding of `page` is anybody's
    old data, and stays here."""
    padding = bytes(len(page) - block.page_bytes)
    return [header, page[: block.page_bytes], padding]


def check_head(
    head: memoryview, size_bytes: int, expected: BlockId, *, key_id: bytes = NO_KEY_ID
) -> Header:
    """What a file that is so long, and begins so, says of itself. Raises `bad_block`."""
    if size_bytes != expected.file_bytes:
        raise bad_block(f"{size_bytes} bytes long, expected {expected.file_bytes}")
    if len(head) < HEADER_BYTES:
        raise bad_block(f"only {len(head)} bytes came of its header")
    header = decode_header(head[:HEADER_BYTES])
    check_identity(header.block, expected)
    check_key_id(header, key_id)
    return header


def check_sums(header: Header, page: memoryview) -> None:
    """`page` with its padding. Raises `bad_block`."""
    page_bytes, start = header.block.page_bytes, 0
    for checksum in header.checksums:
        end = min(start + header.segment_bytes, page_bytes)
        if xxh3_64_intdigest(page[start:end]) != checksum:
            raise bad_block(f"checksum of bytes [{start}, {end}) of the page differs")
        start = end
    if any(page[page_bytes:]):
        raise bad_block("padding is not zero")


def take_page(
    whole: memoryview, expected: BlockId, page: memoryview, *, page_key: PageKey | None = None
) -> None:
    """Fills `page` from its file: what this returns from has every byte verified, as they lie in
    `page`. Raises `bad_block`."""
    header = check_head(whole, len(whole), expected, key_id=key_id_of(page_key))
    page[:] = whole[HEADER_BYTES:]
    check_sums(header, page)
    check_seal(whole[:HEADER_BYTES], page[: expected.page_bytes], page_key)


def key_id_of(page_key: PageKey | None) -> bytes:
    """What a header says of the key that it is sealed with."""
    return page_key.id if page_key is not None else NO_KEY_ID
