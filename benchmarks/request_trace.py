"""Recorded requests, as Mooncake publishes them, as prompts of keys."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from ucm.store.blocks.keys import Key

BLOCK_TOKENS: Final = 512
# Some time in 2024. The clock of a simulation must not be at zero: scores may lie before the start.
_BEGIN_NS: Final = 1_700_000_000 * 10**9


@dataclass(frozen=True)
class TracedRequest:
    """A prompt's blocks. The last one is a tail if it is not full."""

    at_ns: int
    keys: tuple[Key, ...]
    has_tail: bool


@dataclass(frozen=True)
class Trace:
    requests: list[TracedRequest]

    @property
    def num_blocks(self) -> int:
        return sum(len(request.keys) for request in self.requests)

    @property
    def num_keys(self) -> int:
        return len({key for request in self.requests for key in request.keys})

    @property
    def seconds(self) -> float:
        return (self.requests[-1].at_ns - self.requests[0].at_ns) / 1e9


def read_trace(path: Path, *, part: str = "all", rate: float = 1.0) -> Trace:
    """`part`: "all", or the "first" or "second" half of the requests. `rate`: how much faster they
    come than they did."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    middle = len(lines) // 2
    lines = {"all": lines, "first": lines[:middle], "second": lines[middle:]}[part]
    keys: dict[int, Key] = {}
    for line in lines:
        for number in line["hash_ids"]:
            keys.setdefault(number, Key(sha256(str(number).encode()).digest()))
    return Trace(
        [
            TracedRequest(
                at_ns=_BEGIN_NS + int(line["timestamp"] * 1e6 / rate),
                keys=tuple(keys[number] for number in line["hash_ids"]),
                has_tail=line["input_length"] % BLOCK_TOKENS != 0,
            )
            for line in lines
        ]
    )
