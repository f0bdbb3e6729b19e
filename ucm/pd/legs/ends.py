"""How far conversations of token ids are stored, by what decode has said beside its answers.

Of each prompt that decode has answered two ends are remembered: its own, and how far it and its
answer are stored. A prompt that begins with all of the latter goes on from there. One that begins
with the prompt alone, because something else is behind it, has only that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xxhash import xxh3_128_digest

from ucm.pd.legs import bodies
from ucm.pd.legs.chains import IDS_PART, Mark, linked, num_ids


@dataclass(frozen=True)
class _End:
    """`num_ids` behind a mark, with this digest. Of all up to there `stored_tokens` are stored."""

    until_s: float
    num_ids: int
    digest: bytes
    stored_tokens: int

    def is_of(self, ids: Sequence[int], now_s: float) -> bool:
        """Whether what stands behind the mark begins with it."""
        if self.until_s <= now_s or self.num_ids > len(ids):
            return False
        return _digest(ids[: self.num_ids]) == self.digest


class Ends:
    """The latest `max_ends`. Owned by the event loop's thread."""

    def __init__(self, max_ends: int) -> None:
        self._max_ends = max_ends
        # Behind each mark the latest one of a prompt, and of one with its answer; those that were
        # noted last are at the end.
        self._ends: dict[tuple[bytes, bool], _End] = {}

    def __len__(self) -> int:
        return len(self._ends)

    def note(
        self,
        marks: Sequence[Mark],
        answer_ids: Sequence[int],
        stored_tokens: int,
        *,
        until_s: float,
    ) -> None:
        """Of a prompt, longest first, how much is stored with its answer. Without the answer's ids
        nobody can tell whether it is that which stands behind the prompt."""
        if not marks:
            return
        digest, ids, prompt_tokens = marks[0].digest, list(marks[0].next_ids), num_ids(marks)
        stored = min(stored_tokens, prompt_tokens)
        self._put((digest, False), _End(until_s, len(ids), _digest(ids), stored))
        ids += answer_ids[: max(0, stored_tokens - prompt_tokens)]
        stored = marks[0].num_ids + len(ids)
        if stored > prompt_tokens:
            while len(ids) >= IDS_PART:
                digest, ids = linked(digest, ids[:IDS_PART]), ids[IDS_PART:]
            self._put((digest, True), _End(until_s, len(ids), _digest(ids), stored))
        while len(self._ends) > self._max_ends:
            del self._ends[next(iter(self._ends))]

    def _put(self, where: tuple[bytes, bool], end: _End) -> None:
        self._ends.pop(where, None)
        self._ends[where] = end

    def stored_tokens(self, marks: Sequence[Mark], *, now_s: float) -> int:
        """Of the longest that this prompt begins with."""
        for mark in marks:
            found = (self._ends.get((mark.digest, is_answered)) for is_answered in (True, False))
            of_it = [each for each in found if each is not None]
            stored = (each.stored_tokens for each in of_it if each.is_of(mark.next_ids, now_s))
            if most := max(stored, default=0):
                return most
        return 0


def _digest(ids: Sequence[int]) -> bytes:
    return xxh3_128_digest(bodies.encode(list(ids)))
