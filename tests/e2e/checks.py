"""What tests ask servers, and what must come back."""

from __future__ import annotations

import http.client
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from examples.cluster.client import Client, Counters, by_label, total
from examples.cluster.processes import VllmServer
from tests.e2e.deployment import Engine

LENGTHS = (1, 127, 128, 129, 1500, 3500)
Prompt = tuple[int, ...]
_T = TypeVar("_T")


def make_prompt(length: int, name: str) -> Prompt:
    """Random tokens, always the same for one name, and another prefix for another name."""
    rng = random.Random(f"{name}/{length}")
    return tuple(rng.randrange(3, 300) for _ in range(length))


def check_answer(engine: Engine, prompt: Prompt, expected: Sequence[int]) -> None:
    answer = engine.client.complete(prompt, max_tokens=len(expected))
    assert answer.token_ids == tuple(expected), f"tokens of {engine.name}, {len(prompt)} tokens"


def check_loaded(
    engine: Engine, prompt: Prompt, expected: Sequence[int], *, hit_tokens: int | None = None
) -> None:
    """The identity test: the expected tokens, from a prompt of which all full blocks (or
    `hit_tokens`) came from the store."""
    before = engine.client.counters()
    check_answer(engine, prompt, expected)
    gained = counted(engine.client, before, len(prompt))
    wanted = engine.full_hit_tokens(prompt) if hit_tokens is None else hit_tokens
    assert gained.external_hits == wanted, f"hits of {engine.name}, {len(prompt)} tokens: {gained}"


def check_all_load(engines: Iterable[Engine], prompt: Prompt, expected: Sequence[int]) -> None:
    """The identity test of several engines at once: vLLM's worker keeps a core busy for a second
    after each step, and would do so beside the next engine asked."""
    at_once(partial(check_loaded, engine, prompt, expected) for engine in engines)


def counted(client: Client, before: Counters, num_tokens: int) -> Counters:
    """What the counters gained, once they have counted prompts of `num_tokens` in all: vLLM
    answers first and counts then."""
    deadline_s = time.monotonic() + 10.0
    while True:
        gained = client.counters() - before
        if gained.external_queries + gained.local_hits >= num_tokens:
            return gained
        assert time.monotonic() < deadline_s, f"counted {gained} of {num_tokens} tokens"
        time.sleep(0.01)


def at_once(calls: Iterable[Callable[[], _T]]) -> list[_T]:
    """Runs all calls in threads of their own; raises what the first bad one raised."""
    listed = list(calls)
    with ThreadPoolExecutor(len(listed)) as pool:
        futures = [pool.submit(call) for call in listed]
        return [future.result() for future in futures]


def wait_for_hit(engine: Engine, prompt: Prompt, *, timeout_s: float = 20.0) -> None:
    """Asks a stored prompt until its blocks are loaded again, say after a new start of the node
    cache."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        before = engine.client.counters()
        engine.client.complete(prompt, max_tokens=1)
        if counted(engine.client, before, len(prompt)).external_hits:
            return
        assert time.monotonic() < deadline_s, f"{engine.name} does not hit again"
        time.sleep(0.2)


@contextmanager
def asking(
    client: Client, prompt: Prompt, *, max_tokens: int = 64
) -> Iterator[http.client.HTTPConnection]:
    """A client that has asked, and at the end goes away without a word."""
    connection = http.client.HTTPConnection(client.host, client.port, timeout=60.0)
    body = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
    }
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), _JSON)
        yield connection
    finally:
        connection.close()


def abandon(client: Client, prompt: Prompt, *, after_s: float) -> None:
    with asking(client, prompt):
        time.sleep(after_s)


def metric(client: Client, name: str) -> int:
    """The sum of a metric over its labels."""
    return int(total(client.metrics(), name))


def missed_blocks(client: Client) -> Counter[str]:
    """Blocks looked up that were no hits, by the reason."""
    return by_label(client.metrics(), "ucm_lookup_missed_blocks_total", "reason")


def check_refused(server: VllmServer, sentence: str, *, timeout_s: float) -> None:
    """That the server's start ends by itself, and one line of its output says why."""
    assert server.wait(timeout_s) != 0
    assert any(sentence in line for line in server.log_text().splitlines()), server.log_tail()


@dataclass(frozen=True)
class HandedOver:
    """What came of promised tokens at a server since its start, and of receipts by outcome."""

    promised: int
    loaded: int
    recomputed: Mapping[str, int]
    receipts: Mapping[str, int]

    def __sub__(self, earlier: HandedOver) -> HandedOver:
        return HandedOver(
            self.promised - earlier.promised,
            self.loaded - earlier.loaded,
            _gained(self.recomputed, earlier.recomputed),
            _gained(self.receipts, earlier.receipts),
        )


def handed_over(client: Client) -> HandedOver:
    samples = client.metrics()
    return HandedOver(
        int(total(samples, "ucm_handoff_promised_tokens_total")),
        int(total(samples, "ucm_handoff_loaded_tokens_total")),
        by_label(samples, "ucm_handoff_recomputed_tokens_total", "reason"),
        by_label(samples, "ucm_receipts_total", "outcome"),
    )


def handed_over_since(client: Client, before: HandedOver, promised: int) -> HandedOver:
    """What the counters gained, once they have counted so many promised tokens: all of what they
    say of a prompt they say at once."""
    wait_until(lambda: handed_over(client).promised - before.promised >= promised, "all counted")
    return handed_over(client) - before


def _gained(now: Mapping[str, int], earlier: Mapping[str, int]) -> dict[str, int]:
    """Without what has not moved."""
    return {name: now[name] - earlier[name] for name in now if now[name] != earlier[name]}


def wait_until(condition: Callable[[], bool], what: str, *, timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not in {timeout_s:.0f} s: {what}"
        time.sleep(0.05)


_JSON = {"Content-Type": "application/json"}
