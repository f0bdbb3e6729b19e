"""Why a block is not there, or why a call has failed: one word each, for all counters and messages.

Each counter has one of the tables below; what ends a lookup in another word than a counter has is
translated here, and nowhere else. docs/metrics.md says what each means to people.
"""

from __future__ import annotations

from enum import Enum
from typing import Final


class Outcome(str, Enum):
    """Falsy only if nothing is wrong. Travels as its value."""

    FINE = ""
    # Storage's own.
    IO_ERROR = "io_error"
    FULL = "full"
    TIMEOUT = "timeout"
    CORRUPT = "corrupt"
    # Of a block that was looked for.
    NEVER_STORED = "never_stored"
    BEING_COMPUTED_HERE = "being_computed_here"
    EVICTED = "evicted"
    LATE = "late"
    NO_ROOM = "no_room"
    NAMESPACE = "namespace"
    NOT_WORTH = "not_worth"
    # Of a promise.
    WITHDRAWN = "withdrawn"
    UNSUPPORTED = "unsupported"
    CROWDED = "crowded"
    # Of a page that was to be written.
    QUEUE_FULL = "queue_full"
    AFTER_FAILED = "after_failed"
    ABORTED = "aborted"
    LEAVING = "leaving"
    GONE = "gone"

    def __str__(self) -> str:
        return self.value


MISSED: Final = (
    *(Outcome.NEVER_STORED, Outcome.NAMESPACE, Outcome.CORRUPT, Outcome.IO_ERROR),
    *(Outcome.TIMEOUT, Outcome.NO_ROOM, Outcome.BEING_COMPUTED_HERE, Outcome.LATE),
    *(Outcome.EVICTED, Outcome.NOT_WORTH),
)
RECOMPUTED: Final = (
    *(Outcome.LATE, Outcome.EVICTED, Outcome.CORRUPT, Outcome.IO_ERROR, Outcome.TIMEOUT),
    *(Outcome.NO_ROOM, Outcome.NAMESPACE, Outcome.WITHDRAWN, Outcome.UNSUPPORTED),
    *(Outcome.CROWDED, Outcome.NOT_WORTH),
)
UNWRITTEN: Final = (
    *(Outcome.FULL, Outcome.IO_ERROR, Outcome.TIMEOUT, Outcome.CORRUPT, Outcome.QUEUE_FULL),
    *(Outcome.NO_ROOM, Outcome.AFTER_FAILED, Outcome.ABORTED, Outcome.LEAVING),
)


def missed_as(end: Outcome) -> Outcome:
    """What ended a lookup, in the words of MISSED."""
    return end if end in MISSED else Outcome.IO_ERROR


def recomputed_as(end: Outcome) -> Outcome:
    """What ended a lookup, in the words of RECOMPUTED. FINE: the engine has asked for none."""
    # What was promised was stored once.
    end = Outcome.EVICTED if end is Outcome.NEVER_STORED else end
    return end if end in RECOMPUTED else Outcome.IO_ERROR
