"""How long a step may wait for what others bring. vLLM steps as fast as it can meanwhile."""

from __future__ import annotations

# How long the connector may wait for news in a step. One that computes nothing has nobody to hold
# up, and vLLM steps as fast as it can while all its requests wait: on a machine with few cores that
# takes one from whoever brings what they wait for.
# Idle steps that hear nothing wait longer and longer, and the ranks as long as any for a load that
# they copy: each step between takes a core from it. An answer and a load's end end the wait, a new
# request has to wait for its end.
STEP_WAIT_S = 0.001
IDLE_WAIT_S = 0.005
IDLE_WAIT_MAX_S = 0.02


class StepWaits:
    """How long the next step may wait. Owned by the engine's thread."""

    def __init__(self) -> None:
        self._idle_s = IDLE_WAIT_S

    def next_s(self, *, holds_up: bool, expects_news: bool) -> float:
        """`holds_up`: somebody waits for the step's end."""
        if holds_up:
            self._idle_s = IDLE_WAIT_S
            return STEP_WAIT_S
        wait_s = IDLE_WAIT_S if expects_news else self._idle_s
        self._idle_s = min(2 * wait_s, IDLE_WAIT_MAX_S)
        return wait_s
