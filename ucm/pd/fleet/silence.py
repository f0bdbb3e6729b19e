"""An instance that says nothing though its health is well: how it is told from one that computes.

Nobody knows how long an answer takes. So one request that has waited for longer than answers take
is asked elsewhere, a scout, if its instance has had nothing for anybody meanwhile. Where it is
answered there in less time than it had waited, and its instance is still silent, that one stands
still: it is left alone, and those who wait there follow. Where it is not, how long answers take is
known better.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ucm.pd.fleet.instance import Instance, drop

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
# Of the longest wait of late: answers differ.
_TIMES_LONGEST = 2.0
# By one answer; of a long wait half is forgotten after 70 answers.
_FORGETTING = 0.99
_LOOK_AGAIN_S = 1.0


class Patience:
    """How long the answers of one role took to begin, by what is asked. Pure."""

    def __init__(self, silent_after_s: float) -> None:
        self._silent_after_s = silent_after_s
        self._longest_s: dict[str, float] = {}

    def took(self, sort: str, time_s: float) -> None:
        self._longest_s[sort] = max(time_s, self._longest_s.get(sort, 0.0) * _FORGETTING)

    def limit_s(self, sort: str) -> float:
        return max(self._silent_after_s, _TIMES_LONGEST * self._longest_s.get(sort, 0.0))


class InstanceLost(ConnectionError):
    """Nothing is expected of it any more; `str` says why."""


class InstanceSilent(asyncio.TimeoutError):
    """Nothing has come from it for so long that another one is asked."""


@dataclass(frozen=True)
class _LeftTry:
    instance: Instance
    asked_s: float
    waited_s: float

    @property
    def is_silent(self) -> bool:
        return not self.instance.has_worked_since(self.asked_s)


@dataclass(eq=False)
class Scout:
    """One request, wherever it is asked in turn. `may_move` says whether another instance would
    take it now. To be closed. Owned by the event loop's thread."""

    patience: Patience
    sort: str
    may_move: Callable[[], bool]
    _left: list[_LeftTry] = field(default_factory=list)

    def pause_s(self, waited_s: float) -> float:
        """When to look again at how long it waits."""
        return max(self.patience.limit_s(self.sort) - waited_s, _LOOK_AGAIN_S)

    def leaves(self, instance: Instance, asked_s: float) -> bool:
        """Whether it goes elsewhere now: of those who wait for one instance one at a time does."""
        left = _LeftTry(instance, asked_s, instance.breaker.clock() - asked_s)
        is_due = left.waited_s >= self.patience.limit_s(self.sort)
        if not is_due or not left.is_silent or instance.has_scout or not self.may_move():
            return False
        instance.has_scout = True
        self._left.append(left)
        return True

    def answered(self, instance: Instance, took_s: float) -> None:
        """Its answer has begun, so long after `instance` was asked."""
        instance.worked()
        self.patience.took(self.sort, took_s)
        for left in self._left:
            if left.is_silent and took_s < left.waited_s:
                _give_up(left.instance, f"{instance.url} answered in {took_s:.1f} s")

    def close(self) -> None:
        for left in self._left:
            left.instance.has_scout = False
        self._left.clear()


def _give_up(instance: Instance, proof: str) -> None:
    why = f"it stands still: nothing came from it, and {proof}"
    logger.warning("%s %s is left alone: %s", instance.role.value, instance.url, why)
    instance.breaker.trip()
    instance.lose(why)


async def unless_lost(
    instance: Instance, asking: Coroutine[Any, Any, _T], scout: Scout | None = None
) -> _T:
    """What `asking` gives, unless the instance is lost first. Raises InstanceLost, InstanceSilent
    if the `scout` is to ask another one, and what it raises."""
    asked_s = instance.breaker.clock()
    task = asyncio.create_task(asking)
    instance.waiting.add(task)
    try:
        while not task.done():
            waited_s = instance.breaker.clock() - asked_s
            await asyncio.wait({task}, timeout=scout.pause_s(waited_s) if scout else None)
            if not task.done() and scout is not None and scout.leaves(instance, asked_s):
                waited_s = instance.breaker.clock() - asked_s
                raise InstanceSilent(f"nothing came from it for {waited_s:.0f} s")
    except BaseException:
        await drop(task)
        raise
    finally:
        instance.waiting.discard(task)
    if task.cancelled():
        raise InstanceLost(instance.lost_why)
    return task.result()
