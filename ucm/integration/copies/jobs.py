"""What is copied: pages, or parts of them, between device blocks and slots. Knows no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

# Of no node cache: a job in its memory fails at every rank.
NO_GENERATION = -1


class Direction(Enum):
    LOAD = "load"
    DUMP = "dump"


@dataclass(frozen=True)
class PagePart:
    """The blocks `block_ids` of a target hold the tokens [first_token, first_token + n) of the page
    whose slot starts at `slot_offset`; n is the number of blocks times the target's block size.

    With `tail_tokens` a dump is that of a tail of so many: its page has zeros behind them.
    `target` is a position in what the copy engine was made for (`CopyTarget`)."""

    slot_offset: int
    first_token: int
    block_ids: tuple[int, ...]
    tail_tokens: int = 0
    target: int = 0


@dataclass(frozen=True)
class CopyJob:
    """Copies of one request, in the memory of node cache `generation`. Every rank copies its part
    of every page and acknowledges the job once. `request_id` names the request that vLLM holds
    back until a load has arrived."""

    job_id: int
    request_id: str
    generation: int
    parts: tuple[PagePart, ...]


def by_target(parts: Iterable[PagePart]) -> dict[int, list[PagePart]]:
    """The parts of each target that has any, in their order."""
    grouped: dict[int, list[PagePart]] = {}
    for part in parts:
        grouped.setdefault(part.target, []).append(part)
    return grouped
