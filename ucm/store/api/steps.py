"""What a task of the store API does, as steps: a generator that yields what it needs to go on.

    number = yield Ask(question)   asks the node cache, and goes on at once
    reply = yield Hear()           waits for the next answer to what this task has asked
    yield Tell(message)            what has no answer; goes on at once
    yield Pause(delay_s)           waits
    yield ReserveTurn()            waits until it alone may reserve, which it may until `TurnOver()`

So a task is read from top to bottom, and needs neither a thread nor a connection: a test can drive
it by hand. While it waits, others go on (`runner.py`). It returns its result, or raises TaskFailed.
When the node cache is lost, and there is another one, NodeLost is raised where the task waits.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from ucm.errors import UcmError
from ucm.store.node import protocol as p

_T = TypeVar("_T")

Question: TypeAlias = p.Lookup | p.Find | p.Reserve
# How often a full node cache is asked again.
RETRY_S = 0.02


class NodeLost(UcmError):
    """The answers to whatever was asked will never come, and what was reserved is gone."""

    def __init__(self) -> None:
        super().__init__("the node cache was lost")


@dataclass(frozen=True, slots=True)
class Ask:
    """Gives the question's id. When the task ends before the answer, a lookup is withdrawn, and any
    other answer is undone by a message."""

    question: Question
    undo: Callable[[Any], p.ClientMessage | None] = lambda reply: None


@dataclass(frozen=True, slots=True)
class Hear:
    """Gives the answer. `waits_for`: what a task that is late was waiting for, for people; empty
    for what it has waited for before."""

    waits_for: str = ""


@dataclass(frozen=True, slots=True)
class Tell:
    message: p.ClientMessage


@dataclass(frozen=True, slots=True)
class Pause:
    """`waits_for` as in `Hear`."""

    delay_s: float
    waits_for: str = ""


@dataclass(frozen=True, slots=True)
class ReserveTurn:
    """Tasks get their turns in the order in which they ask. Who has it already goes on."""


@dataclass(frozen=True, slots=True)
class TurnOver:
    """So does the task's end; that of a task which has an unanswered question, its answer."""


Need: TypeAlias = Ask | Hear | Tell | Pause | ReserveTurn | TurnOver
Steps: TypeAlias = Generator[Need, Any, _T]
