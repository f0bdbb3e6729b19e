"""A client's lasting tie to the node cache of its machine: connects, starts one, reconnects.

The owner (one thread) calls `poll` often; it never blocks longer than told. Connecting happens on
a background thread with backoff, so a node cache that dies costs its clients hits until the next
one is there, and nothing else. Each connection is a new *generation*: what was promised in an
older one is gone.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod

from ucm.config import StoreSettings
from ucm.errors import UcmError
from ucm.store.node import protocol as p
from ucm.store.node.client import NodeClient
from ucm.store.node.start import connect_or_start

logger = logging.getLogger(__name__)

_START_S = 15.0
_BACKOFF_FIRST_S = 0.05
_BACKOFF_LAST_S = 5.0
_AHEAD_S = 2.0


def session_name(engine_id: str, generation: int) -> str:
    """What the scheduler side and the ranks of one engine both call generation `generation`."""
    return f"{engine_id}/{generation}"


class NodeLink:
    """The scheduler side's connection. `generation` counts connections that were lost."""

    def __init__(self, settings: StoreSettings, *, engine_id: str, role: str = "scheduler") -> None:
        self.generation = 0
        self.ranks_ready = 0
        # Why there is no connection; None while nothing has gone wrong.
        self.problem: Exception | None = None
        self._settings = settings
        self._engine_id = engine_id
        self._role = role
        self._client: NodeClient | None = None
        self._arrived: NodeClient | None = None
        self._lock = threading.Lock()
        self._connecting: threading.Thread | None = None
        self._closed = False
        self._connect_in_background()

    @property
    def client(self) -> NodeClient | None:
        """The live connection, if there is one. Valid until the next `poll`."""
        return self._client

    def poll(self, timeout_s: float = 0.0) -> list[p.NodeMessage]:
        """What has arrived. A new or lost connection shows in `client` and `generation`."""
        if self._client is None:
            self._take_arrived()
        if self._client is None:
            return []
        try:
            messages = self._client.poll(timeout_s)
        except UcmError as error:
            self._lost(error)
            return []
        for message in messages:
            if isinstance(message, p.RanksReady):
                self.ranks_ready = message.count
        return messages

    def send(self, message: p.ClientMessage) -> bool:
        """False when there is no connection (any more)."""
        if self._client is None:
            return False
        try:
            self._client.send(message)
        except UcmError as error:
            self._lost(error)
            return False
        return True

    def wait_connected(self, timeout_s: float) -> bool:
        """For owners that may block, such as scripts: waits until there is a connection."""
        deadline_s = time.monotonic() + timeout_s
        while self._client is None and time.monotonic() < deadline_s:
            self._take_arrived()
            if self._client is None:
                time.sleep(0.005)
        return self._client is not None

    def close(self) -> None:
        with self._lock:
            self._closed = True
            arrived, self._arrived = self._arrived, None
        for client in (arrived, self._client):
            if client is not None:
                client.close()
        self._client = None

    def _take_arrived(self) -> None:
        with self._lock:
            self._client, self._arrived = self._arrived, None
        if self._client is None and not self._closed:
            self._connect_in_background()

    def _lost(self, error: UcmError) -> None:
        logger.warning("%s; serving without the store until there is one again", error)
        self.problem = error
        if self._client is not None:
            self._client.close()
        self._client = None
        self.ranks_ready = 0
        self.generation += 1
        self._connect_in_background()

    def _connect_in_background(self) -> None:
        if self._connecting is not None and self._connecting.is_alive():
            return
        with self._lock:
            # Its thread may have ended between the look at `_arrived` and now.
            if self._arrived is not None:
                return
        self._connecting = threading.Thread(
            target=self._connect, args=(self.generation,), name="ucm-link", daemon=True
        )
        self._connecting.start()

    def _connect(self, generation: int) -> None:
        backoff_s = _BACKOFF_FIRST_S
        session = session_name(self._engine_id, generation)
        while not self._closed:
            try:
                client = connect_or_start(
                    self._settings, session=session, role=self._role, timeout_s=_START_S
                )
            except (UcmError, OSError) as error:
                logger.warning("no node cache: %s; next try in %.2g s", error, backoff_s)
                self.problem = error
                time.sleep(backoff_s)
                backoff_s = min(backoff_s * 2, _BACKOFF_LAST_S)
                continue
            with self._lock:
                late = self._is_closed()
                if not late:
                    self._arrived = client
            if late:
                client.close()
            return

    def _is_closed(self) -> bool:
        return self._closed


class MemoryTaker(ABC):
    """What a rank does with the memory. Called on the link's thread."""

    @abstractmethod
    def memory_arrived(self, generation: int, memory_fd: int, welcome: p.Welcome) -> None:
        """Map it before returning; the descriptor is closed with the connection."""

    @abstractmethod
    def span_in_use(self, generation: int, offset: int, nbytes: int) -> None:
        """Pin or populate this part ahead of the first copy."""


class RankLink(threading.Thread):
    """A rank's connection: brings the memory, and news of which parts of it are in use.

    Its thread connects, hands the memory to `on_memory`, says that the rank is ready, and then
    listens. When the node cache is lost it goes on to the next generation by itself, as the
    scheduler side does; `follow` corrects it where the two saw different losses.
    """

    def __init__(
        self,
        settings: StoreSettings,
        *,
        engine_id: str,
        on_memory: MemoryTaker,
    ) -> None:
        super().__init__(name="ucm-rank-link", daemon=True)
        self._settings = settings
        self._engine_id = engine_id
        self._on_memory = on_memory
        self._generation = 0
        self._ahead_since_s: float | None = None
        self._closed = threading.Event()

    def follow(self, generation: int) -> None:
        """The scheduler side is at `generation`: join it there. Not at once if this rank is ahead:
        usually the scheduler side is about to notice the same loss."""
        if generation < self._generation:
            if self._ahead_since_s is None:
                self._ahead_since_s = time.monotonic()
            if time.monotonic() - self._ahead_since_s < _AHEAD_S:
                return
        self._ahead_since_s = None
        self._generation = generation

    def close(self) -> None:
        self._closed.set()

    def run(self) -> None:
        backoff_s = _BACKOFF_FIRST_S
        while not self._closed.is_set():
            generation = self._generation
            try:
                with connect_or_start(
                    self._settings,
                    session=session_name(self._engine_id, generation),
                    role="worker",
                    timeout_s=_START_S,
                ) as client:
                    backoff_s = _BACKOFF_FIRST_S
                    self._serve(client, generation)
            except (UcmError, OSError) as error:
                logger.info("this rank has no node cache: %s", error)
            self._closed.wait(backoff_s)
            backoff_s = min(backoff_s * 2, _BACKOFF_LAST_S)

    def _serve(self, client: NodeClient, generation: int) -> None:
        self._on_memory.memory_arrived(generation, client.memory_fd, client.welcome)
        client.send(p.MemoryReady())
        while not self._closed.is_set() and self._generation == generation:
            try:
                messages = client.poll(0.2)
            except UcmError:
                if self._generation == generation:
                    self._generation += 1
                raise
            for message in messages:
                if isinstance(message, p.SpanInUse):
                    self._on_memory.span_in_use(generation, message.offset, message.nbytes)
