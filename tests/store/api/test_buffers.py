from __future__ import annotations

import array
import ctypes
import mmap

import numpy as np
import pytest

from ucm.store.api.buffers import host_row

SIZES = (5, 3)


class Shard:
    """Memory of a page, as the store's thread sees it: an address."""

    def __init__(self, content: bytes = bytes(sum(SIZES))) -> None:
        self.memory = ctypes.create_string_buffer(content, len(content))
        self.address = ctypes.addressof(self.memory)


def test_a_row_is_packed_into_its_shard_and_back() -> None:
    shard, loaded = Shard(), [bytearray(5), bytearray(3)]

    host_row([b"abcde", b"fgh"], SIZES, writable=False).dump_to(shard.address)
    host_row(loaded, SIZES, writable=True).load_from(shard.address)

    assert shard.memory.raw == b"abcdefgh"
    assert loaded == [b"abcde", b"fgh"]


def test_anything_with_a_buffer_or_an_address_is_memory() -> None:
    mapped = mmap.mmap(-1, 5)
    mapped[:] = b"mappd"
    numbers = np.frombuffer(b"numpy", dtype=np.uint8)
    entries = [
        memoryview(b"xxviewxx")[2:7],
        array.array("B", b"array"),
        numbers,
        mapped,
        numbers.ctypes.data,
        np.uint64(numbers.ctypes.data),
    ]

    found = []
    for entry in entries:
        shard = Shard()
        host_row([entry, b"end"], SIZES, writable=False).dump_to(shard.address)
        found.append(shard.memory.raw)

    words = [b"viewx", b"array", b"numpy", b"mappd", b"numpy", b"numpy"]
    assert found == [word + b"end" for word in words]


def test_a_row_keeps_its_buffers_alive() -> None:
    shard = Shard(b"01234567")
    row = host_row([bytearray(5), np.zeros(3, dtype=np.uint8)], SIZES, writable=True)

    row.load_from(shard.address)

    assert [bytes(memoryview(owner)) for owner in row.owners] == [b"01234", b"567"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("entries", "writable", "words"),
    [
        ([bytearray(5)], True, "a row of 1 entries, a shard has 2 tensors"),
        ([bytearray(5), bytearray(4)], True, "a buffer of 4 bytes for a tensor of 3"),
        ([b"abcde", bytearray(3)], True, "a read-only buffer can't be loaded into"),
        ([0, bytearray(3)], True, "an address is 0"),
        ([np.zeros((5, 2), np.uint8)[:, 0], bytearray(3)], False, "contiguous"),
    ],
)
def test_memory_that_does_not_fit_is_refused(
    entries: list[object], writable: bool, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        host_row(entries, SIZES, writable=writable)
