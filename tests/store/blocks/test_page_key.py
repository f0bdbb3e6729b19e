"""Pages that are sealed with a secret can't be forged by who can write into the store."""

from __future__ import annotations

import hmac
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from ucm.errors import ConfigError, TierError
from ucm.store.blocks import blockfile
from ucm.store.blocks.blockfile import HEADER_BYTES, BlockId, Scratch, encode_header
from ucm.store.blocks.keys import Key
from ucm.store.blocks.page_key import PageKey, load_page_key
from ucm.store.blocks.page_layout import padded_bytes

BLOCK = BlockId(Key(bytes(range(32))), bytes(range(32, 64)), 5000)
MINE, OTHER = PageKey.of(b"a secret of some length"), PageKey.of(b"another secret, as long")


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("block")
    yield fd
    os.close(fd)


def page(fill: int = 7) -> memoryview:
    page = memoryview(mmap.mmap(-1, padded_bytes(BLOCK.page_bytes)))
    page[: BLOCK.page_bytes] = bytes([fill]) * BLOCK.page_bytes
    return page


def write(fd: int, page_key: PageKey | None) -> None:
    os.truncate(fd, 0)
    blockfile.write_block(fd, BLOCK, page(), num_tokens=128, scratch=Scratch(), page_key=page_key)


def read(fd: int, page_key: PageKey | None) -> bytes:
    into = page(0)
    blockfile.read_block(fd, BLOCK, into, scratch=Scratch(), chunk_bytes=1 << 20, page_key=page_key)
    return bytes(into[: BLOCK.page_bytes])


def resum(fd: int) -> None:
    """Makes every checksum right, as whoever forges a page does."""
    header = bytearray(os.pread(fd, HEADER_BYTES, 0))
    content = os.pread(fd, BLOCK.page_bytes, HEADER_BYTES)
    struct.pack_into("<Q", header, 128, xxh3_64_intdigest(content))
    struct.pack_into("<Q", header, 4088, xxh3_64_intdigest(bytes(header[:4088])))
    os.pwrite(fd, header, 0)


def test_the_seal_is_an_hmac_of_header_and_page() -> None:
    """Golden: the format of files that are already on disks."""
    header = bytearray(HEADER_BYTES)
    content = page()[: BLOCK.page_bytes]

    encode_header(BLOCK, content, num_tokens=128, into=memoryview(header), page_key=MINE)

    secret = b"a secret of some length"
    assert header[100:108] == sha256(b"ucm-page-key-id\0" + secret).digest()[:8] == MINE.id
    assert header[4056:4088] == hmac.digest(secret, bytes(header[:4056]) + content, "sha256")
    assert sha256(header).hexdigest()[:16] == "144d17f803bc2527"


def test_who_has_the_key_reads_what_was_sealed_with_it(fd: int) -> None:
    write(fd, MINE)
    assert read(fd, MINE) == bytes([7]) * BLOCK.page_bytes


@pytest.mark.parametrize(
    ("sealed_with", "read_with"),
    [(MINE, OTHER), (MINE, None), (None, MINE)],
    ids=["another key", "no key", "not sealed"],
)
def test_nobody_else_does(fd: int, sealed_with: PageKey | None, read_with: PageKey | None) -> None:
    write(fd, sealed_with)
    with pytest.raises(TierError, match="seal") as raised:
        read(fd, read_with)
    assert raised.value.reason == "corrupt"


@given(offset=st.integers(0, HEADER_BYTES + BLOCK.page_bytes - 1), bit=st.integers(0, 7))
def test_a_page_that_was_changed_and_summed_again_is_not_taken(offset: int, bit: int) -> None:
    """Whichever bit was changed, of the content or of what the header says of it."""
    fd = os.memfd_create("block")
    try:
        write(fd, MINE)
        (byte,) = os.pread(fd, 1, offset)
        os.pwrite(fd, bytes([byte ^ (1 << bit)]), offset)
        resum(fd)
        before = os.pread(fd, HEADER_BYTES, 0)
        if 128 <= offset < 136 or (offset >= 4088 and offset < HEADER_BYTES):
            return  # a checksum, which was made right again
        with pytest.raises(TierError):
            read(fd, MINE)
        assert os.pread(fd, HEADER_BYTES, 0) == before
    finally:
        os.close(fd)


@pytest.mark.parametrize("segments", [1, 490, 491, 492, 495, 496])
def test_the_seal_has_room_beside_the_checksums_of_pages_of_any_size(segments: int) -> None:
    size = blockfile.segment_bytes_for(segments << 20, is_sealed=True)
    assert -(-(segments << 20) // size) <= blockfile.MAX_SEALED_SEGMENTS
    assert 128 + 8 * blockfile.MAX_SEALED_SEGMENTS <= 4056


def key_file(folder: Path, content: bytes, mode: int = 0o600) -> str:
    path = folder / "key"
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


def test_a_secret_is_read_from_its_file_without_the_end_of_the_line(tmp_path: Path) -> None:
    assert load_page_key(key_file(tmp_path, b"a secret of some length\n")) == MINE
    assert "secret of" not in repr(MINE)


@pytest.mark.parametrize(
    ("content", "mode", "problem"),
    [
        (b"short", 0o600, "expected 16 to 4096 bytes"),
        (bytes(5000), 0o600, "expected 16 to 4096 bytes"),
        (b"a secret of some length", 0o644, "others may read or change it"),
        (b"a secret of some length", 0o660, "others may read or change it"),
    ],
)
def test_a_secret_that_is_none_stops_the_start(
    tmp_path: Path, content: bytes, mode: int, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_page_key(key_file(tmp_path, content, mode))


def test_a_secret_that_is_missing_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"page_key_file: .*can't be read"):
        load_page_key(str(tmp_path / "missing"))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_no_secret_and_takes_nobody(
    tmp_path: Path, make: Callable[[str], None]
) -> None:
    make(str(tmp_path / "key"))
    with pytest.raises(ConfigError, match=r"page_key_file: .*/key: is no file"):
        load_page_key(str(tmp_path / "key"))
