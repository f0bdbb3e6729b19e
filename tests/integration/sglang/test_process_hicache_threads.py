"""SGLang's threads ask one backend at once: who looks, who loads and who stores."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.integration.sglang.instances import compute, holds, rank
from tests.integration.sglang.recorded import CacheController, MHATokenToKVPoolHost, page_hashes
from tests.store.node.support import Place, kill, wait_until

pytestmark = pytest.mark.process

PROMPTS = [page_hashes(f"prompt {number}", 4) for number in range(8)]
STORED_FROM, LOADED_INTO = [0, 1, 2, 3], [4, 5, 6, 7]
DURATION_S = 1.0


def look(one: CacheController, prompt: list[str]) -> None:
    assert 0 <= one.query(prompt) <= len(prompt)


def store(one: CacheController, prompt: list[str]) -> None:
    compute(one, prompt, STORED_FROM)
    one.backup(prompt, STORED_FROM)


def load(one: CacheController, prompt: list[str]) -> None:
    for page in LOADED_INTO:
        one.pool.fill(page, bytes(len(one.pool.page(page))))
    num_loaded = one.prefetch(prompt, LOADED_INTO)
    for name, page in list(zip(prompt, LOADED_INTO, strict=True))[:num_loaded]:
        assert holds(one, name, page), f"page {page} was taken for {name}, and is another"


def again_and_again(
    step: Callable[[CacheController, list[str]], None],
    one: CacheController,
    is_over: threading.Event,
) -> int:
    chosen, num_steps = random.Random(step.__name__), 0
    while not is_over.is_set():
        step(one, chosen.choice(PROMPTS))
        num_steps += 1
    return num_steps


def test_no_thread_is_given_another_prompts_pages_also_when_the_node_cache_dies(
    place: Place,
) -> None:
    is_over = threading.Event()
    with (
        rank(place, pool=MHATokenToKVPoolHost(num_pages=8)) as one,
        ThreadPoolExecutor(3) as threads,
    ):
        running = [
            threads.submit(again_and_again, step, one, is_over) for step in (look, store, load)
        ]
        try:
            wait_until(lambda: one.backend.counts["loaded"] > 0, "pages are loaded")
            for pid in place.pids():
                kill(pid)
            before = one.backend.counts["loaded"]
            wait_until(lambda: one.backend.counts["loaded"] > before + 100, "and after its death")
            time.sleep(DURATION_S)
        finally:
            is_over.set()
        assert all(each.result(timeout=60) > 0 for each in running)
        assert one.backend.counts["defect:io_error"] == 0
