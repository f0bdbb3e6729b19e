"""Does something in a process of its own, which its parent need not wait for.

A process whose thread hangs in storage can't end, and neither can whoever waits for it. So what may
hang runs in a child that holds nothing of its parent's, and answers through a pipe.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from ucm.errors import UcmError

_T = TypeVar("_T")
_CLEAR_UP_S: Final = 12.0


class _ChildAnswer(msgspec.Struct):
    """`problem`: what it has raised instead."""

    value: msgspec.Raw = msgspec.Raw(b"null")
    problem: str = ""


def in_a_child(act: Callable[[], _T], kind: type[_T]) -> _T:
    """What `act` returns there, which must be JSON of this kind; it bounds its own time. To be
    called while no other thread runs. The child gets Ctrl-C as well, also when this process is told
    to end otherwise. Raises the UcmError that `act` raises, or one if it ends without an answer."""
    answer_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(answer_end)
        _answer(act, write_end)
    os.close(write_end)
    with open(answer_end, "rb") as pipe:
        try:
            # Not to its end, which never comes from one that hangs.
            answer = pipe.readline()
        except KeyboardInterrupt:
            os.kill(pid, signal.SIGINT)
            select.select([pipe], [], [], _CLEAR_UP_S)
            raise
    if not answer:
        raise UcmError("the process that looks at storage has ended without a word")
    answered = msgspec.json.decode(answer, type=_ChildAnswer)
    if answered.problem:
        raise UcmError(answered.problem)
    return msgspec.json.decode(answered.value, type=kind)


def _answer(act: Callable[[], object], write_end: int) -> None:
    """Never returns."""
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(nothing, fd)
        try:
            answer = _ChildAnswer(value=msgspec.Raw(msgspec.json.encode(act())))
        except UcmError as error:
            answer = _ChildAnswer(problem=str(error))
        with open(write_end, "wb") as pipe:
            pipe.write(msgspec.json.encode(answer) + b"\n")
    finally:
        os._exit(0)
