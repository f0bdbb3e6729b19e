"""Reads a few pages now and then that were not worth waiting for: are they by now?

No request waits for them. There is one such lookup at a time, and it gets at most a tenth of the
time: storage that is slow is asked seldom, and one that has become fast is found out at once. Only
where few pages come in time more are asked for: reads that hang keep threads from others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p

# Few and many by turns: what every read takes and what each page takes are told apart.
_MAX_PAGES = 16
_PAUSES = 9
_MIN_PAUSE_S = 0.5
_MAX_PAUSE_S = 60.0
# The node cache settles a lookup by its deadline; one that has no answer by then is given up.
_GRACE_S = 5.0


class LookupSession(Protocol):
    """Of a `NodeSession` what is needed here."""

    @property
    def is_ready(self) -> bool: ...

    @property
    def namespace(self) -> int: ...

    def next_id(self) -> int: ...

    def ask(self, question: p.Lookup, on_answer: Callable[[p.LookupReply], None]) -> None: ...

    def release(self, lookup_id: int) -> None: ...


class Explorer:
    """Owned by the engine's thread. `on_read` hears of what was read."""

    def __init__(
        self,
        session: LookupSession,
        on_read: Callable[[p.LookupReply], None],
        *,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session = session
        self._on_read = on_read
        self._timeout_s = timeout_s
        self._clock = clock
        # Until then nothing is tried, or what is being tried is waited for.
        self._next_s = float("-inf")
        self._open: int | None = None
        self._num_pages = 1

    def try_again(self, keys: Sequence[Key], start: int) -> None:
        """`keys[start:]`, all of full blocks, are in storage and were not read."""
        now_s = self._clock()
        if now_s < self._next_s or start >= len(keys) or not self._session.is_ready:
            return
        self.drop()
        lookup_id = self._open = self._session.next_id()
        self._next_s = now_s + self._timeout_s + _GRACE_S
        self._session.ask(
            p.Lookup(
                id=lookup_id,
                ns=self._session.namespace,
                keys=[bytes(key) for key in keys[: start + self._num_pages]],
                read_from=start,
                load=True,
                timeout_ms=int(self._timeout_s * 1000),
            ),
            self._on_reply,
        )

    def _on_reply(self, reply: p.LookupReply) -> None:
        is_late = reply.reason is Outcome.TIMEOUT
        self._num_pages = 1 if is_late or self._num_pages == _MAX_PAGES else 2 * self._num_pages
        pause_s = _PAUSES * reply.read_us / 1e6
        self._next_s = self._clock() + min(max(pause_s, _MIN_PAUSE_S), _MAX_PAUSE_S)
        self.drop()
        self._on_read(reply)

    def drop(self) -> None:
        """Gives back what was read, or withdraws the question."""
        lookup_id, self._open = self._open, None
        if lookup_id is not None:
            self._session.release(lookup_id)

    def node_lost(self) -> None:
        """So is what was asked."""
        self._open, self._next_s = None, float("-inf")
