"""Whatever lies under the name of a block: right, or absent and out of the way."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from xxhash import xxh3_64_intdigest

from tests.store.tiers.posix import tree
from tests.store.tiers.tier_contract import (
    LARGE,
    content_of,
    dump,
    empty_page,
    load,
    make_key,
    make_namespace,
    make_page,
    run_together,
)
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.tier import PosixTier
from ucm.store.tiers.tier import PageRead, ReadStatus, TierNamespace

KEY = make_key(1)
CONTENT = content_of(LARGE, make_page(LARGE, "a"))
OTHER = make_namespace("other", page_bytes=LARGE.page_bytes)


def block_of(store: Path, namespace: TierNamespace = LARGE) -> Path:
    return Path(paths.block_path(str(store), namespace.fingerprint, KEY))


def flipped_bit(data: bytes) -> bytes:
    damaged = bytearray(data)
    damaged[4096 + (1 << 20) + 77] ^= 4
    return bytes(damaged)


def flipped_header_bit(data: bytes) -> bytes:
    return data[:96] + bytes([data[96] ^ 1]) + data[97:]


def lost_middle(data: bytes) -> bytes:
    return data[: 1 << 20] + bytes(8192) + data[(1 << 20) + 8192 :]


def foreign_version(data: bytes) -> bytes:
    header = bytearray(data[:4096])
    struct.pack_into("<I", header, 8, 7)
    struct.pack_into("<Q", header, 4088, xxh3_64_intdigest(bytes(header[:4088])))
    return bytes(header) + data[4096:]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped bit": flipped_bit,
    "flipped bit in the header": flipped_header_bit,
    "lost middle": lost_middle,
    "truncated": lambda data: data[: len(data) // 2],
    "truncated by one byte": lambda data: data[:-1],
    "only the header": lambda data: data[:4096],
    "empty": lambda data: b"",
    "too long": lambda data: data + bytes(4096),
    "zeros": lambda data: bytes(len(data)),
    "of another program": lambda data: b"{}".ljust(len(data)),
    "foreign version": foreign_version,
}
ALL_DAMAGES = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
BOTH_IO = pytest.mark.parametrize("direct_io", [False, True], ids=["buffered", "direct"])


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with one good block."""
    dump(PosixTier([str(tmp_path)]), LARGE, KEY, make_page(LARGE, "a"))
    return tmp_path


def in_quarantine(store: Path) -> list[Path]:
    return [path for path in (store / paths.QUARANTINE).rglob("*") if path.is_file()]


@BOTH_IO
@ALL_DAMAGES
def test_a_damaged_file_is_corrupt_once_then_absent_then_replaced(
    store: Path, damage: Callable[[bytes], bytes], direct_io: bool
) -> None:
    damaged = damage(block_of(store).read_bytes())
    block_of(store).write_bytes(damaged)
    tier = PosixTier([str(store)], direct_io=direct_io)

    read = tier.read(LARGE, KEY, empty_page(LARGE))
    assert read.status is ReadStatus.CORRUPT
    (aside,) = in_quarantine(store)
    assert read.detail.startswith(f"{block_of(store)}: ")
    assert read.detail.endswith(f"; moved to {aside}")
    assert aside.read_bytes() == damaged
    named = tree.quarantined_block_of(str(aside.relative_to(store)))
    assert named == tree.BlockName(LARGE.fingerprint, KEY)

    assert load(tier, LARGE, KEY) is ReadStatus.ABSENT
    assert tier.contains(LARGE, [KEY]) == 0
    assert dump(tier, LARGE, KEY, make_page(LARGE, "a"))
    assert load(tier, LARGE, KEY) == CONTENT
    assert in_quarantine(store) == [aside]


def test_a_good_file_of_another_namespace_under_the_right_name_is_corrupt(store: Path) -> None:
    """Someone renamed a directory to bring over the blocks of another model."""
    tier = PosixTier([str(store)])
    dump(tier, OTHER, KEY, make_page(OTHER, "b"))
    os.replace(block_of(store, OTHER), block_of(store))

    read = tier.read(LARGE, KEY, empty_page(LARGE))

    assert read.status is ReadStatus.CORRUPT
    assert f"belongs to namespace {OTHER.fingerprint.hex()}" in read.detail
    assert len(in_quarantine(store)) == 1


def test_a_good_file_of_another_block_under_the_right_name_is_corrupt(store: Path) -> None:
    tier = PosixTier([str(store)])
    dump(tier, LARGE, make_key(2), make_page(LARGE, "b"))
    other = Path(paths.block_path(str(store), LARGE.fingerprint, make_key(2)))
    os.replace(other, block_of(store))

    read = tier.read(LARGE, KEY, empty_page(LARGE))

    assert read.status is ReadStatus.CORRUPT
    assert f"holds block {make_key(2).hex()}" in read.detail


@pytest.mark.parametrize("damage", [DAMAGES["empty"], DAMAGES["truncated"]])
def test_a_dump_replaces_a_file_of_the_wrong_length(
    store: Path, damage: Callable[[bytes], bytes]
) -> None:
    """A prefill instance may never read: it must not take half a file for the block."""
    block_of(store).write_bytes(damage(block_of(store).read_bytes()))
    tier = PosixTier([str(store)])

    assert dump(tier, LARGE, KEY, make_page(LARGE, "a"))

    assert load(tier, LARGE, KEY) == CONTENT


def test_many_readers_of_one_damaged_file_move_it_once(store: Path) -> None:
    block_of(store).write_bytes(flipped_bit(block_of(store).read_bytes()))
    start = threading.Barrier(8)
    reads: list[PageRead] = []

    def read() -> None:
        tier, page = PosixTier([str(store)]), empty_page(LARGE)
        start.wait()
        reads.append(tier.read(LARGE, KEY, page))

    run_together(*[read] * 8)

    assert {read.status for read in reads} <= {ReadStatus.CORRUPT, ReadStatus.ABSENT}
    assert len(in_quarantine(store)) == 1


def test_readers_while_a_good_file_replaces_a_damaged_one_get_right_or_nothing(
    store: Path,
) -> None:
    """A file that is damaged, and at once another that is good, by rename as writers do."""
    good = block_of(store).read_bytes()
    temp = store / "replacement"

    def spoil() -> None:
        for content in (flipped_bit(good), good):
            temp.write_bytes(content)
            os.replace(temp, block_of(store))

    check_readers_against(store, spoil)


def test_a_file_that_shrinks_while_it_is_read_is_never_a_hit(store: Path) -> None:
    """No reader is served, or stuck on, the bytes that are no longer there."""
    good = block_of(store).read_bytes()

    def shrink() -> None:
        block_of(store).write_bytes(good)
        try:
            os.truncate(block_of(store), len(good) - 4096)
        except FileNotFoundError:
            pass  # a reader has just moved it aside

    check_readers_against(store, shrink)


def check_readers_against(store: Path, spoil: Callable[[], None]) -> None:
    """Reads from two threads, while a third one repeats `spoil`."""
    num_reading = 2
    statuses: set[ReadStatus] = set()

    def read() -> None:
        nonlocal num_reading
        tier, page = PosixTier([str(store)]), empty_page(LARGE)
        try:
            for _ in range(100):
                result = tier.read(LARGE, KEY, page)
                statuses.add(result.status)
                if result.status is ReadStatus.HIT:
                    assert content_of(LARGE, page) == CONTENT
        finally:
            num_reading -= 1

    def keep_spoiling() -> None:
        while num_reading:
            spoil()

    run_together(keep_spoiling, read, read)

    assert statuses <= {ReadStatus.HIT, ReadStatus.CORRUPT, ReadStatus.ABSENT}
