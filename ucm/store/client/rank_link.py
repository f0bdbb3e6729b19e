"""A rank's tie to the node cache: the memory, and news of which parts of it are in use."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod

from ucm.config.settings import StoreSettings
from ucm.store.client.answers import Answers
from ucm.store.client.connection import NodeClient
from ucm.store.client.link import BACKOFF_FIRST_S, BACKOFF_LAST_S, START_S, as_known, session_name
from ucm.store.client.start import connect_or_start
from ucm.store.node import protocol as p
from ucm.store.node.notices import Notices

_AHEAD_S = 2.0
_LISTEN_S = 0.2


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
        backoff_s = BACKOFF_FIRST_S
        while not self._closed.is_set():
            generation = self._generation
            try:
                client = connect_or_start(
                    self._settings,
                    session=session_name(self._engine_id, generation),
                    role="worker",
                    timeout_s=START_S,
                    given_up=self._closed,
                )
                backoff_s = BACKOFF_FIRST_S
                self._serve(client, generation)
            except Exception as error:  # noqa: BLE001 - nobody would see this thread end
                notices.warn("this_rank_has_no_node_cache", as_known(error))
            self._let_go()
            self._closed.wait(backoff_s)
            backoff_s = min(backoff_s * 2, BACKOFF_LAST_S)
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
