"""A store's thread: it alone talks to the node cache, copies, and ends tasks.

    any thread     start(steps) ──► queue ──► wake
    the thread     sleep ──► news of the node cache ──► tasks go on (`runner.py`) ──► sleep

It owns the session and what tasks share. When the node cache is lost, tasks begin again with the
next one. A task that has not ended after `timeout_s` fails, whatever it waits for.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol, TypeAlias

from ucm.config.settings import StoreSettings
from ucm.errors import ConfigError, NodeUnavailable, TaskFailed, UcmError
from ucm.outcome import Outcome
from ucm.store.api.dumps import Shared
from ucm.store.api.open_blocks import OpenBlocks
from ucm.store.api.pages import Pages
from ucm.store.api.questions import NAMESPACE, Questions, abort
from ucm.store.api.runner import TaskRunner
from ucm.store.api.steps import Steps
from ucm.store.api.tasks import Task
from ucm.store.api.unsaved import Unsaved, not_written
from ucm.store.api.waker import Waker
from ucm.store.blocks import namespace
from ucm.store.client.link import NodeLink
from ucm.store.client.session import NodeSession
from ucm.store.client.start import log_path
from ucm.store.node import protocol as p
from ucm.store.node.lock import why_held_up
from ucm.store.node.notices import Notices

logger = logging.getLogger(__name__)

MAX_TASKS: Final = 8192
_CONNECTING_POLL_S: Final = 0.01
_IDLE_POLL_S: Final = 1.0
_CLOSE_S: Final = 5.0
# A node cache needs a while to start, however short the tasks are.
_START_S: Final = 15.0

# Of a task, from what it may ask.
MakeSteps: TypeAlias = Callable[[Questions], Steps[Any]]


class PageShape(Protocol):
    """How pages are made of shards, and which namespace they are of."""

    @property
    def shard_bytes(self) -> int: ...

    @property
    def num_shards(self) -> int: ...

    @property
    def page_bytes(self) -> int: ...

    def manifest(self) -> namespace.Manifest: ...


class Driver:
    """See the module's text. What stands under "from any thread" is for those, and so is
    `shared.unsaved`. `on_step` and `on_status` are called on the store's own."""

    def __init__(
        self,
        settings: StoreSettings,
        shape: PageShape,
        *,
        name: str,
        timeout_s: float,
        patience_s: float = 0.0,
    ) -> None:
        """`patience_s` is for `is_silent`."""
        self.on_step: Callable[[NodeSession], None] = lambda session: None
        self.on_status: Callable[[p.Status], None] = lambda status: None
        self.shared = Shared(
            Pages(shard_bytes=shape.shard_bytes),
            OpenBlocks(num_shards=shape.num_shards, timeout_s=timeout_s),
            Unsaved(),
        )
        self.log_path = log_path(settings)
        self._timeout_s = timeout_s
        self._socket_path = settings.socket_path
        link = NodeLink(settings, engine_id=name, role="store")
        self._session = NodeSession(
            link, _opening(shape), dump_timeout_s=patience_s, log_path=self.log_path
        )
        self._session.on_met = self._node_met
        self._session.on_lost = self._node_lost
        self._session.on_opened = self._namespace_opened
        self._session.on_saving = self._note_saving
        self._session.on_status = self._note_status
        self._runner = TaskRunner(self._session)
        self._new: deque[tuple[Task, Steps[Any]]] = deque()
        self._withdrawn: deque[Task] = deque()
        self._opened = threading.Event()
        self._ended_by: UcmError | None = None
        self._closing = False
        self._expired_blocks_s = time.monotonic()
        self._notices = Notices(time.monotonic)
        self._waker = Waker()
        self._thread = threading.Thread(target=self._run, name="ucm-store", daemon=True)
        self._thread.start()

    # -- from any thread -------------------------------------------------------------------

    def wait_opened(self) -> None:
        """Until the node cache has opened this store's namespace. Raises NodeUnavailable, or
        ConfigError if that can't work."""
        started_s = time.monotonic()
        deadline_s = started_s + max(_START_S, self._timeout_s)
        while not self._opened.wait(_CONNECTING_POLL_S):
            if isinstance(self._session.problem, ConfigError):
                raise self._session.problem
            if time.monotonic() > deadline_s:
                raise self._no_node_cache(time.monotonic() - started_s)
        if self._ended_by is not None:
            raise self._ended_by

    def _no_node_cache(self, waited_s: float) -> NodeUnavailable:
        said, log = why_held_up(self._socket_path), self.log_path
        if not self.shared.pages.capacity_bytes:
            why = self._session.problem or said or "it takes too long to start"
            return NodeUnavailable(f"there is no node cache: {why}; its log: {log}")
        who = said or "it has greeted this store and said nothing since"
        return NodeUnavailable(
            f"the node cache has not answered for {waited_s:.0f} s: {who}; its log: {log}"
        )

    @property
    def is_ready(self) -> bool:
        return not self.why_not_ready

    @property
    def why_not_ready(self) -> Outcome:
        """FINE if there is a node cache that has opened the namespace, and the last task that was
        late was not so because nobody had answered."""
        if self._ended_by is not None:
            return Outcome.NAMESPACE
        if self._opened.is_set() and self._session.is_ready:
            return Outcome.FINE
        return self._session.why_not_ready

    @property
    def is_silent(self) -> bool:
        """There is a node cache that has left a task without an answer, and has said nothing for
        `patience_s` since: what is asked of it only piles up."""
        return self._session.is_met and not self._session.can_store

    def start(self, make_steps: MakeSteps, *, timeout_s: float | None = None) -> Task:
        """A task that ends by itself in `timeout_s` (the store's). Raises the error that ended this
        store, or TaskFailed when too many tasks are open."""
        self._waker.check_process()
        if self._runner.num_tasks + len(self._new) >= MAX_TASKS:
            raise TaskFailed(f"{MAX_TASKS} tasks are under way: wait for some of them")
        task = Task(self._timeout_s if timeout_s is None else timeout_s)
        steps = make_steps(Questions(self._session.next_id, task.deadline_s))
        self._new.append((task, steps))
        # Only now, so that no task comes after the thread's last look.
        if self._ended_by is not None:
            raise self._ended_by
        self._waker.wake()
        return task

    def withdraw(self, task: Task) -> None:
        """Nobody waits for it any more: it ends soon, without a result, if it has not."""
        self._withdrawn.append(task)
        self._waker.wake()

    @property
    def has_ended(self) -> bool:
        """Nothing of a user's memory is touched any more."""
        return not self._thread.is_alive()

    def close(self) -> None:
        """Fails what is under way and gives everything back. May be repeated."""
        if not self._waker.is_of_this_process:
            return  # all of it is the parent's
        self._closing = True
        self._waker.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE_S)

    # -- the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        error: UcmError = TaskFailed("the store was closed")
        try:
            while not self._closing:
                self._step()
        except Exception as bug:
            logger.exception("the store's thread has failed")
            error = TaskFailed(f"the store's thread has failed: {type(bug).__name__}: {bug}")
        finally:
            self._ended_by = self._ended_by or error
            self._opened.set()
            self._runner.fail_all(self._ended_by)
            while self._new:
                self._new.popleft()[0].fail(self._ended_by)
            self._session.close()
            self.shared.pages.unmap()
            self._waker.close()

    def _step(self) -> None:
        self._sleep()
        self._session.poll()
        # Only those that are known below: each was started before it was withdrawn.
        withdrawn = [self._withdrawn.popleft() for _ in range(len(self._withdrawn))]
        while self._new:
            self._runner.begin(*self._new.popleft())
        for task in withdrawn:
            if not task.has_ended:
                self._runner.withdraw(task)
        self._runner.go_on()
        for task in self._runner.late():
            late = f"timed out after {task.timeout_s:g} s, waiting for {self._waits_for(task)}"
            self._runner.fail(task, TaskFailed(late))
            if self._session.is_met and not self._session.was_heard_since(task.began_s):
                self._session.found_silent()
        self._expire_blocks()
        self.on_step(self._session)

    def _sleep(self) -> None:
        """Until there is something to do: a new task, a message, a pause's end, a deadline."""
        connection = self._session.connection
        wait_s = _CONNECTING_POLL_S if connection is None else _IDLE_POLL_S
        wait_s = min(wait_s, self._runner.next_s() - time.monotonic())
        poller = select.poll()
        poller.register(self._waker, select.POLLIN)
        if connection is not None:
            events = select.POLLIN | (select.POLLOUT if connection.has_unsent else 0)
            poller.register(connection, events)
        poller.poll(max(0.0, wait_s * 1000))
        self._waker.clear()

    def _waits_for(self, task: Task) -> str:
        """A node cache that lives answers before a task ends, whatever storage does."""
        if self._session.is_met and self._session.was_heard_since(task.began_s):
            return task.waits_for
        return why_held_up(self._socket_path) or task.waits_for

    def _expire_blocks(self) -> None:
        now_s = time.monotonic()
        if now_s - self._expired_blocks_s >= _IDLE_POLL_S:
            self._expired_blocks_s = now_s
            reserved = self.shared.blocks.expire()
            if reserved:
                self._session.send(abort(reserved))

    # -- what the session says -------------------------------------------------------------

    def _node_met(self) -> None:
        connection = self._session.connection
        assert connection is not None
        self.shared.pages.map(connection)
        self._runner.node_met()

    def _node_lost(self) -> None:
        self._runner.node_lost()
        self.shared.blocks.node_lost()
        self.shared.pages.unmap()

    def _namespace_opened(self, opened: p.NamespaceOpened) -> None:
        if opened.refused:
            logger.error("the store can't be used: %s", opened.error)
            self._ended_by = ConfigError(opened.error)
            self._closing = True
        elif opened.error:
            logger.warning("pages may not reach storage: %s", opened.error)
        self._opened.set()

    def _note_status(self, status: p.Status) -> None:
        self.on_status(status)

    def _note_saving(self, news: p.SavingNews) -> None:
        refused = self.shared.unsaved.heard(news)
        if refused:
            self._notices.warn("not written", f"{not_written(refused)}; flush() tries once more")


def _opening(shape: PageShape) -> p.OpenNamespace:
    manifest = shape.manifest()
    return p.OpenNamespace(
        ns=NAMESPACE,
        fingerprint=namespace.fingerprint(manifest),
        page_bytes=shape.page_bytes,
        block_tokens=manifest.block_tokens,
        manifest=namespace.to_json(manifest),
    )
