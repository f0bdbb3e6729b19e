"""How much of a prompt decode loads that is asked at once when prefill has answered.

Through the real proxy, one prompt after the other, all new to both engines. What is not loaded is
computed a second time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from benchmarks.contenders import BLOCK_TOKENS, Contender, Servers, prompt_of
from benchmarks.streaming import stream
from examples.cluster.client import Counters

NUM_PROMPTS = 20
MAX_TOKENS = 4
# For vLLM to count what it has answered.
COUNTED_S = 0.3


@dataclass(frozen=True)
class Races:
    """Of one contender and mode: how many tokens of each prompt decode has loaded."""

    contender: Contender
    handoff: str
    tokens: int
    loaded: Sequence[int]

    @property
    def whole_tokens(self) -> int:
        return self.tokens // BLOCK_TOKENS * BLOCK_TOKENS

    def count(self) -> tuple[int, int, int]:
        """Won, won in part, and lost."""
        won = sum(each >= self.whole_tokens for each in self.loaded)
        lost = sum(each == 0 for each in self.loaded)
        return won, len(self.loaded) - won - lost, lost


def measure(servers: Servers, tokens: int) -> list[Races]:
    rng = random.Random(7)
    decode = servers.decode.client
    found = []
    for handoff, proxy in servers.proxies.items():
        loaded = []
        for _ in range(NUM_PROMPTS):
            before = decode.counters()
            stream(proxy.client, prompt_of(tokens, rng), max_tokens=MAX_TOKENS)
            time.sleep(COUNTED_S)
            gained: Counters = decode.counters() - before
            loaded.append(gained.external_hits)
        found.append(Races(servers.contender, handoff, tokens, loaded))
    return found


def table(races: Sequence[Races]) -> Table:
    shown = Table(title="decode asked at once: of how many prompts it loads all full blocks")
    for column in ("contender", "mode", "tokens", "all", "a part", "nothing"):
        shown.add_column(column)
    for race in races:
        counts = map(str, race.count())
        shown.add_row(race.contender.name, race.handoff, str(race.tokens), *counts)
    return shown
