"""Waits for something that storage may keep for ever, for so long and no longer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event
from typing import Final, TypeVar

from ucm.errors import UcmError

_T = TypeVar("_T")
_CLEAR_UP_S: Final = 10.0


@dataclass
class Trial:
    """What is being done now, as in "still listing the directory"; who sets `stop` ends it."""

    doing: str
    stop: Event = field(default_factory=Event)


def within(seconds: float, act: Callable[[], _T], trial: Trial) -> _T:
    """What `act` returns or raises. Raises TimeoutError if storage hangs, with what it hangs in;
    the thread that does is left behind. What is interrupted is stopped, and has a moment to clear
    up."""
    values: list[_T] = []
    raised: list[UcmError | OSError] = []
    # Not the thread's own end: a join that was interrupted takes it for ended (Python 3.11).
    has_ended = Event()

    def run() -> None:
        try:
            values.append(act())
        except (UcmError, OSError) as error:
            raised.append(error)
        finally:
            has_ended.set()

    threading.Thread(target=run, daemon=True).start()
    try:
        has_ended.wait(seconds)
    except KeyboardInterrupt:
        trial.stop.set()
        has_ended.wait(_CLEAR_UP_S)
        raise
    if raised:
        raise raised[0]
    if not values:
        raise TimeoutError(0, f"it hangs: after {seconds:.0f} s it is still {trial.doing}")
    return values[0]
