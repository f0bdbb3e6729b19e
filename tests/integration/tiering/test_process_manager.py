"""Our tier in vLLM's tiering manager: the contract of a secondary tier, over real node caches."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest
from vllm.v1.kv_offload.base import LookupResult

from tests.integration.tiering.managers import GROUP, Request, Tiering
from tests.integration.tiering.rows import manifest
from tests.store.node.support import Engine, Place, kill, wait_until
from ucm import handoff as h
from ucm.integration.tiering.counts import TIERING_METRICS
from ucm.store.blocks.blockfile import HEADER_BYTES

pytestmark = pytest.mark.process

PROMPT = [f"chunk {i}" for i in range(8)]
Maker = Callable[..., Tiering]


@pytest.fixture
def tiering(place: Place) -> Iterator[Maker]:
    made: list[Tiering] = []

    def make(node: str = "a", **options: int) -> Tiering:
        made.append(Tiering(place, node, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def wait_files(place: Place, number: int) -> None:
    wait_until(lambda: len(place.blocks()) == number, f"{number} files")


def test_what_one_engine_stores_another_on_another_node_is_told_of_and_loads(
    tiering: Maker, place: Place
) -> None:
    one, other = tiering("a"), tiering("b")
    one.begin(PROMPT).store()
    one.settle()
    wait_files(place, 8)

    request = other.begin([*PROMPT, "another one"])
    assert request.look() is None, "the first answer is to ask again"
    assert request.hit() == 8
    assert other.begin(["other", *PROMPT]).hit() == 0


def test_chunks_that_come_one_after_the_other_are_stored_in_the_order_of_the_prompt(
    tiering: Maker, place: Place
) -> None:
    one = tiering()
    request = one.begin(PROMPT)
    for start in range(0, 8, 2):
        request.store(start, start + 2)
        one.step()
    request.finish()
    one.settle()
    wait_files(place, 8)
    assert tiering("b").begin(PROMPT).hit() == 8


def test_a_flipped_bit_is_a_shorter_hit_and_what_is_computed_anew_is_stored_anew(
    tiering: Maker, place: Place
) -> None:
    one, other = tiering("a"), tiering("b")
    first = one.begin(PROMPT)
    first.store()
    one.settle()
    wait_files(place, 8)
    file = next(
        path
        for path in place.blocks()
        if path.stem == one.tier._store.names.key(first.keys[5]).hex()
    )
    data = bytearray(file.read_bytes())
    data[HEADER_BYTES + 100] ^= 1
    file.write_bytes(data)

    request = other.begin(PROMPT)
    assert request.hit() == 5
    request.store(5)
    other.settle()
    wait_files(place, 8)
    assert tiering("c").begin(PROMPT).hit() == 8


def test_two_engines_that_store_the_same_prompt_at_once_both_end_well(
    tiering: Maker, place: Place
) -> None:
    one, other = tiering("a"), tiering("a")
    for each in (one, other):
        each.begin(PROMPT).store()
    for each in (one, other):
        each.settle()
    wait_files(place, 8)
    assert tiering("b").begin(PROMPT).hit() == 8


def receipt_of(engine: Tiering, request: Request, num_chunks: int) -> h.Receipt | None:
    tokens = num_chunks * GROUP.chunk_tokens + 1
    return engine.tier.receipt(request.context.req_id, request.hashes, tokens)


def receipt(engine: Tiering, request: Request, num_chunks: int) -> h.Receipt:
    found = receipt_of(engine, request, num_chunks)
    assert found is not None
    return found


@pytest.mark.parametrize("words", [None, h.Wanted()])
def test_what_a_receipt_promises_is_stored_even_if_host_memory_has_had_it_for_long(
    tiering: Maker, place: Place, words: h.Handoff | None
) -> None:
    """Of other requests vLLM hands on what is new alone."""
    prefill = tiering("a")
    prefill.begin(PROMPT[:5]).store()
    prefill.settle()
    wait_files(place, 5)
    with Engine(prefill.tier._settings.store, session="watch", role="tool") as watch:
        pid = watch.pid
    kill(pid)
    for path in place.blocks():
        path.unlink()
    wait_until(lambda: prefill.begin(PROMPT).look() == 5, "a node cache that knows of nothing")

    prefill.begin(PROMPT, words).store()
    prefill.settle()
    wait_files(place, 8 if words else 3)
    assert tiering("b").begin(PROMPT).hit() == (8 if words else 0)


@pytest.mark.parametrize("kind", ["receipt", "expected"])
def test_what_is_promised_is_asked_for_again_until_it_is_there(
    tiering: Maker, place: Place, kind: str
) -> None:
    prefill, decode = tiering("a"), tiering("b")
    computed = prefill.begin(PROMPT)
    words = receipt(prefill, computed, 8) if kind == "receipt" else h.Expected()
    request = decode.begin(PROMPT, words)
    until_s = time.monotonic() + 0.3
    while time.monotonic() < until_s:
        assert request.look() is None
    computed.store()

    def both_go_on() -> bool:
        prefill.step()
        return request.look() == 8

    wait_until(both_go_on, "all that was promised")
    assert request.hit() == 8


def test_without_a_promise_nothing_is_waited_for(tiering: Maker) -> None:
    assert tiering().begin(PROMPT).hit(within_s=5.0) == 0


@pytest.mark.parametrize("kind", ["receipt", "expected"])
def test_what_was_promised_and_does_not_come_is_computed_after_its_time(
    tiering: Maker, kind: str
) -> None:
    prefill = tiering("a")
    decode = tiering("b", handoff_timeout_ms=300, expect_timeout_ms=300)
    words = receipt(prefill, prefill.begin(PROMPT), 8) if kind == "receipt" else h.Expected()
    started_s = time.monotonic()

    assert decode.begin(PROMPT, words).hit() == 0
    assert 0.15 < time.monotonic() - started_s < 10


def test_receipts_of_other_namespaces_and_prompts_are_no_reason_to_wait(tiering: Maker) -> None:
    engine = tiering()
    mine = receipt(engine, engine.begin(PROMPT), 8)
    foreign = h.Receipt(
        namespace="00" * 32, block_tokens=4, tokens=32, key=mine.key, issued_s=time.time()
    )
    other = receipt(engine, engine.begin(["another", *PROMPT[1:]]), 8)
    for words in (foreign, other, h.Withdrawn(), h.Wanted()):
        assert engine.begin(PROMPT, words).hit(within_s=5.0) == 0


def test_a_request_does_not_wait_for_a_node_cache_that_stands_still(tiering: Maker) -> None:
    engine = tiering(lookup_timeout_ms=400)
    with Engine(engine.tier._settings.store, session="watch", role="tool") as watch:
        pid = watch.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        started_s = time.monotonic()
        assert engine.begin(PROMPT).hit() == 0
        first_s = time.monotonic() - started_s
        assert first_s > 0.2
        wait_until(lambda: not engine.tier._store.is_ready, "nobody is asked any more")
        started_s = time.monotonic()
        assert engine.begin(PROMPT).look() == 0, "at once"
        assert time.monotonic() - started_s < 0.2
    finally:
        os.kill(pid, signal.SIGCONT)


def test_no_hook_takes_longer_than_a_step_may_while_storage_stands_still(tiering: Maker) -> None:
    engine = tiering(lookup_timeout_ms=400, dump_timeout_ms=1_000)
    with Engine(engine.tier._settings.store, session="watch", role="tool") as watch:
        pid = watch.pid
    os.kill(pid, signal.SIGSTOP)
    longest_s = 0.0
    try:
        for number in range(20):
            started_s = time.monotonic()
            request = engine.begin([f"prompt {number}", *PROMPT[1:]])
            request.look()
            request.store()
            engine.step()
            request.finish()
            longest_s = max(longest_s, time.monotonic() - started_s)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert longest_s < 0.2
    engine.settle()


def test_a_reset_waits_for_jobs_and_begins_an_epoch_in_which_nothing_of_before_is_found(
    tiering: Maker, place: Place
) -> None:
    engine = tiering()
    before = engine.begin(PROMPT)
    before.store()
    engine.reset()
    wait_until(lambda: engine.tier._store.is_ready, "the node cache answers")

    assert engine.tier._epochs.fingerprint != manifest()
    assert engine.begin(PROMPT).hit() == 0
    assert receipt_of(engine, engine.begin(PROMPT), 8) is not None
    assert receipt_of(engine, before, 8) is None
    # What a request that was there before computes may be of the weights of before.
    before.store()
    engine.settle()
    assert engine.begin(PROMPT).hit() == 8, "as vLLM's host memory has it"
    engine.manager.reset_cache()
    assert engine.begin(PROMPT).hit() == 0


def test_with_reset_epoch_keep_what_was_stored_is_found_after_a_reset(tiering: Maker) -> None:
    engine = tiering(reset_epoch="keep")
    request = engine.begin(PROMPT)
    request.store()
    engine.settle()
    engine.reset()
    assert engine.begin(PROMPT).hit() == 8


def test_every_number_it_tells_vllm_is_one_that_it_has_announced(
    tiering: Maker, place: Place
) -> None:
    engine = tiering()
    engine.begin(PROMPT).store()
    engine.settle()
    wait_until(lambda: _told(engine) >= {"ucm_tiering_stored_rows"}, "its numbers")
    definitions = engine.tier.build_metric_definitions({})
    assert definitions.keys() == TIERING_METRICS.keys()
    for name, metric in TIERING_METRICS.items():
        assert definitions[name].labelnames == tuple(metric.labels)


def _told(engine: Tiering) -> set[str]:
    stats = engine.manager.get_stats()
    return set(stats.data["data"]) if stats is not None else set()


def test_a_lookup_is_one_of_the_words_that_vllm_knows(tiering: Maker) -> None:
    engine = tiering()
    request = engine.begin(PROMPT)
    assert engine.tier.lookup(request.keys[0], request.context) is LookupResult.RETRY
    engine.step()
    wait_until(
        lambda: engine.tier.lookup(request.keys[0], request.context) is LookupResult.MISS,
        "an answer",
    )
