"""What a store has dumped and not seen in storage yet."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p

_REMEMBERED: Final = 1 << 16
_NAMED: Final = 5


@dataclass(eq=False, slots=True)
class Dumped:
    """One dump of a block, to be told from the next. `refused` says why storage did not take it."""

    block_id: bytes
    refused: Outcome = Outcome.FINE


class Unsaved:
    """The last dumps of one store. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._dumped: OrderedDict[Key, Dumped] = OrderedDict()

    def note(self, blocks: Mapping[Key, bytes]) -> None:
        """From keys to block ids."""
        with self._lock:
            for key, block_id in blocks.items():
                self._dumped[key] = Dumped(block_id)
                self._dumped.move_to_end(key)
            while len(self._dumped) > _REMEMBERED:
                self._dumped.popitem(last=False)

    def all(self) -> dict[Key, Dumped]:
        with self._lock:
            return dict(self._dumped)

    def is_saved(self, key: Key, dumped: Dumped) -> None:
        """Unless it was dumped once more."""
        with self._lock:
            if self._dumped.get(key) is dumped:
                del self._dumped[key]

    def heard(self, news: p.SavingNews) -> list[Dumped]:
        """Returns those that storage refuses."""
        with self._lock:
            refused = [self._dumped[k] for k in map(Key, news.refused) if k in self._dumped]
            for dumped in refused:
                dumped.refused = news.reason
            for key in map(Key, news.saved):
                if key in self._dumped:
                    self._dumped[key].refused = Outcome.FINE
            return refused


def lacking(tiers: Sequence[str], places: Collection[int]) -> str:
    """Where some of these are not, for people."""
    bits = zip(tiers, (p.IN_NEAR, p.IN_FAR), strict=False)
    named = [name for name, bit in bits if not all(place & bit for place in places)]
    return " and ".join(named) if len(tiers) > 1 and named else "storage"


def not_written(blocks: Sequence[Dumped], where: str = "storage") -> str:
    """Names the first few."""
    named = [
        f"{dumped.block_id.hex()} ({dumped.refused or 'not there'})" for dumped in blocks[:_NAMED]
    ]
    more = f" and {len(blocks) - _NAMED} more" if len(blocks) > _NAMED else ""
    return f"{len(blocks)} blocks are not in {where}: {', '.join(named)}{more}"
