"""A client's lasting tie to the node cache of its machine: connects, starts one, reconnects.

The owner (one thread) calls `poll`; it never blocks longer than told. Connecting happens on a
background thread with backoff, so a node cache that dies costs its clients hits until the next one
is there, and nothing else. Each connection is a new *generation*: what was promised in an
older one is gone.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque

from ucm.config.settings import StoreSettings
from ucm.errors import ProtocolError, UcmError
from ucm.store.client.answers import Answers
from ucm.store.client.connection import NodeClient
from ucm.store.client.start import connect_or_start
from ucm.store.node import protocol as p
from ucm.store.node.notices import Notices

logger = logging.getLogger(__name__)

_START_S = 15.0
_BACKOFF_FIRST_S = 0.05
_BACKOFF_LAST_S = 5.0
_AHEAD_S = 2.0
_LISTEN_S = 0.2
_CLOSE_S = 1.0


def session_name(engine_id: str, generation: int) -> str:
    """What the scheduler side and the ranks of one engine both call generation `generation`."""
    return f"{engine_id}/{generation}"


def _as_known(error: Exception) -> Exception:
    """An error that nobody has thought of ends no link: it says what it is, and is tried again."""
    if isinstance(error, (UcmError, OSError)):
        return error
    logger.debug("the link to the node cache goes on after this", exc_info=error)
    return UcmError(f"an unexpected {type(error).__name__} ({error}); tried again")


class NodeLink:
    """The scheduler side's connection. `generation` counts connections that were lost.

    Its thread connects, one generation after the other, and watches for the end of each connection,
    so that the next one is there before an owner who is idle asks for it.
    """

    def __init__(self, settings: StoreSettings, *, engine_id: str, role: str = "scheduler") -> None:
        self.generation = 0
        self.ranks_ready = 0
        # Why there is no connection; None while nothing has gone wrong.
        self.problem: Exception | None = None
        self._settings = settings
        self._engine_id = engine_id
        self._role = role
        self._client: NodeClient | None = None
        self._answers = Answers(0)
        # A node cache that answers wrongly is left, and will be met again: not at once.
        self._is_distrusted = False
        # Guards `_arrived`: a connection for each generation, in their order.
        self._lock = threading.Lock()
        self._arrived: deque[NodeClient] = deque()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_connected, name="ucm-link", daemon=True)
        self._thread.start()

    @property
    def client(self) -> NodeClient | None:
        """The live connection, if there is one. Valid until the next `poll`."""
        return self._client

    def poll(self, timeout_s: float = 0.0) -> list[p.NodeMessage]:
        """What has arrived. A new or lost connection shows in `client` and `generation`."""
        while (client := self._current()) is not None:
            try:
                messages = client.poll(timeout_s)
                for message in messages:
                    self._answers.check(message)
            except UcmError as error:
                self._lost(error)
                continue
            for message in messages:
                if isinstance(message, p.RanksReady):
                    self.ranks_ready = message.count
            return messages
        return []

    def send(self, message: p.ClientMessage) -> bool:
        """False when there is no connection (any more)."""
        if self._client is None:
            return False
        self._answers.asked(message)
        try:
            self._client.send(message)
        except UcmError as error:
            self._lost(error)
            return False
        return True

    def wait_connected(self, timeout_s: float) -> bool:
        """For owners that may block, such as scripts: waits until there is a connection."""
        deadline_s = time.monotonic() + timeout_s
        while self._current() is None and time.monotonic() < deadline_s:
            time.sleep(0.005)
        return self._client is not None

    def close(self) -> None:
        """Waits a moment for the thread, so that it starts no node cache any more."""
        with self._lock:
            self._closed.set()
            clients = [*self._arrived, *([self._client] if self._client is not None else [])]
            self._arrived.clear()
        for client in clients:
            client.close()
        self._client = None
        self._thread.join(_CLOSE_S)

    def _current(self) -> NodeClient | None:
        if self._client is None:
            with self._lock:
                self._client = self._arrived.popleft() if self._arrived else None
            if self._client is not None:
                self._answers = Answers(self._client.welcome.capacity_bytes)
        return self._client

    def _lost(self, error: UcmError) -> None:
        logger.warning("%s; serving without the store until there is one again", error)
        self.problem = error
        self._is_distrusted = isinstance(error, ProtocolError)
        if self._client is not None:
            self._client.close()
        self._client = None
        self.ranks_ready = 0
        self.generation += 1

    # -- the link's thread -----------------------------------------------------------------

    def _keep_connected(self) -> None:
        notices = Notices(time.monotonic)
        backoff_s = _BACKOFF_FIRST_S
        generation = 0
        while not self._closed.is_set():
            try:
                client = connect_or_start(
                    self._settings,
                    session=session_name(self._engine_id, generation),
                    role=self._role,
                    timeout_s=_START_S,
                    given_up=self._closed,
                )
            except Exception as error:  # noqa: BLE001 - nobody would see this thread end
                if self._closed.is_set():
                    return
                notices.warn("no_node_cache", _as_known(error))
                self.problem = error
                self._closed.wait(backoff_s)
                backoff_s = min(backoff_s * 2, _BACKOFF_LAST_S)
                continue
            with client.ending() as ending:
                self._hand_over(client)
                ending.wait()
            generation += 1
            if self._is_distrusted:
                self._closed.wait(backoff_s)
                backoff_s = min(backoff_s * 2, _BACKOFF_LAST_S)
            else:
                backoff_s = _BACKOFF_FIRST_S

    def _hand_over(self, client: NodeClient) -> None:
        with self._lock:
            if self._closed.is_set():
                client.close()
            else:
                self._arrived.append(client)


class MemoryTaker(ABC):
    """What a rank does with the memory. Called on the link's thread."""

    @abstractmethod
    def memory_arrived(self, generation: int, memory_fd: int, welcome: p.Welcome) -> None:
        """Map it before returning; the descriptor is closed with the connection."""

    @abstractmethod
    def memory_in_use(self, generation: int, offset: int, nbytes: int) -> None:
        """Pin or populate this part ahead of the first copy."""

    @abstractmethod
    def is_used(self, generation: int) -> bool:
        """Whether copies in this generation's memory are running or may still come."""


class RankLink(threading.Thread):
    """A rank's connection: brings the memory, and news of which parts of it are in use.

    Its thread connects, hands the memory to `on_memory`, says that the rank is ready, and then
    listens. When the node cache is lost it goes on to the next generation by itself, as the
    scheduler side does; `follow` corrects it where the two saw different losses.

    A session that the rank leaves may be one of a node cache that lives on, and this connection the
    last one that keeps its slots from being used anew. So it is held until no copy needs them.
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
        # Connections of generations that the scheduler side has left. Only the thread's own.
        self._held: list[tuple[int, NodeClient]] = []

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
        """Ends the thread soon. What is still held then stays open until the process ends."""
        self._closed.set()

    def run(self) -> None:
        notices = Notices(time.monotonic)
        backoff_s = _BACKOFF_FIRST_S
        while not self._closed.is_set():
            generation = self._generation
            try:
                client = connect_or_start(
                    self._settings,
                    session=session_name(self._engine_id, generation),
                    role="worker",
                    timeout_s=_START_S,
                    given_up=self._closed,
                )
                backoff_s = _BACKOFF_FIRST_S
                self._serve(client, generation)
            except Exception as error:  # noqa: BLE001 - nobody would see this thread end
                notices.warn("this_rank_has_no_node_cache", _as_known(error))
            self._let_go()
            self._closed.wait(backoff_s)
            backoff_s = min(backoff_s * 2, _BACKOFF_LAST_S)
        self._let_go()

    def _serve(self, client: NodeClient, generation: int) -> None:
        """Until told to close, or the scheduler side has left `generation`: `client` is then held.
        Raises when the connection is lost."""
        try:
            self._on_memory.memory_arrived(generation, client.memory_fd, client.welcome)
            client.send(p.MemoryReady())
            answers = Answers(client.welcome.capacity_bytes)
            while not self._closed.is_set() and self._generation == generation:
                for message in client.poll(_LISTEN_S):
                    answers.check(message)
                    if isinstance(message, p.MemoryInUse):
                        self._on_memory.memory_in_use(generation, message.offset, message.nbytes)
                self._let_go()
        except Exception:
            # What hears nothing more may be a node cache that has dropped this rank, and lives.
            self._held.append((generation, client))
            if self._generation == generation:
                self._generation += 1
            raise
        self._held.append((generation, client))

    def _let_go(self) -> None:
        """Closes the held connections that no copy needs any more."""
        still_held = []
        for generation, client in self._held:
            if self._on_memory.is_used(generation):
                still_held.append((generation, client))
            else:
                client.close()
        self._held = still_held
