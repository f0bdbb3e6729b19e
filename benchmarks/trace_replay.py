"""Asks servers what a workload says, when it says so, and counts what that took."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from benchmarks.contenders import prompt_of
from benchmarks.streaming import stages_s
from benchmarks.trace_servers import Fleet, Used, used
from benchmarks.trace_workload import Session, Workload
from examples.cluster.client import Answer, Client, RequestFailed

# For writes that follow an answer, so that they are in what was used.
SETTLE_S: Final = 2.0
WARM_UP_TOKENS: Final = 4000
_PATH_HEADER: Final = "x-ucm-pd-path"


@dataclass(frozen=True)
class Asked:
    """One turn. `gaps_s` lie between tokens that came one after the other; a failed one has
    neither answer nor times. `path` and `stages_s` are what the proxy says it did, and how long its
    parts took; without a proxy they are empty."""

    session: int
    turn: int
    prompt_tokens: int
    ttft_s: float = 0.0
    gaps_s: tuple[float, ...] = ()
    answer: tuple[int, ...] = ()
    path: str = ""
    stages_s: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""


@dataclass(frozen=True)
class Played:
    """A workload at one contender. `computed_tokens`: of prompts, by all engines together."""

    asked: tuple[Asked, ...]
    seconds: float
    computed_tokens: int
    used: Used

    @property
    def prompt_tokens(self) -> int:
        return sum(each.prompt_tokens for each in self.asked)

    @property
    def paths(self) -> Counter[str]:
        return Counter(each.path for each in self.asked if each.path)


def warm_up(fleet: Fleet, *, kv_tokens: int, seed: int) -> None:
    """All `kv_tokens` of each engine touched, and the way through the proxy used, by prompts of no
    workload."""
    rng = random.Random(f"warm up {seed}")

    def ask(client: Client, prompts: Sequence[Sequence[int]]) -> None:
        for prompt in prompts:
            client.complete(prompt, max_tokens=2)

    def prompts(num: int) -> list[list[int]]:
        return [prompt_of(WARM_UP_TOKENS, rng) for _ in range(num)]

    with ThreadPoolExecutor(max_workers=len(fleet.engines)) as pool:
        asked = [
            pool.submit(ask, engine.client, prompts(-(-kv_tokens // WARM_UP_TOKENS)))
            for engine in fleet.engines
        ]
        for each in asked:
            each.result()
    ask(fleet.front, prompts(len(fleet.engines)))


def play(fleet: Fleet, workload: Workload) -> Played:
    """Raises nothing for a request that fails: it is in the records."""
    time.sleep(SETTLE_S)
    before, computed = used(fleet), _computed(fleet)
    lock = threading.Lock()
    asked: list[Asked] = []

    def one(number: int, session: Session, began_s: float) -> None:
        found = _converse(fleet.front, number, session, began_s)
        with lock:
            asked.extend(found)

    began_s = time.monotonic()
    with ThreadPoolExecutor(max_workers=len(workload.sessions)) as pool:
        running = [
            pool.submit(one, number, session, began_s)
            for number, session in enumerate(workload.sessions)
        ]
        for each in running:
            each.result()
    seconds = time.monotonic() - began_s
    time.sleep(SETTLE_S)
    return Played(
        tuple(sorted(asked, key=lambda each: (each.session, each.turn))),
        seconds,
        _computed(fleet) - computed,
        used(fleet) - before,
    )


def _computed(fleet: Fleet) -> int:
    return sum(engine.client.counters().computed for engine in fleet.engines)


def _converse(front: Client, number: int, session: Session, began_s: float) -> list[Asked]:
    """Ends with the first turn that fails: what would follow has no context."""
    said: tuple[int, ...] = ()
    found = []
    ready_s = began_s + session.begin_s
    for turn_number, turn in enumerate(session.turns):
        time.sleep(max(0.0, ready_s + turn.wait_s - time.monotonic()))
        said = (*said, *turn.tokens)
        try:
            answer = front.complete(said, max_tokens=turn.answer_tokens)
        except (RequestFailed, OSError) as error:
            found.append(Asked(number, turn_number, len(said), failure=str(error)[:200]))
            break
        found.append(_asked(number, turn_number, len(said), answer))
        said = (*said, *answer.token_ids)
        ready_s = time.monotonic()
    return found


def _asked(session: int, turn: int, prompt_tokens: int, answer: Answer) -> Asked:
    return Asked(
        session,
        turn,
        prompt_tokens,
        answer.ttft_s,
        gaps(answer.arrived_s),
        answer.token_ids,
        answer.headers.get(_PATH_HEADER, ""),
        stages_s(answer),
    )


def gaps(arrived_s: Sequence[float]) -> tuple[float, ...]:
    return tuple(later - sooner for sooner, later in pairwise(arrived_s))
