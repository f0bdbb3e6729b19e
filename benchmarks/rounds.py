"""Engines that take turns are compared round by round, so that what changes on the machine changes
for all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ratios(of: Sequence[float], to: Sequence[float]) -> list[float]:
    """Of each round."""
    return [a / b for a, b in zip(of, to, strict=True)]


def quartiles(of_rounds: Sequence[float]) -> str:
    """The median, and the quartiles around it."""
    low, middle, high = np.percentile(of_rounds, (25, 50, 75))
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"
