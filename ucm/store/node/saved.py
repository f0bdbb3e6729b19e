"""Which pages are in storage, as far as this node cache knows. READY in memory is not SAVED.

    MEMORY_ONLY ──a place in the queue──► QUEUED ──published──► SAVED ──old──► looked at again
         ▲                                  │ failed, or dropped
         └────── after a pause, met or not ◄── REFUSED

MEMORY_ONLY  nobody has tried: nothing is known of the key here. Where the page is in memory,
             whoever meets it (a dump, a lookup, a flush) queues it.
QUEUED       the write queue holds the page; only `WriteBack` moves it on.
SAVED        its file was seen, or published from here, no longer than `recheck_s` ago. What was
             seen longer ago is looked at again before anybody relies on it.
REFUSED      storage would not take it, or there was no place for it. Who dumps it or has asked for
             it is told, and promises nothing about it. `retry_s` later whoever meets it queues it,
             and for a while it is queued without that (`retries.py`).

Both memories are bounded; what falls out of them is MEMORY_ONLY again, which costs one look.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol, TypeVar

from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key
from ucm.store.node.slots import Slot

_REMEMBERED_KEYS = 1 << 16
_V = TypeVar("_V")


class Saving(Enum):
    MEMORY_ONLY = "memory_only"
    QUEUED = "queued"
    SAVED = "saved"
    REFUSED = "refused"


class TellClients(Protocol):
    """Tells the node cache's clients. `reason` is that of the refusals."""

    def __call__(self, refused: Sequence[Key], saved: Sequence[Key], reason: Outcome) -> None: ...


class Met(NamedTuple):
    """A READY page that somebody counts on, and the block before it."""

    key: Key
    parent: Key | None
    slot: Slot


@dataclass(frozen=True)
class SavingRules:
    """`recheck_s`: how long a file that was seen counts as there. `retry_s`: how long a page that
    was refused is left alone."""

    recheck_s: float = 10.0
    retry_s: float = 1.0


@dataclass(frozen=True)
class SaveRefusal:
    at_s: float
    reason: Outcome


class SavedBook:
    """Owned by the event loop's thread."""

    def __init__(self, rules: SavingRules, clock: Callable[[], float]) -> None:
        self._rules = rules
        self._clock = clock
        self._saved_s: OrderedDict[Key, float] = OrderedDict()
        self._refused: OrderedDict[Key, SaveRefusal] = OrderedDict()

    def note_saved(self, key: Key) -> bool:
        """Whether that is news: it had been refused."""
        _remember(self._saved_s, key, self._clock())
        return self._refused.pop(key, None) is not None

    def note_refused(self, key: Key, reason: Outcome) -> None:
        self._saved_s.pop(key, None)
        _remember(self._refused, key, SaveRefusal(self._clock(), reason))

    def note_gone(self, key: Key) -> None:
        """Storage was asked, and has it no more."""
        self._saved_s.pop(key, None)

    def is_saved(self, key: Key) -> bool:
        """Seen lately."""
        seen_s = self._saved_s.get(key)
        return seen_s is not None and self._clock() - seen_s <= self._rules.recheck_s

    def was_saved(self, key: Key) -> bool:
        """Seen once, however long ago."""
        return key in self._saved_s

    def refusal(self, key: Key) -> SaveRefusal | None:
        return self._refused.get(key)

    def may_retry(self, key: Key) -> bool:
        refusal = self._refused.get(key)
        return refusal is None or self._clock() - refusal.at_s >= self._rules.retry_s


def _remember(memory: OrderedDict[Key, _V], key: Key, value: _V) -> None:
    memory[key] = value
    memory.move_to_end(key)
    if len(memory) > _REMEMBERED_KEYS:
        memory.popitem(last=False)
