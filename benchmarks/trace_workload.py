"""What trace.py asks: conversations of agents, made up, and recorded requests, made smaller.

All of it follows from a seed and from what is recorded, so that everybody is asked the same.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.contenders import VOCABULARY
from benchmarks.request_trace import BLOCK_TOKENS as RECORDED_BLOCK_TOKENS

SYSTEM_TOKENS: Final = 1024
TASK_TOKENS: Final = (128, 768)
TOOL_TOKENS: Final = (64, 640)
AGENT_ANSWER_TOKENS: Final = (24, 96)
TOOL_S: Final = (0.3, 3.0)
BETWEEN_AGENTS_S: Final = 0.7


@dataclass(frozen=True)
class Turn:
    """`tokens` follow all that was said before, answers among it; `wait_s` after the answer before,
    or in a session's first turn after the session's begin."""

    wait_s: float
    tokens: tuple[int, ...]
    answer_tokens: int


@dataclass(frozen=True)
class Session:
    """Turns that wait for each other. `begin_s` counts from the begin of the replay."""

    begin_s: float
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Workload:
    """`what` says in a line how it came about."""

    name: str
    what: str
    sessions: tuple[Session, ...]

    @property
    def num_requests(self) -> int:
        return sum(len(session.turns) for session in self.sessions)

    @property
    def num_prompt_tokens(self) -> int:
        total = 0
        for session in self.sessions:
            said = 0
            for turn in session.turns:
                said += len(turn.tokens)
                total += said
                said += turn.answer_tokens
        return total


def agents(*, num: int, turns: int, max_tokens: int, seed: int = 0) -> Workload:
    """Agents that begin with one system prompt, each with a task of its own. What a tool has said
    is the next turn's. A session ends where the next prompt and answer would pass `max_tokens`."""
    rng = random.Random(f"agents {seed}")
    system = _tokens(rng, SYSTEM_TOKENS)
    sessions = []
    for number in range(num):
        said = 0
        made: list[Turn] = []
        for turn in range(turns):
            new = _tokens(rng, rng.randint(*(TOOL_TOKENS if turn else TASK_TOKENS)))
            tokens = new if turn else (*system, *new)
            answer_tokens = rng.randint(*AGENT_ANSWER_TOKENS)
            said += len(tokens) + answer_tokens
            if said > max_tokens:
                break
            made.append(Turn(rng.uniform(*TOOL_S) if turn else 0.0, tokens, answer_tokens))
        sessions.append(Session(number * BETWEEN_AGENTS_S, tuple(made)))
    what = (
        f"{num} agents of up to {turns} turns, {SYSTEM_TOKENS} tokens of system prompt for all, "
        f"tools that say {TOOL_TOKENS[0]} to {TOOL_TOKENS[1]} tokens and take {TOOL_S[0]} to "
        f"{TOOL_S[1]} s"
    )
    return Workload("agents", what, tuple(sessions))


def recorded(
    path: Path, *, block_tokens: int, requests: int, per_s: float, max_tokens: int, seed: int = 0
) -> Workload:
    """Requests of Mooncake's traces: a recorded block becomes one of `block_tokens`, and lengths
    are divided alike. Whole conversations are drawn until there are about `requests`, so that as
    much of them is asked again as of all; they come in order, `per_s` a second on average."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    divisor = RECORDED_BLOCK_TOKENS / block_tokens
    fit = [each for each in lines if _scaled_length(each, divisor) <= max_tokens]
    chosen = _draw(conversations(fit), requests, random.Random(f"{path.name} {seed}"))
    first_ms = chosen[0]["timestamp"]
    span_s = (chosen[-1]["timestamp"] - first_ms) / 1000 or 1.0
    faster = span_s / (len(chosen) / per_s)
    sessions = tuple(
        Session(
            (each["timestamp"] - first_ms) / 1000 / faster,
            (_whole_prompt(each, divisor, block_tokens),),
        )
        for each in chosen
    )
    what = (
        f"{len(chosen)} of {len(lines)} requests of {path.name}, lengths divided by {divisor:g} "
        f"({len(lines) - len(fit)} that are longer than {max_tokens} tokens even so are left out), "
        f"times by {faster:.1f}"
    )
    return Workload(path.stem, what, sessions)


def conversations(lines: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Requests that share a block which is not the beginning of many others, in their order: the
    first block that a prompt doesn't share with a tenth of all."""
    users: defaultdict[int, int] = defaultdict(int)
    for line in lines:
        for number in line["hash_ids"]:
            users[number] += 1
    common = max(2, len(lines) // 10)
    found: defaultdict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for line in lines:
        own = (number for number in line["hash_ids"] if users[number] < common)
        found[next(own, line["hash_ids"][0])].append(line)
    return list(found.values())


def _draw(
    groups: list[list[Mapping[str, Any]]], requests: int, rng: random.Random
) -> list[Mapping[str, Any]]:
    """Whole groups at random, in the order of time."""
    chosen: list[Mapping[str, Any]] = []
    for group in rng.sample(groups, len(groups)):
        if len(chosen) >= requests:
            break
        chosen += group[: requests - len(chosen)]
    return sorted(chosen, key=lambda each: each["timestamp"])


def _scaled_length(line: Mapping[str, Any], divisor: float) -> int:
    return int((line["input_length"] + line["output_length"]) / divisor) + 2


def _whole_prompt(line: Mapping[str, Any], divisor: float, block_tokens: int) -> Turn:
    length = max(1, int(line["input_length"] / divisor))
    tokens = tuple(_of_blocks(line["hash_ids"], block_tokens))[:length]
    return Turn(0.0, tokens, max(1, round(line["output_length"] / divisor)))


def _of_blocks(numbers: Iterable[int], block_tokens: int) -> Iterator[int]:
    for number in numbers:
        yield from _tokens(random.Random(f"block {number}"), block_tokens)


def _tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(VOCABULARY) for _ in range(count))
