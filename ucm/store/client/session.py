"""One client's view of the node cache: its namespace, its questions, and who hears of what.

Wraps the lasting connection (`NodeLink`), so that its user needn't know when that was made anew:
`on_lost` says that whatever was asked or promised is gone, `on_met` that there is another node
cache, which is opening the namespace. Each door of the store is such a user: the scheduler side of
an engine, and the store API.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from typing import Any, overload

from ucm.outcome import Outcome
from ucm.store.client.connection import NodeClient
from ucm.store.client.link import NodeLink
from ucm.store.node import protocol as p
from ucm.store.node.notices import Notices

logger = logging.getLogger(__name__)


def _say_trouble(opened: p.NamespaceOpened) -> None:
    if opened.error:
        logger.warning("the store can't be used as it should: %s", opened.error)


class NodeSession:
    """Owned by one thread, which polls it and on which the handlers are called; its user sets them.
    `namespaces` are the numbers of those that are open now, `namespace` is the first."""

    def __init__(
        self,
        link: NodeLink,
        *openings: p.OpenNamespace,
        world_size: int = 0,
        dump_timeout_s: float = 0.0,
        log_path: str = "",
    ) -> None:
        """Nothing is ready before `world_size` ranks have mapped the memory. Storing goes on for
        `dump_timeout_s` of silence. `log_path` is the node cache's, for people."""
        self.on_met: Callable[[], None] = lambda: None
        self.on_lost: Callable[[], None] = lambda: None
        self.on_opened: Callable[[p.NamespaceOpened], None] = _say_trouble
        self.on_saving: Callable[[p.SavingNews], None] = lambda news: None
        self.on_status: Callable[[p.Status], None] = lambda status: None
        self._link = link
        self._log_path = log_path
        self._openings = openings
        self._world_size = world_size
        self._dump_timeout_s = dump_timeout_s
        self._ids = itertools.count(1)
        # Who waits for the answer to which question.
        self._unanswered: dict[int, Callable[[Any], None]] = {}
        self._seen_generation = link.generation
        self._opened_generation = -1
        self._refused: set[int] = set()
        self._heard_s = 0.0
        self._silent_since_s: float | None = None
        self._allowance_s = 0.0
        self._has_news = False
        self._notices = Notices(time.monotonic)

    @property
    def namespaces(self) -> tuple[int, ...]:
        return tuple(opening.ns for opening in self._openings)

    @property
    def namespace(self) -> int:
        return self._openings[0].ns

    # -- the node cache of now -------------------------------------------------------------

    @property
    def generation(self) -> int:
        return self._link.generation

    @property
    def told_generation(self) -> int:
        """As far as `on_lost` has told: whatever was answered before was answered in this one. A
        loss that a message has met shows in `generation` at once, and is told by the next poll."""
        return self._seen_generation

    @property
    def connection(self) -> NodeClient | None:
        """For who waits for several things at once. Valid until the next `poll`."""
        return self._link.client

    @property
    def problem(self) -> Exception | None:
        """Why there is no connection; None while nothing has gone wrong. From any thread."""
        return self._link.problem

    @property
    def is_met(self) -> bool:
        """There is a node cache, and `on_met` was called for it."""
        return self._link.client is not None and self._opened_generation == self._link.generation

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
        return self.is_met and not self._refused and self._link.ranks_ready >= self._world_size

    @property
    def why_not_ready(self) -> Outcome:
        """As a reason for what is computed instead."""
        if self._refused:
            return Outcome.NAMESPACE
        return Outcome.IO_ERROR if self._silent_since_s is None else Outcome.TIMEOUT

    def was_heard_since(self, since_s: float) -> bool:
        """Whether the node cache has said anything after `since_s` (time.monotonic())."""
        return self._heard_s > since_s

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

    # -- what is said ----------------------------------------------------------------------

    def next_id(self) -> int:
        """For a question of this session: no other has it."""
        return next(self._ids)

    @overload
    def ask(self, question: p.Lookup, on_answer: Callable[[p.LookupReply], None]) -> None: ...
    @overload
    def ask(self, question: p.Reserve, on_answer: Callable[[p.ReserveReply], None]) -> None: ...
    @overload
    def ask(self, question: p.Find, on_answer: Callable[[p.Found], None]) -> None: ...
    @overload
    def ask(
        self, question: p.GetManifest, on_answer: Callable[[p.ManifestFound], None]
    ) -> None: ...
    def ask(
        self,
        question: p.Lookup | p.Reserve | p.Find | p.GetManifest,
        on_answer: Callable[[Any], None],
    ) -> None:
        """Sends a question that has an id of `next_id`. Its answer comes in a later `poll`, or
        never: when the node cache is lost, which `on_lost` says."""
        self._unanswered[question.id] = on_answer
        self._link.send(question)

    def release(self, lookup_id: int) -> None:
        """Gives back the pins of an answered lookup, or withdraws an unanswered one."""
        self._unanswered.pop(lookup_id, None)
        self._link.send(p.Release(lookups=[lookup_id]))

    def send(self, message: p.ClientMessage) -> None:
        """What has no answer. A message to a lost node cache is dropped: `on_lost` cleans up at the
        next poll."""
        self._link.send(message)

    def reopen(self, *openings: p.OpenNamespace) -> None:
        """Everything that follows is about other namespaces."""
        self._openings = openings
        self._refused.clear()
        if self._opened_generation == self._link.generation:
            self._open_all()

    def close(self) -> None:
        self._link.close()

    # -- what is heard ---------------------------------------------------------------------

    def poll(self, timeout_s: float = 0.0) -> None:
        """Hands out what has arrived; waits at most `timeout_s` for it."""
        messages = self._link.poll(timeout_s)
        if self._link.generation != self._seen_generation:
            self._seen_generation = self._link.generation
            self._unanswered.clear()
            self.on_lost()
        generation = self._link.generation
        if self._link.client is not None and self._opened_generation != generation:
            self._opened_generation = generation
            self._silent_since_s = None
            self._refused.clear()
            self._unanswered.clear()
            self._open_all()
            if self._link.generation == generation:  # it has not gone again
                self.on_met()
        if messages:
            self._heard_s = time.monotonic()
            self._silent_since_s = None
            self._has_news = True
        for message in messages:
            self._hand_out(message)

    def _open_all(self) -> None:
        for opening in self._openings:
            self._link.send(opening)

    def _hand_out(self, message: p.NodeMessage) -> None:
        if isinstance(message, (p.LookupReply, p.ReserveReply, p.Found, p.ManifestFound)):
            on_answer = self._unanswered.pop(message.id, None)
            if on_answer is not None:
                on_answer(message)
        elif isinstance(message, p.SavingNews):
            self.on_saving(message)
        elif isinstance(message, p.NamespaceOpened):
            if message.ns in self.namespaces:
                if message.refused and message.error:
                    self._refused.add(message.ns)
                self.on_opened(message)
        elif isinstance(message, p.Notice):
            logger.warning("the node cache (its log: %s): %s", self._log_path, message.text)
        elif isinstance(message, p.Status):
            self.on_status(message)

    def take_news(self) -> bool:
        """Whether anything has arrived since this was last asked."""
        had, self._has_news = self._has_news, False
        return had

    # -- waiting for it, within the allowance of an engine's step -----------------------------

    def may_wait(self, allowance_s: float) -> None:
        """How long to wait from now on, in all."""
        self._allowance_s = allowance_s

    def wait_at_least(self, allowance_s: float) -> None:
        """As much is left again for what can't be asked for later."""
        self._allowance_s = max(self._allowance_s, allowance_s)

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
