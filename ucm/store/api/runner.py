"""Drives the steps of all tasks of one store: each goes on when it has what it has yielded for.

Nothing waits here: whoever owns a runner calls it when there is something to do, and sleeps no
longer than until `next_s`.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from ucm.errors import UcmError
from ucm.store.api.steps import Ask, Need, NodeLost, Pause, ReserveTurn, Steps, Tell, TurnOver
from ucm.store.api.tasks import Task
from ucm.store.client.session import NodeSession
from ucm.store.node import protocol as p

# In place of what a task needs: it comes later.
_LATER: Final = object()


@dataclass(eq=False, slots=True)
class _RunningTask:
    task: Task
    steps: Steps[object]
    has_begun: bool = False
    is_hearing: bool = False
    heard: deque[Any] = field(default_factory=deque)
    num_unanswered: int = 0
    # Of these the lookups.
    lookups: set[int] = field(default_factory=set)


class TaskRunner:
    """Owned by the store's thread, but for `num_tasks`."""

    def __init__(self, session: NodeSession) -> None:
        self._session = session
        self._running: dict[Task, _RunningTask] = {}
        self._timers: list[tuple[float, int, _RunningTask]] = []
        # When which task is late; those that have ended are taken out when it is their time.
        self._deadlines: list[tuple[float, int, Task]] = []
        self._numbers = itertools.count()
        self._turns: deque[_RunningTask] = deque()
        self._has_turn: _RunningTask | None = None

    @property
    def num_tasks(self) -> int:
        return len(self._running)

    def begin(self, task: Task, steps: Steps[object]) -> None:
        """At once, or when there is a node cache."""
        running = self._running[task] = _RunningTask(task, steps)
        heapq.heappush(self._deadlines, (task.deadline_s, next(self._numbers), task))
        if self._session.is_met:
            self._go_on(running)

    def node_lost(self) -> None:
        self._timers.clear()
        self._turns.clear()
        self._has_turn = None
        for running in self._running.values():
            running.is_hearing = False
            running.heard.clear()
            running.num_unanswered = 0
            running.lookups.clear()

    def node_met(self) -> None:
        """Another one: all tasks go on with it, or fail."""
        for running in list(self._running.values()):
            self._go_on(running, error=NodeLost() if running.has_begun else None)

    def go_on(self) -> None:
        """Those whose pause is over, and whose turn it is."""
        now_s = time.monotonic()
        while self._timers and self._timers[0][0] <= now_s:
            self._go_on(heapq.heappop(self._timers)[2])
        while self._turns and self._has_turn is None:
            running = self._turns.popleft()
            if not running.task.has_ended:
                self._has_turn = running
                self._go_on(running)

    def late(self) -> Iterator[Task]:
        """Those that have not ended in their time. The caller fails each of them."""
        now_s = time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now_s:
            task = heapq.heappop(self._deadlines)[2]
            if not task.has_ended:
                yield task

    def next_s(self) -> float:
        """When (time.monotonic()) there is something to do without any news."""
        while self._deadlines and self._deadlines[0][2].has_ended:
            heapq.heappop(self._deadlines)
        pause_s = self._timers[0][0] if self._timers else math.inf
        late_s = self._deadlines[0][0] if self._deadlines else math.inf
        return min(pause_s, late_s)

    def fail(self, task: Task, error: UcmError) -> None:
        self._end(self._running[task], partial(task.fail, error))

    def withdraw(self, task: Task) -> None:
        """Nobody wants its result."""
        self._end(self._running[task], partial(task.finish, None))

    def fail_all(self, error: UcmError) -> None:
        for task in list(self._running):
            self.fail(task, error)

    # -- one task --------------------------------------------------------------------------

    def _go_on(
        self, running: _RunningTask, value: object = None, *, error: NodeLost | None = None
    ) -> None:
        """With what it has yielded for, until it has to wait again, or has ended."""
        if running.task.has_ended:
            return
        running.has_begun = True
        steps = running.steps
        try:
            need = steps.send(value) if error is None else steps.throw(error)
            while (value := self._supply(running, need)) is not _LATER:
                need = steps.send(value)
        except StopIteration as end:
            self._end(running, partial(running.task.finish, end.value))
        except UcmError as failed:
            self._end(running, partial(running.task.fail, failed))

    def _supply(self, running: _RunningTask, need: Need) -> object:
        if isinstance(need, Ask):
            running.num_unanswered += 1
            if isinstance(need.question, p.Lookup):
                running.lookups.add(need.question.id)
            self._session.ask(need.question, partial(self._answered, running, need))
            return need.question.id
        if isinstance(need, Tell):
            self._session.send(need.message)
            return None
        if isinstance(need, ReserveTurn):
            if self._has_turn is running:
                return None
            self._turns.append(running)
            return _LATER
        if isinstance(need, TurnOver):
            self._end_turn(running)
            return None
        running.task.waits_for = need.waits_for or running.task.waits_for
        if isinstance(need, Pause):
            at_s = time.monotonic() + need.delay_s
            heapq.heappush(self._timers, (at_s, next(self._numbers), running))
            return _LATER
        if running.heard:
            return running.heard.popleft()
        running.is_hearing = True
        return _LATER

    def _answered(self, running: _RunningTask, ask: Ask, reply: p.NodeMessage) -> None:
        running.num_unanswered -= 1
        running.lookups.discard(ask.question.id)
        if running.task.has_ended:
            message = ask.undo(reply)
            if message is not None:
                self._session.send(message)
            self._end_turn(running)
        elif running.is_hearing:
            running.is_hearing = False
            self._go_on(running, reply)
        else:
            running.heard.append(reply)

    def _end(self, running: _RunningTask, tell: Callable[[], None]) -> None:
        """`tell` comes last: the user may do anything with the task's memory then."""
        del self._running[running.task]
        running.steps.close()
        self._withdraw_lookups(running)
        self._end_turn(running)
        tell()

    def _withdraw_lookups(self, running: _RunningTask) -> None:
        """Their pages would be held for nobody."""
        for lookup_id in running.lookups:
            self._session.release(lookup_id)
        running.num_unanswered -= len(running.lookups)
        running.lookups.clear()

    def _end_turn(self, running: _RunningTask) -> None:
        """Not before it is known what was reserved."""
        if self._has_turn is running and not running.num_unanswered:
            self._has_turn = None
