"""Where a conversation's pages lie in memory: at the instance that had its beginning last.

The first choice for a prompt is rendezvous hashing over its opening, which stays the same from turn
to turn: proxies that stand side by side agree on it without a word, and an instance that comes or
goes moves no more than its own share. Where load has sent a conversation elsewhere, its pages are
there, and this proxy remembers that.

Agents may all open alike, and so may texts and ids with one system prompt. Where conversations go
on otherwise behind the same beginning again and again, that is nobody's opening: what counts is how
each goes on behind it.

A wrong place costs time and nothing else: what is not in memory there comes from the store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from xxhash import xxh3_64_intdigest
from yarl import URL

OUTCOMES = ("first", "kept", "moved")
# Of one prompt: its whole, and what a next turn or an edited last message begins with.
_MAX_NOTED = 4
# Of one beginning; a conversation whose last message is edited now and then is still one.
_FORKS_IF_COMMON = 4


@dataclass(frozen=True)
class Prefix:
    """What a prompt begins with. `digests` name its beginnings, longest first, down to its
    `opening`, which all turns of a conversation have in common. What is before that, such as a
    system prompt, is everybody's, and says nothing of a place. `trail` leads on from the opening in
    finer steps, `steps` from one of the digests to the next."""

    digests: Sequence[bytes]
    opening: bytes
    trail: Sequence[bytes] = ()
    steps: int = 1


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
        # Of beginnings, how one went on behind it last, and how often that was another way.
        self._forks: dict[bytes, tuple[bytes, int]] = {}
        self.counts = dict.fromkeys(OUTCOMES, 0)

    def __len__(self) -> int:
        return max(len(self._homes), len(self._forks))

    def choose(self, prefix: Prefix, loads: Mapping[URL, int]) -> URL:
        """Whom to ask, of those that can be asked; noted."""
        own, opening = self._own(prefix)
        home = next((self._homes[each] for each in own if each in self._homes), None)
        chosen = choose(loads, home=home, opening=opening, max_ahead=self._max_ahead)
        outcome = "first" if home is None else "kept" if chosen == home else "moved"
        self.counts[outcome] += 1
        for digest in reversed(own[:_MAX_NOTED]):
            self._homes.pop(digest, None)
            self._homes[digest] = chosen
        for noted in (self._homes, self._forks):
            while len(noted) > self._max_places:
                del noted[next(iter(noted))]
        return chosen

    def _own(self, prefix: Prefix) -> tuple[Sequence[bytes], bytes]:
        """Its beginnings that many have not in common, longest first, and its opening."""
        own, opening = prefix.digests, prefix.opening
        for i, (beginning, behind) in enumerate(pairwise(prefix.trail), start=1):
            last, forks = self._forks.pop(beginning, (behind, 0))
            forks += behind != last
            self._forks[beginning] = behind, forks
            if forks >= _FORKS_IF_COMMON:
                num_common = -(-i // prefix.steps)
                own, opening = (*prefix.digests[:-num_common], behind), behind
        return own, opening
