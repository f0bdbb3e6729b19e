"""Where a conversation's pages lie in memory: at the instance that had its beginning last.

The first choice for a prompt is rendezvous hashing over its opening, which stays the same from turn
to turn: proxies that stand side by side agree on it without a word, and an instance that comes or
goes moves no more than its own share. Where load has sent a conversation elsewhere, its pages are
there, and this proxy remembers that.

A wrong place costs time and nothing else: what is not in memory there comes from the store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest
from yarl import URL

OUTCOMES = ("first", "kept", "moved")
# Of one prompt: its whole, and what a next turn or an edited last message begins with.
_MAX_NOTED = 4


@dataclass(frozen=True)
class Prefix:
    """What a prompt begins with. `digests` name its beginnings, longest first, down to its
    `opening`, which all turns of a conversation have in common. What is before that, such as a
    system prompt, is everybody's, and says nothing of a place."""

    digests: Sequence[bytes]
    opening: bytes


def choose(loads: Mapping[URL, int], *, home: URL | None, opening: bytes, max_ahead: int) -> URL:
    """One of those that run at most `max_ahead` requests more than the least busy: `home`, or else
    one on home's machine, which has the same memory for pages, or else the first by rendezvous.
    Pure."""
    most = min(loads.values()) + max_ahead
    host = home.host if home is not None else None

    def rank(url: URL) -> tuple[bool, bool, int]:
        return url == home, url.host == host, xxh3_64_intdigest(opening + str(url).encode())

    return max((url for url, load in loads.items() if load <= most), key=rank)


class Homes:
    """Of one pool, the latest `max_places`. Owned by the event loop's thread."""

    def __init__(self, *, max_ahead: int, max_places: int) -> None:
        self._max_ahead = max_ahead
        self._max_places = max_places
        # Those that were noted last are at the end.
        self._homes: dict[bytes, URL] = {}
        self.counts = dict.fromkeys(OUTCOMES, 0)

    def __len__(self) -> int:
        return len(self._homes)

    def choose(self, prefix: Prefix, loads: Mapping[URL, int]) -> URL:
        """Whom to ask, of those that can be asked; noted."""
        home = next((self._homes[each] for each in prefix.digests if each in self._homes), None)
        chosen = choose(loads, home=home, opening=prefix.opening, max_ahead=self._max_ahead)
        outcome = "first" if home is None else "kept" if chosen == home else "moved"
        self.counts[outcome] += 1
        for digest in reversed(prefix.digests[:_MAX_NOTED]):
            self._homes.pop(digest, None)
            self._homes[digest] = chosen
        while len(self._homes) > self._max_places:
            del self._homes[next(iter(self._homes))]
        return chosen
