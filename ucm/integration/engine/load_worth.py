"""Is a hit worth its load? Pure: estimates and parts of a hit in, what to take of it out.

A hit in files is read into memory first, and what lies in memory is copied to the device. Either
is worth it if it takes less time than computing its tokens. While the engine does not know yet how
fast it computes, or how fast the others are, all is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

from ucm.integration.engine.rates import LoadTime
from ucm.store.node.protocol import ReadCosts

# As good as for ever, and still a number.
_NEVER = 1e9


@dataclass(frozen=True)
class Estimates:
    """Of one engine, for one token each: `compute_s` of a prompt, `copy` from memory to the device,
    `read` from files to memory. None: not known yet."""

    compute_s: float | None = None
    copy: LoadTime | None = None
    read: LoadTime | None = None


def worth_copying(num_tokens: int, estimates: Estimates) -> bool:
    """Whether to load what lies in memory."""
    if estimates.compute_s is None or estimates.copy is None:
        return True
    return estimates.copy.seconds(num_tokens) < estimates.compute_s * num_tokens


def read_costs(estimates: Estimates, *, block_tokens: int) -> ReadCosts | None:
    """What reading costs, in blocks that are computed meanwhile. The node cache, which knows what
    lies where, takes what is worth that. None: all is."""
    if estimates.compute_s is None or estimates.read is None:
        return None
    copy_s = estimates.copy.each_s if estimates.copy is not None else 0.0
    gained_s = (estimates.compute_s - copy_s) * block_tokens
    read_s = estimates.read.each_s * block_tokens
    return ReadCosts(_blocks(estimates.read.first_s, gained_s), _blocks(read_s, gained_s))


def _blocks(seconds: float, gained_s: float) -> float:
    """How many blocks, each of which gains so much, make up for `seconds`."""
    if seconds <= 0:
        return 0.0
    return min(_NEVER, seconds / gained_s) if gained_s > 0 else _NEVER
