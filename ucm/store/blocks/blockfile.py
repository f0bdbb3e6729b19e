"""The bytes on disk: one file holds one page.

    offset           bytes
         0             128   fixed fields, see `_FIXED`
       128         8 x 495   XXH3 of each segment of the page; unused ones are zero
      4088               8   XXH3 of the header's first 4088 bytes
      4096      page_bytes   the page
         .               .   zeros up to a multiple of 4096

    fixed:   0  magic "UCMBLOCK"    8  version u32    12  header_bytes u32
            16  key (32)           48  namespace fingerprint (32)
            80  page_bytes u64     88  segment_bytes u64
            96  num_tokens u32    100  id of the page key (8), zeros without one
           108  zeros

    sealed:  with a page key the checksums end at 4056, and 32 bytes of seal follow (`page_key.py`):
             over the header's first 4056 bytes and the page

Numbers are little-endian. The page is cut into segments [i * segment_bytes, (i+1) * segment_bytes),
the last one shorter. A segment has 1 MiB, or as many MiB as it takes for all checksums to fit.
Everything is a multiple of 4096, so files can be read and written with O_DIRECT.

A reader knows beforehand which key, namespace and page size it expects. `read_block` succeeds only
if the file says exactly that and every byte of it is covered: the page by its checksums, the header
by its own, the padding by being zero, the length by being exact. There is no partial success.

The constants here have reached disks. A change of any of them is a new VERSION, and VERSION is
part of the namespace: files of two versions never share a directory.
"""

from __future__ import annotations

import errno
import hmac
import mmap
import os
import struct
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from ucm.errors import TierError
from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key
from ucm.store.blocks.page_key import NO_KEY_ID, SEAL_BYTES, PageKey
from ucm.store.blocks.page_layout import PAGE_ALIGNMENT_BYTES, padded_bytes

MAGIC = b"UCMBLOCK"
VERSION = 1
HEADER_BYTES = 4096
MIN_SEGMENT_BYTES = 1 << 20

_FIXED = struct.Struct("<8sII32s32sQQI8s20x")
_HEADER_CHECKSUM = struct.Struct("<Q")
_HEADER_CHECKSUM_OFFSET = HEADER_BYTES - _HEADER_CHECKSUM.size
MAX_SEGMENTS = (_HEADER_CHECKSUM_OFFSET - _FIXED.size) // 8
_SEAL_OFFSET = _HEADER_CHECKSUM_OFFSET - SEAL_BYTES
MAX_SEALED_SEGMENTS = (_SEAL_OFFSET - _FIXED.size) // 8
_UNUSED = bytes(_HEADER_CHECKSUM_OFFSET - _FIXED.size)
_ZEROS = bytes(PAGE_ALIGNMENT_BYTES)


@dataclass(frozen=True)
class BlockId:
    """What a reader expects a file to be, and a writer makes it."""

    key: Key
    fingerprint: bytes
    page_bytes: int

    @property
    def file_bytes(self) -> int:
        return HEADER_BYTES + padded_bytes(self.page_bytes)


@dataclass(frozen=True)
class Header:
    """The header as it is in a file. `checksums[i]` is the XXH3 of segment i; `key_id` that of the
    page key it is sealed with."""

    block: BlockId
    num_tokens: int
    segment_bytes: int
    checksums: tuple[int, ...]
    key_id: bytes


class Scratch:
    """A thread's buffer for one header and one last part of a page. Mapped, hence aligned as
    O_DIRECT needs it, and kept, because mapping it costs as much as reading a header."""

    def __init__(self) -> None:
        memory = memoryview(mmap.mmap(-1, HEADER_BYTES + PAGE_ALIGNMENT_BYTES))
        self.header = memory[:HEADER_BYTES]
        self.last_part = memory[HEADER_BYTES:]


def bad_block(check: str) -> TierError:
    """The file is not the block that was asked for; `check` is what failed. Without the file's
    name, which only the caller knows."""
    return TierError(check, reason=Outcome.CORRUPT)


def segment_bytes_for(page_bytes: int, *, is_sealed: bool = False) -> int:
    """Smallest whole number of MiB with which the checksums of a page fit into the header."""
    most_bytes = (MAX_SEALED_SEGMENTS if is_sealed else MAX_SEGMENTS) * MIN_SEGMENT_BYTES
    return MIN_SEGMENT_BYTES * -(-page_bytes // most_bytes)


def encode_header(
    block: BlockId,
    page: memoryview,
    *,
    num_tokens: int,
    into: memoryview,
    page_key: PageKey | None = None,
) -> None:
    """Writes the header for `page` (without its padding) to `into`."""
    assert len(page) == block.page_bytes > 0
    segment_bytes = segment_bytes_for(block.page_bytes, is_sealed=page_key is not None)
    _FIXED.pack_into(
        into,
        0,
        MAGIC,
        VERSION,
        HEADER_BYTES,
        block.key,
        block.fingerprint,
        block.page_bytes,
        segment_bytes,
        num_tokens,
        page_key.id if page_key is not None else NO_KEY_ID,
    )
    checksums = [
        xxh3_64_intdigest(page[start : start + segment_bytes])
        for start in range(0, block.page_bytes, segment_bytes)
    ]
    into[_FIXED.size : _HEADER_CHECKSUM_OFFSET] = _UNUSED
    struct.pack_into(f"<{len(checksums)}Q", into, _FIXED.size, *checksums)
    if page_key is not None:
        into[_SEAL_OFFSET:_HEADER_CHECKSUM_OFFSET] = page_key.seal(into[:_SEAL_OFFSET], page)
    header_checksum = xxh3_64_intdigest(into[:_HEADER_CHECKSUM_OFFSET])
    _HEADER_CHECKSUM.pack_into(into, _HEADER_CHECKSUM_OFFSET, header_checksum)


def format_version(header: memoryview | bytes) -> int | None:
    """What version of this format a file says it has; None if it doesn't begin as a block file."""
    magic, version, *_ = _FIXED.unpack_from(header)
    return int(version) if magic == MAGIC else None


def decode_header(header: memoryview | bytes) -> Header:
    """The header of any block file, whichever block it is. Raises `bad_block`."""
    assert len(header) == HEADER_BYTES
    (
        magic,
        version,
        header_bytes,
        key,
        fingerprint,
        page_bytes,
        segment_bytes,
        num_tokens,
        key_id,
    ) = _FIXED.unpack_from(header)
    if magic != MAGIC:
        raise bad_block("not a block file (wrong magic)")
    if version != VERSION:
        raise bad_block(f"format version {version}, this is version {VERSION}")
    (header_checksum,) = _HEADER_CHECKSUM.unpack_from(header, _HEADER_CHECKSUM_OFFSET)
    if header_checksum != xxh3_64_intdigest(header[:_HEADER_CHECKSUM_OFFSET]):
        raise bad_block("header checksum differs")
    # A header that its checksum vouches for and that still says this was written by a broken UCM.
    if header_bytes != HEADER_BYTES or not 0 < page_bytes <= segment_bytes * MAX_SEGMENTS:
        raise bad_block("header contradicts itself")
    num_segments = -(-page_bytes // segment_bytes)
    checksums = struct.unpack_from(f"<{num_segments}Q", header, _FIXED.size)
    block = BlockId(Key(key), fingerprint, page_bytes)
    return Header(block, num_tokens, segment_bytes, checksums, key_id)


def check_identity(found: BlockId, expected: BlockId) -> None:
    """Raises `bad_block` with the field that differs."""
    if found == expected:
        return
    if found.fingerprint != expected.fingerprint:
        raise bad_block(f"belongs to namespace {found.fingerprint.hex()}")
    if found.key != expected.key:
        raise bad_block(f"holds block {found.key.hex()}")
    raise bad_block(f"page of {found.page_bytes} bytes, expected {expected.page_bytes}")


def check_key_id(header: Header, wanted: bytes) -> None:
    """Raises `bad_block`. What the file says of itself is proven by `check_seal`."""
    if header.key_id != wanted:
        told = "not sealed" if header.key_id == NO_KEY_ID else f"sealed by {header.key_id.hex()}"
        raise bad_block(f"{told}, expected the page key {wanted.hex()}")


def check_seal(header: memoryview, page: memoryview, page_key: PageKey | None) -> None:
    """Raises `bad_block`. `page` is without its padding."""
    if page_key is None:
        return
    seal = page_key.seal(header[:_SEAL_OFFSET], page)
    if not hmac.compare_digest(seal, bytes(header[_SEAL_OFFSET:_HEADER_CHECKSUM_OFFSET])):
        raise bad_block("the seal differs: it was not written with this node's page key")


def check_header(
    fd: int, expected: BlockId, *, scratch: Scratch, page_key: PageKey | None = None
) -> Header:
    """Size, header and identity of a file, without its page. Raises `bad_block` or OSError."""
    size_bytes = os.fstat(fd).st_size
    if size_bytes != expected.file_bytes:
        raise bad_block(f"{size_bytes} bytes long, expected {expected.file_bytes}")
    _read_exactly(fd, [scratch.header], offset=0)
    header = decode_header(scratch.header)
    check_identity(header.block, expected)
    check_key_id(header, page_key.id if page_key is not None else NO_KEY_ID)
    return header


def read_block(
    fd: int,
    expected: BlockId,
    page: memoryview,
    *,
    scratch: Scratch,
    chunk_bytes: int,
    page_key: PageKey | None = None,
    size_bytes: int | None = None,
) -> None:
    """Reads the whole file: what it returns from has every byte verified in this very read.
    `size_bytes` is the file's, if the caller knows it from this descriptor. Raises `bad_block` or
    OSError."""
    read_sums(
        fd,
        expected,
        page,
        scratch=scratch,
        chunk_bytes=chunk_bytes,
        key_id=page_key.id if page_key is not None else NO_KEY_ID,
        size_bytes=size_bytes,
    )
    check_seal(scratch.header, page[: expected.page_bytes], page_key)


def read_sums(
    fd: int,
    expected: BlockId,
    page: memoryview,
    *,
    scratch: Scratch,
    chunk_bytes: int,
    key_id: bytes,
    size_bytes: int | None = None,
) -> Header:
    """`read_block` of a file that is sealed by the page key of this id, for whoever has not got the
    secret: all but the seal.

    Verification follows the read in steps of about `chunk_bytes`, so that a segment is summed
    while it is still in the CPU's cache: 16.2 GB/s instead of 13.4 when summing after reading all
    of a 7.3 MB page (two cores, page cache warm; reading alone 18.2).
    """
    assert len(page) == padded_bytes(expected.page_bytes)
    if size_bytes is None:
        size_bytes = os.fstat(fd).st_size
    if size_bytes != expected.file_bytes:
        raise bad_block(f"{size_bytes} bytes long, expected {expected.file_bytes}")
    filled = min(chunk_bytes, len(page))
    _read_exactly(fd, [scratch.header, page[:filled]], offset=0)
    header = decode_header(scratch.header)
    check_identity(header.block, expected)
    check_key_id(header, key_id)

    verified = 0
    for checksum in header.checksums:
        end = min(verified + header.segment_bytes, expected.page_bytes)
        while filled < end:
            start, filled = filled, min(filled + chunk_bytes, len(page))
            _read_exactly(fd, [page[start:filled]], offset=HEADER_BYTES + start)
        if xxh3_64_intdigest(page[verified:end]) != checksum:
            raise bad_block(f"checksum of bytes [{verified}, {end}) of the page differs")
        verified = end
    padding = page[expected.page_bytes :]
    if padding != _ZEROS[: len(padding)]:
        raise bad_block("padding is not zero")
    return header


def write_block(
    fd: int,
    block: BlockId,
    page: memoryview,
    *,
    num_tokens: int,
    scratch: Scratch,
    page_key: PageKey | None = None,
) -> None:
    """Writes the whole file to an empty one. Raises OSError.

    Nothing is preallocated: fallocate made 7.3 MB files 1.5 times as fast on ext4 (5.1 to 8.0 GB/s
    into the page cache, 256 KiB files no faster), but where the filesystem has none, as NFS before
    4.2, glibc emulates it with a write per block.
    """
    assert len(page) == padded_bytes(block.page_bytes)
    content = page[: block.page_bytes]
    encode_header(block, content, num_tokens=num_tokens, into=scratch.header, page_key=page_key)
    parts = [scratch.header, page]
    if len(page) != block.page_bytes:
        # What lies in the padding of a slot is anybody's old data; it must not reach the disk.
        whole = len(page) - PAGE_ALIGNMENT_BYTES
        rest = block.page_bytes - whole
        scratch.last_part[:rest] = page[whole : block.page_bytes]
        scratch.last_part[rest:] = _ZEROS[rest:]
        parts = [scratch.header, page[:whole], scratch.last_part]
    _write_all(fd, parts)


def _read_exactly(fd: int, parts: list[memoryview], *, offset: int) -> None:
    """preadv until all parts are full: one call nearly always, more when a signal or the
    filesystem cuts it short. Raises `bad_block` at the end of the file."""
    while parts:
        num_read = os.preadv(fd, parts, offset)
        if num_read == 0:
            raise bad_block("ends early: it was shortened while being read")
        offset += num_read
        parts = _rest(parts, num_read)


def _write_all(fd: int, parts: list[memoryview]) -> None:
    offset = 0
    while parts:
        num_written = os.pwritev(fd, parts, offset)
        if num_written == 0:
            raise OSError(errno.EIO, "storage takes no more bytes, and doesn't say why")
        offset += num_written
        parts = _rest(parts, num_written)


def _rest(parts: list[memoryview], num_done: int) -> list[memoryview]:
    """What remains of `parts` after their first `num_done` bytes."""
    for i, part in enumerate(parts):
        if num_done < len(part):
            return [part[num_done:], *parts[i + 1 :]]
        num_done -= len(part)
    return []
