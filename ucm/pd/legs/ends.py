"""How far conversations of token ids are stored, by what decode has said beside its answers.

What stands behind a prompt of ids that begins with all of an earlier one is, nearly always, what
was answered to that. Nobody but decode knows how much of it is stored, and it says so. Where the
guess is wrong decode computes more than it should, and nothing else is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from xxhash import xxh3_128_digest

from ucm.pd.legs import bodies


@dataclass(frozen=True)
class Mark:
    """The beginning of a prompt of ids up to the end of a whole part: its digest, how many ids that
    has, and the part behind it."""

    digest: bytes
    num_ids: int
    next_ids: Sequence[int]


@dataclass(frozen=True)
class _End:
    """Of an earlier prompt: `num_ids` behind a mark, with this digest. Of it and of its answer
    `stored_tokens` are stored."""

    until_s: float
    num_ids: int
    digest: bytes
    stored_tokens: int


class Ends:
    """The latest `max_ends`. Owned by the event loop's thread."""

    def __init__(self, max_ends: int) -> None:
        self._max_ends = max_ends
        # Behind each mark the latest one; those that were noted last are at the end.
        self._ends: dict[bytes, _End] = {}

    def __len__(self) -> int:
        return len(self._ends)

    def note(self, marks: Sequence[Mark], stored_tokens: int, *, until_s: float) -> None:
        """Of a prompt, longest first, how much is stored with its answer."""
        if not marks:
            return
        last = marks[0]
        self._ends.pop(last.digest, None)
        self._ends[last.digest] = _End(
            until_s, len(last.next_ids), _digest(last.next_ids), stored_tokens
        )
        while len(self._ends) > self._max_ends:
            del self._ends[next(iter(self._ends))]

    def stored_tokens(self, marks: Sequence[Mark], *, now_s: float) -> int:
        """Of the longest earlier prompt that this one begins with."""
        return next(self._known(marks, now_s), 0)

    def _known(self, marks: Sequence[Mark], now_s: float) -> Iterator[int]:
        for mark in marks:
            end = self._ends.get(mark.digest)
            if end is None or end.until_s <= now_s or end.num_ids > len(mark.next_ids):
                continue
            if _digest(mark.next_ids[: end.num_ids]) == end.digest:
                yield end.stored_tokens


def num_ids(marks: Sequence[Mark]) -> int:
    """Of the whole prompt."""
    return marks[0].num_ids + len(marks[0].next_ids)


def _digest(ids: Sequence[int]) -> bytes:
    return xxh3_128_digest(bodies.encode(list(ids)))
