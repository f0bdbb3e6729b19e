"""The connections of clients: how many there may be, and which of them go for others.

    accepted ──► room? ──► served ──► lost
                  │  ▲
                  ▼  │ no: the one that has asked for nothing for longest is closed, or another ends
                 wait

Whoever waits has a descriptor; those behind are in the socket's backlog. An answer would need more
than that: a handshake and the whole request, of any number of clients at once.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time

from aiohttp import web

logger = logging.getLogger(__name__)

MOST_CONNECTIONS = 16384
# A request has up to three descriptors: the client's, and one for each leg.
_DESCRIPTORS_EACH = 4
# The request of one that has just been accepted, or answered, may be on its way.
SPARED_S = 1.0
# For the goodbye of one that is closed: the rest of an answer, or TLS's own. Some take neither.
_GOING_S = 0.5
_SAID_EVERY_S = 10.0


def default_limit() -> int:
    """By what this process has of descriptors."""
    num_descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if num_descriptors == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(1, min(MOST_CONNECTIONS, num_descriptors // _DESCRIPTORS_EACH))


class Connections:
    """Owned by the event loop's thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # There is room for them; a handshake of TLS may be under way.
        self._num_beginning = 0
        self._open: set[web.RequestHandler] = set()
        # Since when; who is idle for longest is first.
        self._idle_since_s: dict[web.RequestHandler, float] = {}
        self._has_changed = asyncio.Event()
        self._said_s: float | None = None

    async def room(self) -> None:
        """Returns when there is room for one more, which is then taken until `began`."""
        while self._num_beginning + len(self._open) >= self._limit:
            self._say()
            self._has_changed.clear()
            try:
                await asyncio.wait_for(self._has_changed.wait(), self._close_one())
            except asyncio.TimeoutError:
                continue
        self._num_beginning += 1

    def began(self) -> None:
        """It is open now, or has failed to be."""
        self._num_beginning -= 1
        self._has_changed.set()

    def opened(self, connection: web.RequestHandler) -> None:
        self._open.add(connection)
        self._idle_since_s[connection] = time.monotonic()

    def asks(self, connection: web.RequestHandler) -> None:
        self._idle_since_s.pop(connection, None)

    def is_answered(self, connection: web.RequestHandler) -> None:
        if connection in self._open:
            self._idle_since_s[connection] = time.monotonic()
            self._has_changed.set()

    def lost(self, connection: web.RequestHandler) -> None:
        self._open.discard(connection)
        self._idle_since_s.pop(connection, None)
        self._has_changed.set()

    def _close_one(self) -> float | None:
        """If one may go. When to look again, if nothing changes: None for never."""
        for connection, since_s in self._idle_since_s.items():
            spared_s = since_s + SPARED_S - time.monotonic()
            if spared_s > 0:
                return spared_s
            del self._idle_since_s[connection]
            _close(connection)
            return 2 * _GOING_S
        return None

    def _say(self) -> None:
        now_s = time.monotonic()
        if self._said_s is None or now_s - self._said_s >= _SAID_EVERY_S:
            self._said_s = now_s
            logger.warning(
                "there are %d connections of clients (--max-connections): idle ones are closed, "
                "and new ones wait",
                self._limit,
            )


def _close(connection: web.RequestHandler) -> None:
    transport = connection.transport
    connection.force_close()
    if transport is not None:
        asyncio.get_running_loop().call_later(_GOING_S, transport.abort)
