"""How fast the engine computes prompts, from the steps that it makes.

A step begins when it is planned, or when the one before has ended: an engine that plans ahead has
several under way. Only steps with a good part of a prompt in them count, so idle ones do not, nor
those that decode; what such a step decodes beside belongs to the price of a prompt here and now.
"""

from __future__ import annotations

from collections.abc import Callable

from ucm.integration.engine.rates import Recent

# What is computed in a step of fewer tokens takes as long as the step does for nothing.
MIN_TOKENS = 256
_MAX_OPEN = 64


class PrefillMeter:
    """Owned by the engine's thread. `max_step_tokens`: as many as a step can have."""

    def __init__(self, max_step_tokens: int, clock: Callable[[], float]) -> None:
        self._min_tokens = max(1, min(MIN_TOKENS, max_step_tokens // 2))
        self._clock = clock
        self._recent = Recent()
        self._open: dict[int, tuple[int, float]] = {}
        self._number = 0
        self._last_end_s = 0.0

    def begin(self, num_tokens: int) -> int:
        """A step with so many tokens of prompts is planned. Its number, for `ended`; 0: nobody
        wants to hear of its end."""
        if num_tokens < self._min_tokens:
            return 0
        while len(self._open) >= _MAX_OPEN:
            del self._open[next(iter(self._open))]
        self._number += 1
        self._open[self._number] = num_tokens, self._clock()
        return self._number

    def ended(self, number: int) -> None:
        """The very first is left out: it warms up what the others find warm."""
        now_s = self._clock()
        num_tokens, planned_s = self._open.pop(number, (0, now_s))
        if num_tokens and number > 1:
            self._recent.add(num_tokens, now_s - max(planned_s, self._last_end_s))
        self._last_end_s = now_s

    def token_s(self) -> float | None:
        """Seconds for a token of a prompt; None: not known yet."""
        return self._recent.each_s()
