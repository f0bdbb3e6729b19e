"""A store's thread: it alone talks to the node cache, copies, and ends tasks.

    any thread     start(task) ──► queue ──► wake
    the thread     begin ──► ask, copy, ask ... ──► finish or fail

It owns the connection and what tasks share: the mapped memory, the blocks that are partly dumped,
whose turn it is to reserve. When the node cache is lost, tasks begin again with the next one. A
task that has not ended after `timeout_s` fails, whatever it waits for.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import select
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from ucm.config.settings import StoreSettings
from ucm.errors import ConfigError, NodeUnavailable, TaskFailed, UcmError
from ucm.store.api.dumps import Dumped, DumpTask, OpenBlock, not_written
from ucm.store.api.shards import BlockShape
from ucm.store.api.tasks import Task
from ucm.store.api.waker import Waker
from ucm.store.blocks import namespace
from ucm.store.blocks.keys import Key
from ucm.store.client.connection import NodeClient
from ucm.store.client.link import NodeLink
from ucm.store.client.start import log_path
from ucm.store.node import protocol as p
from ucm.store.node.lock import why_held_up
from ucm.store.node.memory import MappedMemory
from ucm.store.node.notices import Notices

logger = logging.getLogger(__name__)

MAX_TASKS: Final = 8192
_REMEMBERED_DUMPS: Final = 1 << 16
_CONNECTING_POLL_S: Final = 0.01
_IDLE_POLL_S: Final = 1.0
_CLOSE_S: Final = 5.0
# A node cache needs a while to start, however short the tasks are.
_START_S: Final = 15.0
_MAP_BYTES: Final = 4 << 20


class Transfers:
    """See the module's text. `start`, `wait_opened` and `close` may be called from any thread."""

    NAMESPACE: Final = 1

    def __init__(
        self, settings: StoreSettings, shape: BlockShape, *, name: str, timeout_s: float
    ) -> None:
        self.blocks: dict[Key, OpenBlock] = {}
        self.capacity_bytes = 0
        # Dumped through this store, and not seen in storage yet, by block id.
        self.unsaved: OrderedDict[Key, Dumped] = OrderedDict()
        self._shape = shape
        self._manifest = shape.manifest()
        self._timeout_s = timeout_s
        self.log_path = log_path(settings)
        self._socket_path = settings.socket_path
        self._link = NodeLink(settings, engine_id=name, role="store")
        self._client: NodeClient | None = None
        self._memory: MappedMemory | None = None
        self._mapped: set[int] = set()
        self._opened = threading.Event()
        self._ended_by: UcmError | None = None
        self._new: deque[Task] = deque()
        self._tasks: OrderedDict[Task, None] = OrderedDict()
        self._asked: dict[int, Callable[[Any], None]] = {}
        self._numbers = itertools.count(1)
        self._heard_s = time.monotonic()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._turns: deque[DumpTask] = deque()
        self._turn_is_taken = False
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
            problem = self._link.problem
            if isinstance(problem, ConfigError):
                raise problem
            if time.monotonic() > deadline_s:
                if self.capacity_bytes:
                    raise NodeUnavailable(
                        f"the node cache has not answered for {time.monotonic() - started_s:.0f} s;"
                        f" its log may say why: {self.log_path}"
                    )
                why = problem or why_held_up(self._socket_path) or "it takes too long to start"
                raise NodeUnavailable(f"there is no node cache: {why}; its log: {self.log_path}")
        if self._ended_by is not None:
            raise self._ended_by

    def start(self, task: Task) -> None:
        """Raises the error that ended this store, or TaskFailed when too many tasks are open."""
        self._waker.check_process()
        if len(self._tasks) + len(self._new) >= MAX_TASKS:
            raise TaskFailed(f"{MAX_TASKS} tasks are under way: wait for some of them")
        task.deadline_s = time.monotonic() + self._timeout_s
        self._new.append(task)
        # Only now, so that no task comes after the thread's last look.
        if self._ended_by is not None:
            raise self._ended_by
        self._waker.wake()

    def close(self) -> None:
        """Fails what is under way and gives everything back. May be repeated."""
        if not self._waker.is_of_this_process:
            return  # all of it is the parent's
        self._closing = True
        self._waker.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE_S)

    # -- for tasks, on the thread ----------------------------------------------------------

    def ask(
        self, make_question: Callable[[int], p.ClientMessage], on_reply: Callable[[Any], None]
    ) -> int:
        """Sends a question with a number of its own, which is returned. There is no answer when the
        node cache is lost: the task begins again then."""
        number = next(self._numbers)
        self._asked[number] = on_reply
        self.send(make_question(number))
        return number

    def send(self, message: p.ClientMessage) -> None:
        self._link.send(message)

    def later(self, delay_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._numbers), call))

    def shard_address(self, offset: int, shard: int) -> int:
        """Where a shard of the page at `offset` lies in this process."""
        assert self._memory is not None
        start = offset + shard * self._shape.shard_bytes
        end = start + self._shape.shard_bytes
        for part in range(start // _MAP_BYTES, -(-end // _MAP_BYTES)):
            if part not in self._mapped:
                # Many page-table entries in one call: a fault for each would halve the first copy.
                self._mapped.add(part)
                nbytes = min(_MAP_BYTES, self.capacity_bytes - part * _MAP_BYTES)
                self._memory.populate(part * _MAP_BYTES, nbytes)
        return self._memory.address + start

    def want_turn(self, task: DumpTask) -> None:
        self._turns.append(task)

    def end_turn(self) -> None:
        self._turn_is_taken = False

    def commit(self, keys: Sequence[Key]) -> None:
        if keys:
            self.send(p.Commit(ns=self.NAMESPACE, keys=list(keys), parents=[b""] * len(keys)))

    def give_up(self, keys: Sequence[Key]) -> None:
        """Ends open blocks without committing them."""
        blocks = {key: self.blocks.pop(key) for key in keys}
        reserved = [key for key, block in blocks.items() if block.offset is not None]
        if reserved:
            self.send(p.Abort(ns=self.NAMESPACE, keys=list(reserved)))

    def note_dumped(self, blocks: Sequence[tuple[Key, bytes]]) -> None:
        for key, block_id in blocks:
            self.unsaved[key] = Dumped(block_id)
            self.unsaved.move_to_end(key)
        while len(self.unsaved) > _REMEMBERED_DUMPS:
            self.unsaved.popitem(last=False)

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
            self._fail_all(self._ended_by)
            self._link.close()
            self._memory = None
            self._waker.close()

    def _step(self) -> None:
        self._sleep()
        self._follow_link()
        while self._new:
            task = self._new.popleft()
            task.on_end = self._tasks.pop
            self._tasks[task] = None
            if self._client is not None:
                task.begin(self)
        self._run_timers()
        while self._turns and not self._turn_is_taken:
            dump = self._turns.popleft()
            if not dump.has_ended:
                self._turn_is_taken = True
                dump.on_turn(self)
        self._expire_tasks()
        self._expire_blocks()

    def _sleep(self) -> None:
        """Until there is something to do: a new task, a message, a timer, a deadline."""
        now_s = time.monotonic()
        # Not `_client`: a message that could not be sent has closed that one.
        client = self._link.client
        wait_s = _CONNECTING_POLL_S if client is None else _IDLE_POLL_S
        if self._timers:
            wait_s = min(wait_s, self._timers[0][0] - now_s)
        if self._tasks:
            wait_s = min(wait_s, next(iter(self._tasks)).deadline_s - now_s)
        poller = select.poll()
        poller.register(self._waker, select.POLLIN)
        if client is not None:
            events = select.POLLIN | (select.POLLOUT if client.has_unsent else 0)
            poller.register(client, events)
        poller.poll(max(0.0, wait_s * 1000))
        self._waker.clear()

    def _follow_link(self) -> None:
        messages = self._link.poll()
        if messages:
            self._heard_s = time.monotonic()
        client = self._link.client
        if client is not self._client:
            self._forget_node()
            self._client = client
            if client is not None:
                self._meet_node(client)
        for message in messages:
            self._handle(message)

    def _forget_node(self) -> None:
        """Whatever was asked has no answer any more, and partly dumped blocks are lost."""
        self._asked.clear()
        self._timers.clear()
        self._turns.clear()
        self._turn_is_taken = False
        for block in self.blocks.values():
            block.broken = block.broken or "the node cache was lost, and earlier shards with it"
        self._memory = None
        self._mapped.clear()

    def _meet_node(self, client: NodeClient) -> None:
        self.capacity_bytes = client.welcome.capacity_bytes
        self._memory = MappedMemory(client.memory_fd, self.capacity_bytes)
        self.send(
            p.OpenNamespace(
                ns=self.NAMESPACE,
                fingerprint=namespace.fingerprint(self._manifest),
                page_bytes=self._shape.page_bytes,
                block_tokens=self._manifest.block_tokens,
                manifest=namespace.to_json(self._manifest),
            )
        )
        for task in list(self._tasks):
            task.begin(self)

    def _handle(self, message: p.NodeMessage) -> None:
        if isinstance(message, p.NamespaceOpened):
            if message.refused:
                self._ended_by = ConfigError(message.error)
                self._closing = True
            elif message.error:
                logger.warning("pages may not reach storage: %s", message.error)
            self._opened.set()
        elif isinstance(message, p.SavingNews):
            self._note_saving(message)
        elif isinstance(message, (p.LookupReply, p.Found, p.ReserveReply)):
            on_reply = self._asked.pop(message.id, None)
            if on_reply is not None:
                on_reply(message)

    def _note_saving(self, news: p.SavingNews) -> None:
        refused = [self.unsaved[key] for key in map(Key, news.refused) if key in self.unsaved]
        for dumped in refused:
            dumped.refused = news.reason
        if refused:
            self._notices.warn("not written", f"{not_written(refused)}; flush() tries once more")
        for key in map(Key, news.saved):
            if key in self.unsaved:
                self.unsaved[key].refused = ""

    def _run_timers(self) -> None:
        now_s = time.monotonic()
        while self._timers and self._timers[0][0] <= now_s:
            heapq.heappop(self._timers)[2]()

    def _expire_tasks(self) -> None:
        """Tasks all have the same time, so the oldest is the first to be late."""
        now_s = time.monotonic()
        while self._tasks and now_s >= (task := next(iter(self._tasks))).deadline_s:
            late = f"timed out after {self._timeout_s:g} s, waiting for {self._waits_for(task)}"
            task.fail(TaskFailed(late))

    def _waits_for(self, task: Task) -> str:
        """A node cache that lives answers before a task ends, whatever storage does."""
        if self._client is not None and self._heard_s > task.deadline_s - self._timeout_s:
            return task.waits_for
        return why_held_up(self._socket_path) or task.waits_for

    def _expire_blocks(self) -> None:
        now_s = time.monotonic()
        if now_s - self._expired_blocks_s < _IDLE_POLL_S:
            return
        self._expired_blocks_s = now_s
        for key, block in list(self.blocks.items()):
            if now_s - block.touched_s < self._timeout_s:
                continue
            if block.broken:
                del self.blocks[key]
                continue
            logger.warning(
                "gave up a block of which only %d of %d shards were dumped within %g s",
                len(block.copied),
                self._shape.num_shards,
                self._timeout_s,
            )
            self.give_up([key])
            block.broken = "its other shards were dumped too long ago"
            block.offset = None
            block.touched_s = now_s
            self.blocks[key] = block

    def _fail_all(self, error: UcmError) -> None:
        while self._tasks:
            next(iter(self._tasks)).fail(error)
        while self._new:
            self._new.popleft().fail(error)
