"""How long things take, learnt from those that were done lately. Pure.

One that was far too slow, or too fast, changes nothing: everything is a median. After a change all
that is remembered is of the new kind within WINDOW samples, and half of it decides before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

WINDOW = 8
# With fewer, one that is far off could decide.
MIN_SAMPLES = 3
# Amounts that are as alike as this say nothing about what is the same for all of them.
_UNLIKE = 2.0


@dataclass(frozen=True)
class Sample:
    """So much of something (more than 0) took so long."""

    amount: float
    seconds: float


@dataclass(frozen=True)
class LoadTime:
    """`first_s` whatever the amount, and `each_s` for each of it."""

    first_s: float
    each_s: float

    def seconds(self, amount: float) -> float:
        return self.first_s + self.each_s * amount


class Recent:
    """The last samples of one kind."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque(maxlen=WINDOW)

    def add(self, amount: float, seconds: float) -> None:
        self._samples.append(Sample(amount, max(0.0, seconds)))

    def line(self) -> LoadTime | None:
        return line_through(tuple(self._samples))

    def each_s(self) -> float | None:
        """Seconds for each, of the larger amounts: small ones mostly show what is the same for
        all."""
        if len(self._samples) < MIN_SAMPLES:
            return None
        amounts = sorted(sample.amount for sample in self._samples)
        least = min(amounts[-1] / _UNLIKE, amounts[-MIN_SAMPLES])
        return _each_s([sample for sample in self._samples if sample.amount >= least])


def line_through(samples: Sequence[Sample]) -> LoadTime | None:
    """Through the middle of the smaller and that of the larger half (Tukey's resistant line), or,
    where these are too few or too much alike, through the middle of all and nothing. None: too few
    samples to say anything."""
    if len(samples) < MIN_SAMPLES:
        return None
    by_amount = sorted(samples, key=lambda sample: sample.amount)
    half = len(by_amount) // 2
    if half >= MIN_SAMPLES:
        small, large = _middle(by_amount[:half]), _middle(by_amount[-half:])
        more, longer_s = large.amount - small.amount, large.seconds - small.seconds
        if large.amount >= _UNLIKE * small.amount and longer_s > 0:
            each_s = longer_s / more
            first_s = small.seconds - each_s * small.amount
            if first_s > 0:
                return LoadTime(first_s, each_s)
    return LoadTime(0.0, _each_s(samples))


def _middle(samples: Sequence[Sample]) -> Sample:
    """One of them: a middle amount and a middle time might belong to none."""
    return sorted(samples, key=_rate)[(len(samples) - 1) // 2]


def _each_s(samples: Sequence[Sample]) -> float:
    return median(map(_rate, samples))


def _rate(sample: Sample) -> float:
    return sample.seconds / sample.amount
