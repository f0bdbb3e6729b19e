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
from collections import deque

from ucm.config.settings import StoreSettings
from ucm.errors import ProtocolError, UcmError
from ucm.store.client.answers import Answers
from ucm.store.client.connection import NodeClient
from ucm.store.client.start import connect_or_start
from ucm.store.node import protocol as p
from ucm.store.node.notices import Notices

logger = logging.getLogger(__name__)

START_S = 15.0
BACKOFF_FIRST_S = 0.05
BACKOFF_LAST_S = 5.0
_CLOSE_S = 1.0


def session_name(engine_id: str, generation: int) -> str:
    """What the scheduler side and the ranks of one engine both call generation `generation`."""
    return f"{engine_id}/{generation}"


def as_known(error: Exception) -> Exception:
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
        backoff_s = BACKOFF_FIRST_S
        generation = 0
        while not self._closed.is_set():
            try:
                client = connect_or_start(
                    self._settings,
                    session=session_name(self._engine_id, generation),
                    role=self._role,
                    timeout_s=START_S,
                    given_up=self._closed,
                )
            except Exception as error:  # noqa: BLE001 - nobody would see this thread end
                if self._closed.is_set():
                    return
                notices.warn("no_node_cache", as_known(error))
                self.problem = error
                self._closed.wait(backoff_s)
                backoff_s = min(backoff_s * 2, BACKOFF_LAST_S)
                continue
            with client.ending() as ending:
                self._hand_over(client)
                ending.wait()
            generation += 1
            if self._is_distrusted:
                self._closed.wait(backoff_s)
                backoff_s = min(backoff_s * 2, BACKOFF_LAST_S)
            else:
                backoff_s = BACKOFF_FIRST_S

    def _hand_over(self, client: NodeClient) -> None:
        with self._lock:
            if self._closed.is_set():
                client.close()
            else:
                self._arrived.append(client)
