"""What a backend remembers of what was reclaimed there, as bytes. Pure.

The record is a row of batches, one or more for each pool of deletions, little-endian:

      0  4  magic                       b"UCMr"
      4  2  number of marks
      6  1  1: what went before this batch is not all on record
      7  1  0
      8  8  time, nanoseconds since 1970
     16  .  marks, 8 bytes each
      .  8  XXH3 of all before it

A mark is the first 8 bytes of a page's key, mixed with the id of the page key that it is sealed
with. A batch whose bytes are wrong (its writer was killed, its disk was full) is passed over, and
the next one is then one behind a gap.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from xxhash import xxh3_64_intdigest

from ucm.store.blocks.keys import Key

_MAGIC: Final = b"UCMr"
_HEAD: Final = struct.Struct("<4sHBBQ")
_SUM: Final = struct.Struct("<Q")
_MARK_BYTES: Final = 8
# So that what looks like the beginning of a batch costs little to be found wrong.
_MAX_MARKS: Final = 1024


@dataclass(frozen=True)
class ReclaimedBatch:
    """Pages that went at `time_ns` since 1970. `is_behind_gap`: of what went before, something is
    not on record."""

    time_ns: int
    marks: tuple[int, ...]
    is_behind_gap: bool = False


@dataclass(frozen=True)
class ReclaimsOnRecord:
    """Of the marks that were asked for, when each went last. All that went since `since_ns` is on
    record; None: nothing is."""

    since_ns: int | None
    times_ns: Mapping[int, int]


def mark_of(key: Key, key_id: bytes) -> int:
    """`key_id` is that of the page key, empty without one."""
    return int.from_bytes(key[:_MARK_BYTES], "little") ^ int.from_bytes(key_id, "little")


def encode_reclaims(time_ns: int, marks: Sequence[int], *, is_behind_gap: bool) -> bytes:
    """Batches that say so."""
    parts: list[bytes] = []
    for start in range(0, len(marks), _MAX_MARKS):
        some = marks[start : start + _MAX_MARKS]
        head = _HEAD.pack(_MAGIC, len(some), is_behind_gap and not parts, 0, time_ns)
        batch = head + struct.pack(f"<{len(some)}Q", *some)
        parts.append(batch + _SUM.pack(xxh3_64_intdigest(batch)))
    return b"".join(parts)


def decode_reclaims(content: bytes) -> Iterator[ReclaimedBatch]:
    """The batches in any bytes, in their order."""
    start, is_behind_gap = 0, False
    while start < len(content):
        batch = _batch_at(content, start)
        if batch is None:
            is_behind_gap = True
            start = content.find(_MAGIC, start + 1)
            if start < 0:
                return
            continue
        yield ReclaimedBatch(batch.time_ns, batch.marks, batch.is_behind_gap or is_behind_gap)
        is_behind_gap = False
        start += _num_bytes(len(batch.marks))


def look_up_reclaims(content: bytes, marks: Collection[int]) -> ReclaimsOnRecord:
    """`content`: the older generation, and behind it the newer one."""
    since_ns: int | None = None
    times_ns: dict[int, int] = {}
    asked = frozenset(marks)
    for batch in decode_reclaims(content):
        if since_ns is None or batch.is_behind_gap:
            since_ns = batch.time_ns
        times_ns.update(dict.fromkeys(asked.intersection(batch.marks), batch.time_ns))
    return ReclaimsOnRecord(since_ns, times_ns)


def _batch_at(content: bytes, start: int) -> ReclaimedBatch | None:
    if len(content) - start < _num_bytes(0):
        return None
    magic, num_marks, is_behind_gap, zero, time_ns = _HEAD.unpack_from(content, start)
    end = start + _num_bytes(num_marks)
    if magic != _MAGIC or zero or is_behind_gap > 1 or num_marks > _MAX_MARKS or end > len(content):
        return None
    sum_start = end - _SUM.size
    (expected,) = _SUM.unpack_from(content, sum_start)
    if xxh3_64_intdigest(memoryview(content)[start:sum_start]) != expected:
        return None
    marks = struct.unpack_from(f"<{num_marks}Q", content, start + _HEAD.size)
    return ReclaimedBatch(time_ns, marks, bool(is_behind_gap))


def _num_bytes(num_marks: int) -> int:
    return _HEAD.size + num_marks * _MARK_BYTES + _SUM.size
