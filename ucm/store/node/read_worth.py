"""How much of a prompt is worth reading from storage, next to computing it.

All is counted in blocks that the client computes meanwhile: a block that need not be computed gains
one, a page that must be read costs so many. Pure: no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable

from ucm.store.node.protocol import ReadCosts


def worth_reading(is_read: Iterable[bool], costs: ReadCosts) -> int:
    """How many leading blocks to take: those with which most is gained, the fewest of these.
    `is_read[i]`: the page of block i must be read, and is not at hand."""
    gain = best = 0.0
    count = 0
    has_read = False
    for i, must_read in enumerate(is_read):
        gain += 1
        if must_read:
            gain -= costs.each if has_read else costs.first + costs.each
            has_read = True
        if gain > best:
            best, count = gain, i + 1
    return count
