"""Records of reclaim with any damage: what they say is what was written, or nothing."""

from __future__ import annotations

import struct

from xxhash import xxh3_64_intdigest

from tests.fuzz.inputs import bad_inputs, bounded, bounds, few_and_many
from ucm.store.tiers.posix.reclaim_record import encode_reclaims, look_up_reclaims

POOLS = [(1, range(100)), (2, range(50, 3000)), (3, [7, 1 << 63]), (4, [8])]
WRITTEN = {(mark, time_ns) for time_ns, marks in POOLS for mark in marks}
BATCHES = [encode_reclaims(time_ns, marks, is_behind_gap=time_ns == 3) for time_ns, marks in POOLS]
SEEDS = [*BATCHES, b"".join(BATCHES), b"".join(reversed(BATCHES)), BATCHES[3] * 500]


def vouched_for(data: bytes) -> bytes:
    """With a checksum that is right."""
    return data + struct.pack("<Q", xxh3_64_intdigest(data))


WORDS = [
    b"UCMr",
    b"UCMr" * 300,
    struct.pack("<4sHBBQ", b"UCMr", 1024, 0, 0, 9),
    struct.pack("<4sHBBQ", b"UCMr", 1024, 0, 0, 9) * 30,
]
# Nobody writes these, and they claim to be right.
ODD = [
    vouched_for(struct.pack("<4sHBBQ", b"UCMr", *rest))
    for rest in ((0, 0, 0, 9), (1, 0, 0, 9), (0, 2, 0, 9), (0, 0, 1, 9), (65535, 1, 0, 1 << 63))
]


@few_and_many
def test_any_record_says_what_was_written_or_less(num_inputs: int) -> None:
    asked = {mark for mark, _ in WRITTEN}
    with bounds():
        for data in bad_inputs(SEEDS, num_inputs, words=[*WORDS, *ODD]):
            with bounded(data):
                found = look_up_reclaims(data, asked)
                assert set(found.times_ns.items()) <= WRITTEN
                assert found.since_ns is not None or not found.times_ns
