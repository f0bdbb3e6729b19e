"""What a node remembers of blocks that it was asked for, and the scores that follow (score.py).

It outlives the pages: a block that was reclaimed and is written again has been used before, and
that tells the few blocks that come back from the many that don't. A node knows only what it was
asked itself, and begins with nothing; a block that it has forgotten is as good as new.

Who uses a block uses those before it, so what was forgotten of them is known from it, and scores
don't rise along a prompt: what is kept has no gaps, behind which nothing would be found.

From the time between two uses it learns the span.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from math import log2
from typing import Final

from ucm.store.blocks.keys import Key
from ucm.store.tiers.posix import score
from ucm.store.tiers.posix.score import MAX_SPAN_NS, MAX_USES, MIN_SPAN_NS, SECOND_NS

# An engine asks several times about one prompt.
_SAME_USE_NS: Final = SECOND_NS
_MAX_DEPTH: Final = (1 << 16) - 1
_IS_ASIDE: Final = 1 << 7
_USES: Final = _IS_ASIDE - 1


class Recall:
    """One thread's. Remembers at most `num_keys` (a power of two), in 19 bytes each: a key has two
    places, and takes the one whose key was used longer ago."""

    def __init__(self, num_keys: int = 1 << 20) -> None:
        assert num_keys > 1 and num_keys & (num_keys - 1) == 0, f"num_keys={num_keys}"
        self._mask = num_keys - 1
        self._digests = array("Q", bytes(8 * num_keys))
        self._used_ns = array("q", bytes(8 * num_keys))
        self._depths = array("H", bytes(2 * num_keys))
        # How often, with this time; 0 is a free place.
        self._uses = array("B", bytes(num_keys))
        self._pauses = Pauses()

    def use(self, keys: Sequence[Key], now_ns: int) -> None:
        """Somebody asks for a prompt of these blocks, in its order."""
        known = self._num_known(keys)
        # A little that many prompts begin with, and much that is new: most of that comes once.
        is_aside = 2 <= known < len(keys) / 2
        most = 0
        for depth in reversed(range(len(keys))):
            place = self._take(_digest(keys[depth]))
            self._depths[place] = min(depth, _MAX_DEPTH)
            most = self._count(place, now_ns, at_least=most, is_aside=is_aside)
        self._pauses.settle()

    def first_score_ns(self, key: Key, now_ns: int) -> int:
        """Of the file of a block that was asked for and is written now."""
        uses, depth, is_aside = self._standing(key)
        return score.first_score_ns(
            now_ns, uses=uses, depth=depth, span_ns=self._pauses.span_ns, is_aside=is_aside
        )

    def used_score_ns(self, key: Key, score_ns: int, now_ns: int) -> int | None:
        """Of the file of a block that was asked for and is there; None: not worth a touch."""
        uses, depth, _ = self._standing(key)
        return score.used_score_ns(
            score_ns, now_ns, uses=uses, depth=depth, span_ns=self._pauses.span_ns
        )

    def _count(self, place: int, now_ns: int, *, at_least: int, is_aside: bool) -> int:
        """Returns how often the block was used, with this time. `at_least`: the one behind it."""
        flag, uses = self._uses[place] & _IS_ASIDE, self._uses[place] & _USES
        since_ns = now_ns - self._used_ns[place]
        if not uses or not 0 <= since_ns < _SAME_USE_NS:
            if uses:
                self._pauses.add(since_ns)
            flag = _IS_ASIDE if is_aside and not uses else 0
            uses = min(uses + 1, MAX_USES + 1)
            self._used_ns[place] = now_ns
        uses = max(uses, at_least)
        self._uses[place] = uses | flag
        return uses

    def _standing(self, key: Key) -> tuple[int, int, bool]:
        """Uses before this one, depth, and whether it is aside."""
        place = self._find(_digest(key))
        if place is None:
            return 0, 0, False
        uses = self._uses[place]
        return max(0, (uses & _USES) - 1), self._depths[place], bool(uses & _IS_ASIDE)

    def _num_known(self, keys: Sequence[Key]) -> int:
        for i, key in enumerate(keys):
            if self._find(_digest(key)) is None:
                return i
        return len(keys)

    def _find(self, digest: int) -> int | None:
        place = digest & self._mask
        for each in (place, place ^ 1):
            if self._digests[each] == digest and self._uses[each]:
                return each
        return None

    def _take(self, digest: int) -> int:
        found = self._find(digest)
        if found is not None:
            return found
        place = digest & self._mask
        # Of one prompt the end is forgotten first.
        place = min(place, place ^ 1, key=lambda i: (self._used_ns[i], -self._depths[i]))
        self._digests[place] = digest
        self._uses[place] = 0
        return place


class Pauses:
    """Times between two uses of a block, as a histogram of the last million or so, and the span:
    three of ten are shorter. One that is too long is worse than one that is too short: what was
    scored with it stays in the way of all that follows."""

    _PER_DOUBLING: Final = 8
    _SHORTER: Final = 0.3
    _MOST: Final = 1 << 20
    # As if so many had been seen before the first: a person's pause in a conversation.
    _SUPPOSED: Final = 1000
    _SUPPOSED_NS: Final = 120 * SECOND_NS

    def __init__(self) -> None:
        self._counts = [0] * (self._bucket(MAX_SPAN_NS) + 1)
        self._counts[self._bucket(self._SUPPOSED_NS)] = self._SUPPOSED
        self._num = self._SUPPOSED
        self.span_ns = self._SUPPOSED_NS

    def add(self, pause_ns: int) -> None:
        self._counts[self._bucket(pause_ns)] += 1
        self._num += 1

    def settle(self) -> None:
        """After some were added."""
        if self._num > self._MOST:
            self._counts = [count // 2 for count in self._counts]
            self._num = sum(self._counts)
        shorter, bucket = self._counts[0], 0
        while shorter < self._num * self._SHORTER:
            bucket += 1
            shorter += self._counts[bucket]
        self.span_ns = int(MIN_SPAN_NS * 2 ** (bucket / self._PER_DOUBLING))

    def _bucket(self, pause_ns: int) -> int:
        clipped_ns = min(max(pause_ns, MIN_SPAN_NS), MAX_SPAN_NS)
        return round(self._PER_DOUBLING * log2(clipped_ns / MIN_SPAN_NS))


def _digest(key: Key) -> int:
    return int.from_bytes(key[8:16], "little")
