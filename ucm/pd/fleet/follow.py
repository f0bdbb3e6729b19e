"""Following the instances that are registered in etcd.

    range ──► watch, for a while ──► range ──► ...
      ▲                │
      └── wait ◄── EtcdError

While etcd is gone, what was last known stays. When it is back, leases may have run out only because
nobody could renew them: what is missing then, or is deleted soon after, gets a grace to come back.
The same is due when one endpoint of several was lost: a registrar may have been the slower to leave
it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import aclosing

from ucm.pd.fleet.etcd import PREFIX, Etcd, Registration
from ucm.pd.fleet.etcd_gateway import EtcdError, Event

logger = logging.getLogger(__name__)

GRACE_S = 10.0
# An endpoint that stands still is noticed after this and one call's timeout. That has to be before
# leases can run out (a registrar's ttl less its interval), or those would get no grace.
_WATCH_S = 1.0
_SHORTEST_WATCH_S = 0.05

OnChange = Callable[[Mapping[str, Registration]], None]


async def follow(
    etcd: Etcd, on_change: OnChange, *, retry_s: float, grace_s: float = GRACE_S
) -> None:
    """Calls `on_change` with all instances by key: at first, even if there are none, then changed.

    Runs until it is cancelled; `on_change` is called on the event loop's thread, and what it raises
    ends it. After an EtcdError it waits `retry_s` and asks anew; an instance that is missing then
    is dropped if it is still missing `grace_s` after that.
    """
    follower = _Follower(etcd, on_change, grace_s)
    while True:
        if not await follower.succeeds():
            await asyncio.sleep(retry_s)


def changes(
    known: Mapping[str, Registration], now: Mapping[str, Registration]
) -> tuple[list[Registration], list[Registration]]:
    """Whom to add and whom to remove. Pure. One with a new incarnation is in both."""
    add = [each for key, each in now.items() if known.get(key) != each]
    remove = [each for key, each in known.items() if now.get(key) != each]
    return add, remove


class _Follower:
    def __init__(self, etcd: Etcd, on_change: OnChange, grace_s: float) -> None:
        self._etcd = etcd
        self._on_change = on_change
        self._grace_s = grace_s
        self._grace_ends_s = 0.0
        self._is_out = False
        self._num_lost = etcd.num_lost
        self._there: dict[str, Registration] = {}
        self._told: dict[str, Registration] | None = None
        self._unreadable: set[Event] = set()

    async def succeeds(self) -> bool:
        """One round of range and watch. False after an EtcdError, of which the first is logged."""
        try:
            await self._watch(await self._read())
        except EtcdError as error:
            if not self._is_out:
                logger.warning("the instances stay as they were last known: %s", error)
            self._is_out = True
        return not self._is_out

    async def _read(self) -> int:
        """All that is there. The revision of that. Raises EtcdError."""
        snapshot = await self._etcd.range(PREFIX)
        if self._is_out or self._num_lost != self._etcd.num_lost:
            self._grace_ends_s = time.monotonic() + self._grace_s
        if self._is_out:
            logger.info("etcd answers again")
        self._is_out, self._num_lost = False, self._etcd.num_lost
        self._there = {}
        self._apply(Event(key, value) for key, value in snapshot.values.items())
        return snapshot.revision

    async def _watch(self, revision: int) -> None:
        """Returns when it is time to read all anew. Raises EtcdError."""
        for_s, grace_s = _WATCH_S, self._grace_ends_s - time.monotonic()
        if grace_s > 0:
            for_s = min(for_s, max(grace_s, _SHORTEST_WATCH_S))
        watched = self._etcd.watch(PREFIX, revision=revision + 1, for_s=for_s)
        async with aclosing(watched) as batches:
            async for events in batches:
                self._apply(events)

    def _apply(self, events: Iterable[Event]) -> None:
        for event in events:
            registration = None if event.value is None else self._readable(event, event.value)
            if registration is None:
                self._there.pop(event.key, None)
            else:
                self._there[event.key] = registration
        now = dict(self._there)
        if time.monotonic() < self._grace_ends_s:
            now = {**(self._told or {}), **now}
        if now != self._told:
            self._told = now
            self._on_change(dict(now))

    def _readable(self, event: Event, value: bytes) -> Registration | None:
        """One record that is nonsense must not hide the others."""
        try:
            registration = Registration.decode(value)
            if registration.key != event.key:
                raise ValueError(f"the record is one of {registration.key}")
        except ValueError as error:
            if event not in self._unreadable:
                logger.warning("%s in etcd is no instance: %s", event.key, error)
            self._unreadable.add(event)
            return None
        return registration
