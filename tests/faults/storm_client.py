"""A writer and reader of a store that may be killed at any instant: `python -m
tests.faults.storm_client SETTINGS SEED`, until its input ends. Exits with 1 if it has read a wrong
byte, and 0 else; says a line for each prompt that it was answered."""

from __future__ import annotations

import json
import random
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress

from tests.store.api.whole_store import dump, load, rows
from ucm.errors import UcmError
from ucm.store.pipeline import UcmPipelineStore

NUM_PROMPTS = 60
NUM_BLOCKS = 8


def prompt(number: int) -> list[bytes]:
    return [f"prompt {number} block {i}".encode() for i in range(NUM_BLOCKS)]


def request(store: UcmPipelineStore, ids: list[bytes]) -> None:
    """What can't be loaded is computed, and dumped. Raises AssertionError for wrong bytes."""
    num_hits = 0
    with suppress(UcmError):
        num_hits = store.lookup_on_prefix(ids) + 1
        loaded = load(store, ids[:num_hits])
        assert loaded == rows(ids[:num_hits]), "wrong bytes"
    with suppress(UcmError):
        dump(store, ids[num_hits:])


def run(config: Mapping[str, object], seed: int, stop: threading.Event) -> None:
    rng = random.Random(seed)
    while not stop.is_set():
        with suppress(UcmError):  # no node cache in time: perhaps the next one
            ask_some(config, rng, stop)


def ask_some(config: Mapping[str, object], rng: random.Random, stop: threading.Event) -> None:
    with UcmPipelineStore(config) as store:
        for _ in range(50):
            if not stop.is_set():
                request(store, prompt(rng.randrange(NUM_PROMPTS)))
                print("answered", flush=True)


if __name__ == "__main__":
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    run(json.loads(sys.argv[1]), int(sys.argv[2]), ended)
