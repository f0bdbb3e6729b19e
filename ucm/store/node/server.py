"""The node cache process: one event loop for all decisions, bounded threads for all I/O.

The socket is private to one user (mode 0600 in a directory of 0700), or to one group (0660 in
2770), and who comes in is checked by the kernel's word. A lock file beside it makes the process the
only one; whoever holds the lock owns the socket's name. The process leaves on SIGTERM or when it
has been idle for a while, after writing out what is queued, within a bound.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

import msgspec

from ucm.config.settings import StoreSettings
from ucm.errors import ConfigError
from ucm.metrics import FAR
from ucm.store.node import protocol as p
from ucm.store.node.chore_threads import ChoreThreads
from ucm.store.node.core import NodeCore
from ucm.store.node.io_threads import IoPool
from ucm.store.node.lanes import Lanes
from ucm.store.node.limits import GIB, be_taken_first, memory_left, room_for
from ucm.store.node.lock import SocketLock, this_process
from ucm.store.node.memory import SharedMemory, give_way
from ucm.store.node.notices import Notices
from ucm.store.node.parts import Behind, NodeLimits, NodeParts, PromisedRules, far_parts
from ucm.store.node.peer import Door, Peer
from ucm.store.node.rendezvous import is_shortage
from ucm.store.node.saved import SavingRules
from ucm.store.node.slots import SlotTable
from ucm.store.node.sweep_threads import Sweeper
from ucm.store.node.trusted_users import trust_of
from ucm.store.tiers.build import build_tiers, keeps_pages
from ucm.store.tiers.metered import MeasuredTier
from ucm.store.tiers.tier import Tier

logger = logging.getLogger(__name__)

_TICK_S = 0.05
_LOOK_S = 1.0
_HELD_UP_S = 1.0
_NICE = -10
_CLEAR_UP_S = 5.0
# Less than any client waits for a node cache.
_OPEN_S = 5.0
_MAX_WHY_CHARS = 500


class NodeServer:
    """Owns the memory, the tier, the threads and the listening socket of one node cache."""

    def __init__(self, settings: StoreSettings, loop: asyncio.AbstractEventLoop) -> None:
        self.settings = settings
        self.trust = trust_of(settings)
        self._loop = loop
        left = memory_left()
        room = room_for(settings.cache_capacity_bytes, left)
        ahead_bytes = left.nbytes // 2
        slots = SlotTable(room.capacity_bytes, keeps_unpinned=keeps_pages(settings))
        self.memory = SharedMemory(slots.capacity_bytes)
        self.tiers = [MeasuredTier(tier) for tier in build_tiers(settings)]
        timeout_s = settings.io_timeout_ms / 1000
        pool = partial(IoPool, loop=loop, timeout_s=timeout_s)

        self._populate = pool("populate", num_threads=1, keeps_queue_when_stalled=True)
        near, *farther = [_behind(tier, settings, pool) for tier in self.tiers]
        parts = NodeParts(
            slots=slots,
            tier=near.tier,
            reads=near.reads,
            writes=near.writes,
            control=near.control,
            page_of=lambda slot: self.memory.page(slot.offset, slot.span.slot_bytes),
            populate=self._populate_soon,
            clock=time.monotonic,
            call_later=loop.call_later,
            notices=Notices(time.monotonic),
            limits=NodeLimits(
                ahead_bytes=ahead_bytes,
                max_write_pages=settings.write_queue_pages,
                max_keys=settings.max_keys,
                max_open_keys=settings.max_open_keys,
                open_timeout_s=min(timeout_s, _OPEN_S),
                saving=SavingRules(recheck_s=settings.recheck_s, retry_s=settings.retry_ms / 1000),
                touch_every_s=settings.touch_every_s,
                promised=PromisedRules(
                    settings.promised_retries, settings.promised_retry_ms / 1000
                ),
            ),
        )
        for far in farther:
            parts = replace(parts, far=far_parts(parts, far))
        self._parts = parts
        self.core = NodeCore(parts)
        self._sweeper = Sweeper(settings)
        self._chores = ChoreThreads(near.tier.chores(), loop, self.core.removed_from_storage)
        self.arena = uuid.uuid4().hex
        # Clients that have said Hello. Who doesn't, keeps no node cache from leaving.
        self.num_connections = 0
        self.num_peers = 0
        self.dropped: set[Peer] = set()
        self.leaving = asyncio.Event()
        logger.log(
            logging.WARNING if room.is_cut else logging.INFO,
            "memory for slots: %.2f GiB (%s); %.2f GiB of it are taken ahead, before pages come",
            slots.capacity_bytes / GIB,
            room.said,
            min(slots.capacity_bytes, ahead_bytes) / GIB,
        )

    def _populate_soon(self, offset: int, nbytes: int, on_done: Callable[[], None]) -> None:
        def populate() -> None:
            give_way()
            self.memory.populate(offset, nbytes)

        self._populate.submit(populate, lambda _: on_done())

    def status(self, request_id: int, *, check: bool) -> p.Status:
        status = self.core.status(request_id, pid=os.getpid(), arena=self.arena, check=check)
        near, *far = self.tiers
        if not near.lanes:
            return status
        counters = {**status.counters, **near.totals(), **self._chores.counters()}
        for tier in far:
            counters |= {f"{FAR}{name}": number for name, number in tier.totals().items()}
        return msgspec.structs.replace(
            status, counters=counters, tier=near.name, far="".join(tier.name for tier in far)
        )

    async def serve(self, lock: SocketLock) -> None:
        """Serves until told to leave, or idle, or another has the lock. Writes that are queued then
        are finished, bounded."""
        door: Door | None = Door(self, lock)
        lock.note(this_process(failures=0, tried_s=time.time()))
        logger.info("node cache %d serves at %s for %s", os.getpid(), lock.path, self.trust)
        idle_since_s = looked_s = time.monotonic()
        while not self.leaving.is_set():
            if time.monotonic() - looked_s > _LOOK_S:
                looked_s = time.monotonic()
                self.dropped -= {peer for peer in self.dropped if peer.has_hung_up()}
                if not self._has_lock(lock):
                    logger.warning("another process has the lock of %s: leaving", lock.path)
                    break
                if door is None or not lock.is_listening():
                    self.core.notices.warn("listening_anew", f"{lock.path} is gone")
                    door = await self._door_anew(door, lock)
            slept_since_s = time.monotonic()
            await asyncio.sleep(_TICK_S)
            self._note_held_up(time.monotonic() - slept_since_s)
            self.core.tick()
            if self.num_connections or any(self.core.queues().values()):
                idle_since_s = time.monotonic()
            is_idle = time.monotonic() - idle_since_s > self.settings.idle_exit_s
            # A service: nobody else would start it again.
            if is_idle and self.settings.autostart:
                logger.info("idle for %g s: leaving", self.settings.idle_exit_s)
                break
        if door is not None:
            await door.close()
        self.core.leaving = True
        self.core.writeback.leave()
        await self._drain()

    def _has_lock(self, lock: SocketLock) -> bool:
        """Takes it anew where its file was removed, also with its directory. What the machine is
        short of at the moment is no reason to leave those who are connected."""
        try:
            return lock.renew()
        except (ConfigError, OSError) as error:
            self.core.notices.warn("could_not_renew_the_lock", error)
            return is_shortage(error) or is_shortage(error.__cause__)

    async def _door_anew(self, door: Door | None, lock: SocketLock) -> Door | None:
        """None: not yet, and those who are in stay."""
        if door is not None:
            await door.close()
        try:
            return Door(self, lock)
        except (ConfigError, OSError) as error:
            self.core.notices.warn("could_not_listen", error)
            return None

    def _note_held_up(self, slept_s: float) -> None:
        """Clients take a node cache that doesn't answer for a hung one: the log should know why."""
        if slept_s > _HELD_UP_S:
            self.core.held_up()
            logger.warning(
                "answered nobody for %.1f s: this machine has too little CPU or memory, or was"
                " suspended",
                slept_s,
            )

    async def _drain(self) -> None:
        """Writes out what is queued. What storage is too slow for is given up, and what was staged
        of it removed, as far as storage still answers."""
        self._sweeper.stop()
        self._chores.stop()
        await self._until(self._is_written, self.settings.drain_s)
        self.core.writeback.close()
        for tier, num_left in zip(self._parts.tiers, self.core.unwritten(), strict=True):
            if num_left:
                logger.warning(
                    "leaving with %d pages unwritten: %s is too slow",
                    num_left,
                    ", ".join(tier.tier.lanes),
                )
                # What is urgent publishes or removes what was staged.
                tier.writes.give_back_queue(urgent=False)
        await self._until(self._is_quiet, _CLEAR_UP_S)

    def _is_written(self) -> bool:
        """Or never will be."""
        tiers = zip(self._parts.tiers, self.core.unwritten(), strict=True)
        return all(
            tier.writes.is_hopeless or not (tier.writes.depth or num_left)
            for tier, num_left in tiers
        )

    def _is_quiet(self) -> bool:
        """Nothing that could leave a temporary file is under way, but for what hangs."""
        lanes = [each for tier in self._parts.tiers for each in (tier.writes, tier.control)]
        return not (
            self._sweeper.is_working
            or self._chores.is_working
            or any(each.depth > each.num_overdue for each in lanes)
        )

    async def _until(self, is_done: Callable[[], bool], within_s: float) -> None:
        deadline_s = time.monotonic() + within_s
        while not is_done() and time.monotonic() < deadline_s:
            self.core.tick()
            await asyncio.sleep(_TICK_S / 5)


def _behind(tier: Tier, settings: StoreSettings, pool: Callable[..., IoPool]) -> Behind:
    def lanes(name: str, num_threads: int, *, keeps: bool = False) -> Lanes:
        names = [f"{name}-{tier.name}-{lane}" for lane in range(len(tier.lanes))]
        pools = [
            pool(each, num_threads=num_threads, keeps_queue_when_stalled=keeps) for each in names
        ]
        return Lanes(pools, tier)

    return Behind(
        tier=tier,
        reads=lanes("read", settings.read_threads),
        # Pages that wait to be written can wait: there is a bound, and storage may come back.
        writes=lanes("write", settings.write_threads, keeps=True),
        # Nobody's start waits behind pages.
        control=lanes("control", 2),
    )


def run(settings: StoreSettings, lock: SocketLock) -> None:
    """Serves at `settings.socket_path` until SIGTERM, SIGINT, Shutdown, or idle for long, and gives
    the lock back. Raises ConfigError for settings that can't work on this machine."""
    holder = lock.holder
    lock.note(this_process(failures=holder.failures, tried_s=holder.tried_s))
    try:
        asyncio.run(_run(settings, lock))
    except ConfigError as error:
        # For those who wait for it, and can't see its log.
        lock.note(msgspec.structs.replace(lock.holder, why=str(error)[:_MAX_WHY_CHARS]))
        raise
    finally:
        lock.release()


def _come_first() -> None:
    """All engines of the machine wait for the calling thread, which needs hardly any time, and as
    many threads as there are cores may compute or spin. Where that is not allowed nothing changes.
    """
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


async def _run(settings: StoreSettings, lock: SocketLock) -> None:
    be_taken_first()
    loop = asyncio.get_running_loop()
    server = NodeServer(settings, loop)
    # The threads that the server has started don't.
    _come_first()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.leaving.set)
    await server.serve(lock)
    logger.info("node cache %d leaves; %s", os.getpid(), dict(server.core.counters))
