"""The scheduler side's view of the node cache: one namespace, ids, and who hears of what.

Wraps the lasting connection (`NodeLink`) so that lookups and dumps needn't know when it was made
anew: they see `generation` change and are told through `on_lost`.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable

from ucm.outcome import Outcome
from ucm.store.client.link import NodeLink
from ucm.store.node import protocol as p
from ucm.store.node.notices import Notices

logger = logging.getLogger(__name__)


class NodeSession:
    """Owned by the engine's thread. The handlers are set by the scheduler side. `namespace` is the
    number of the one that is open now. Storing goes on for `dump_timeout_s` of silence."""

    def __init__(
        self,
        link: NodeLink,
        opening: p.OpenNamespace,
        *,
        world_size: int,
        dump_timeout_s: float,
        log_path: str = "",
    ) -> None:
        self.on_lookup: Callable[[p.LookupReply], None] = lambda reply: None
        self.on_reserve: Callable[[p.ReserveReply], None] = lambda reply: None
        self.on_status: Callable[[p.Status], None] = lambda status: None
        self.on_manifest: Callable[[p.ManifestFound], None] = lambda found: None
        self.on_saving: Callable[[p.SavingNews], None] = lambda news: None
        self.on_lost: Callable[[], None] = lambda: None
        self._link = link
        self._log_path = log_path
        self._opening = opening
        self.namespace = opening.ns
        self._world_size = world_size
        self._dump_timeout_s = dump_timeout_s
        self._ids = itertools.count(1)
        self._seen_generation = link.generation
        self._opened_generation = -1
        self._refused = False
        self._silent_since_s: float | None = None
        self._allowance_s = 0.0
        self._has_news = False
        self._notices = Notices(time.monotonic)

    @property
    def generation(self) -> int:
        return self._link.generation

    @property
    def is_ready(self) -> bool:
        """The namespace is open, every rank has mapped the memory, and answers come: what is
        promised now can be kept."""
        return self._is_open and self._silent_since_s is None

    @property
    def can_store(self) -> bool:
        """Who stores waits for nothing, so it may have patience with a node cache that is silent,
        perhaps because its machine stood still."""
        since_s = self._silent_since_s
        return self._is_open and (
            since_s is None or time.monotonic() - since_s < self._dump_timeout_s
        )

    @property
    def _is_open(self) -> bool:
        return (
            self._link.client is not None
            and self._opened_generation == self._link.generation
            and not self._refused
            and self._link.ranks_ready >= self._world_size
        )

    @property
    def why_not_ready(self) -> Outcome:
        """As a reason for what is computed instead."""
        if self._refused:
            return Outcome.NAMESPACE
        return Outcome.IO_ERROR if self._silent_since_s is None else Outcome.TIMEOUT

    def reopen(self, opening: p.OpenNamespace) -> None:
        """Everything that follows is about another namespace."""
        self._opening = opening
        self.namespace = opening.ns
        self._refused = False
        if self._opened_generation == self._link.generation:
            self._link.send(opening)

    def found_silent(self) -> None:
        """An answer is overdue: ask nothing more of this node cache until it says something."""
        if self._silent_since_s is None:
            self._silent_since_s = time.monotonic()
            self._notices.warn(
                "the_node_cache_does_not_answer",
                f"nothing is loaded until it does; it may be stopped, or have too little CPU or "
                f"memory (its log: {self._log_path})",
            )
        self._link.send(p.GetStatus(id=0))

    def next_id(self) -> int:
        return next(self._ids)

    def send(self, message: p.ClientMessage) -> None:
        """A message to a lost node cache is dropped: `on_lost` cleans up at the next poll."""
        self._link.send(message)

    def poll(self, timeout_s: float = 0.0) -> None:
        """Hands out what has arrived; waits at most `timeout_s` for it."""
        messages = self._link.poll(timeout_s)
        if self._link.generation != self._seen_generation:
            self._seen_generation = self._link.generation
            self.on_lost()
        if self._link.client is not None and self._opened_generation != self._link.generation:
            self._opened_generation = self._link.generation
            self._refused, self._silent_since_s = False, None
            self._link.send(self._opening)
        if messages:
            self._silent_since_s = None
            self._has_news = True
        for message in messages:
            self._hand_out(message)

    def _hand_out(self, message: p.NodeMessage) -> None:
        if isinstance(message, p.LookupReply):
            self.on_lookup(message)
        elif isinstance(message, p.ReserveReply):
            self.on_reserve(message)
        elif isinstance(message, p.SavingNews):
            self.on_saving(message)
        elif isinstance(message, p.NamespaceOpened):
            self._on_opened(message)
        elif isinstance(message, p.Notice):
            logger.warning("the node cache (its log: %s): %s", self._log_path, message.text)
        elif isinstance(message, p.Status):
            self.on_status(message)
        elif isinstance(message, p.ManifestFound):
            self.on_manifest(message)

    def take_news(self) -> bool:
        """Whether anything has arrived since this was last asked."""
        had, self._has_news = self._has_news, False
        return had

    def may_wait(self, allowance_s: float) -> None:
        """How long to wait from now on, in all."""
        self._allowance_s = allowance_s

    def wait_at_most(self, allowance_s: float) -> None:
        self._allowance_s = min(self._allowance_s, allowance_s)

    def wait_for_news(self) -> bool:
        """Polls once, until anything arrives or the step's allowance is used up. False if that has
        been used up already, or nobody answers."""
        if self._allowance_s <= 0 or not self.is_ready:
            return False
        started_s = time.monotonic()
        self.poll(self._allowance_s)
        self._allowance_s -= time.monotonic() - started_s
        return True

    def wait_for(self, answered: Callable[[], bool]) -> None:
        """Polls until `answered` or until the step's allowance is used up."""
        if answered():
            return
        self.poll()
        while not answered() and self.wait_for_news():
            pass

    def close(self) -> None:
        self._link.close()

    def _on_opened(self, message: p.NamespaceOpened) -> None:
        if not message.error or message.ns != self.namespace:
            return
        logger.warning("the store can't be used as it should: %s", message.error)
        self._refused = message.refused
