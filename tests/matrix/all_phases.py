"""The phases of the matrix by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tests.matrix import phases
from tests.matrix.phases import Bench
from tests.matrix.reclaim_phase import reclaiming

PHASES: Final[dict[str, Callable[[Bench], object]]] = {
    "dump": phases.dumping,
    "load": phases.loading,
    "lookup": phases.looking_up,
    "start": phases.starting,
    "first start": phases.starting_first,
    "reclaim": reclaiming,
}
