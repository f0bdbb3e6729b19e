"""One server behind the proxy: what it runs, and what is held against it.

Fewest requests are where requests fail fastest. So an instance that has just failed is not the
least loaded for a while: before its breaker opens, and where it never does because other requests
succeed there. And one that alone lacks what others have (a model, a key) is unfit for that kind of
request, and for no other.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from yarl import URL

from ucm.pd.fleet.breaker import Breaker

# Of what one instance is said to lack; the oldest goes first.
_MAX_UNFIT_KINDS = 64


class Role(str, Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    # Instances of one pool that do both; there is no prefill leg.
    WORKER = "worker"


@dataclass(eq=False)
class Instance:
    """One server. `running` requests and their `tokens` are those that this proxy has sent;
    `breaker` counts what becomes of them, `health` the looks at it. `waiting` are the tasks of
    those whose answer has not begun."""

    url: URL
    role: Role
    breaker: Breaker
    health: Breaker
    running: int = 0
    tokens: int = 0
    served: int = 0
    draining: bool = False
    # When something came from it last, whatever it was, and when something that it had to compute.
    heard_s: float = 0.0
    worked_s: float = 0.0
    waiting: set[asyncio.Task[Any]] = field(default_factory=set)
    # One of those who wait for it is asking another one (`silence`).
    has_scout: bool = False
    lost_why: str = ""
    # It has been said that it does not say what it finds cached.
    is_known_as_mute: bool = False
    _shunned_until_s: float = 0.0
    _unfit_until_s: dict[str, float] = field(default_factory=dict)

    @property
    def state(self) -> str:
        if self.draining:
            return "draining"
        states = (self.breaker.state, self.health.state)
        return next(state for state in ("open", "half-open", "closed") if state in states)

    @property
    def is_well(self) -> bool:
        return self.breaker.allows() and self.health.allows()

    @property
    def is_shunned(self) -> bool:
        return self.breaker.clock() < self._shunned_until_s

    def is_unfit(self, kind: str) -> bool:
        return self.breaker.clock() < self._unfit_until_s.get(kind, 0.0)

    def described(self) -> dict[str, object]:
        """For `GET /instances`."""
        return {
            "role": self.role.value,
            "url": str(self.url),
            "state": self.state,
            "running": self.running,
            "prompt_tokens": self.tokens,
            "served": self.served,
        }

    def begin(self) -> None:
        self.breaker.begin()
        self.health.begin()

    def ended(self) -> None:
        self.breaker.ended()
        self.health.ended()

    def heard(self) -> None:
        """Something came from it, whatever it was."""
        self.heard_s = self.breaker.clock()

    def worked(self) -> None:
        """Something came from it that a server does not say whose engine stands still."""
        self.worked_s = self.breaker.clock()

    def was_heard_since(self, at_s: float) -> bool:
        return self.heard_s >= at_s

    def has_worked_since(self, at_s: float) -> bool:
        return self.worked_s >= at_s

    def is_silent_for(self, time_s: float) -> bool:
        return self.breaker.clock() - self.heard_s >= time_s

    def succeeded(self) -> None:
        """It has done some work."""
        self.breaker.succeeded()
        self.health.succeeded()

    def failed(self) -> None:
        self.breaker.failed()
        self.shun(self.breaker.open_s)

    def shun(self, for_s: float) -> None:
        """Others come first for so long."""
        self._shunned_until_s = max(self._shunned_until_s, self.breaker.clock() + for_s)

    def lacks(self, kind: str) -> None:
        """Others have what requests of this kind need."""
        self._unfit_until_s.pop(kind, None)
        while len(self._unfit_until_s) >= _MAX_UNFIT_KINDS:
            del self._unfit_until_s[next(iter(self._unfit_until_s))]
        self._unfit_until_s[kind] = self.breaker.clock() + self.breaker.open_s

    def lose(self, why: str) -> None:
        """Nothing is expected of it any more: those who wait may ask another one."""
        self.lost_why = why
        for task in self.waiting:
            task.cancel()


async def drop(task: asyncio.Task[Any]) -> None:
    """Ends it. What it may have found in the meantime nobody will read."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled() and task.exception() is None:
        close = getattr(task.result(), "close", None)
        if close is not None:
            close()
