"""SGLang's storage backend over real node caches, called as its cache controller does."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.integration.sglang.instances import compute, content, holds, rank
from tests.integration.sglang.recorded import (
    CacheController,
    HostKVCache,
    MHATokenToKVPoolHost,
    MLATokenToKVPoolHost,
    StorageConfig,
    page_hashes,
)
from tests.store.node.support import Place, kill, wait_until
from ucm.errors import ConfigError, UnsupportedEngine
from ucm.integration.sglang import page_store
from ucm.store.blocks.blockfile import HEADER_BYTES

pytestmark = pytest.mark.process

HASHES = page_hashes("a prompt", 6)
FIRST, SECOND = [0, 1, 2, 3, 4, 5], [7, 6, 5, 4, 3, 2]


def store(controller: CacheController, hashes: list[str] = HASHES, *, who: str = "") -> None:
    pages = FIRST[: len(hashes)]
    compute(controller, hashes, pages, who=who)
    assert controller.backup(hashes, pages) == len(hashes)


def empty(controller: CacheController) -> None:
    controller.pool.kv_buffer[:] = 0


POOLS = [
    *(
        lambda layout=layout: MHATokenToKVPoolHost(layout)
        for layout in ("layer_first", "page_first")
    ),
    *(
        lambda layout=layout: MLATokenToKVPoolHost(layout)
        for layout in ("layer_first", "page_first")
    ),
]


@pytest.mark.parametrize("make_pool", POOLS, ids=["mha-lf", "mha-pf", "mla-lf", "mla-pf"])
def test_what_is_stored_is_loaded_into_other_pages_of_the_pool(place: Place, make_pool) -> None:
    with rank(place, pool=make_pool()) as one:
        assert one.query(HASHES) == 0
        store(one)
        assert one.query([*HASHES, "another"]) == len(HASHES)
        empty(one)

        assert one.prefetch(HASHES, SECOND) == len(HASHES)
        assert all(holds(one, *pair) for pair in zip(HASHES, SECOND, strict=True))
        assert not any(one.pool.page(0)), "a page that nobody asked for was written"
        assert str(one.backend.counts) == "6 loaded, 6 stored"


def test_prefill_on_one_node_and_decode_on_another_share_by_files(place: Place) -> None:
    with rank(place, "prefill") as prefill, rank(place, "decode") as decode:
        store(prefill)
        wait_until(lambda: len(place.blocks()) == len(HASHES), "all pages are files")

        assert decode.query(HASHES) == len(HASHES)
        assert decode.prefetch(HASHES, SECOND) == len(HASHES)
        assert all(holds(decode, *pair) for pair in zip(HASHES, SECOND, strict=True))


def test_two_ranks_never_read_each_others_heads(place: Place) -> None:
    configs = [StorageConfig(tp_rank=number, tp_size=2) for number in range(2)]
    with rank(place, config=configs[0]) as one, rank(place, config=configs[1]) as two:
        store(one, who="rank 0")
        assert two.query(HASHES) == 0
        store(two, who="rank 1")

        for number, each in enumerate((one, two)):
            empty(each)
            assert each.prefetch(HASHES, SECOND) == len(HASHES)
            assert all(
                holds(each, *pair, who=f"rank {number}")
                for pair in zip(HASHES, SECOND, strict=True)
            )


def test_of_mla_one_rank_stores_and_all_load_whatever_their_number(place: Place) -> None:
    mla = StorageConfig(is_mla_model=True, tp_size=2)
    others = (replace(mla, tp_rank=1), replace(mla, tp_rank=3, tp_size=4))
    with rank(place, pool=MLATokenToKVPoolHost(), config=mla) as writer:
        for other in others:
            with rank(place, pool=MLATokenToKVPoolHost(), config=other) as reader:
                compute(reader, HASHES[:1], [0])
                reader.backend.batch_set_v1(HASHES[:1], reader.pool.indices([0]))
        assert writer.query(HASHES) == 0, "a rank that is no writer has stored"

        store(writer)
        for other in others:
            with rank(place, pool=MLATokenToKVPoolHost(), config=other) as reader:
                assert reader.prefetch(HASHES, SECOND) == len(HASHES)
                assert all(holds(reader, *pair) for pair in zip(HASHES, SECOND, strict=True))


UNLIKE: dict[str, dict[str, Any]] = {
    "layer_first": {"pool": MHATokenToKVPoolHost("layer_first")},
    "page_head": {"pool": MHATokenToKVPoolHost("page_head")},
    "heads": {"pool": MHATokenToKVPoolHost(head_num=1, head_dim=16)},
    "page_size": {"pool": MHATokenToKVPoolHost(page_size=32)},
    "pp": {"config": StorageConfig(pp_size=2)},
    "tp": {"config": StorageConfig(tp_size=2)},
    "model": {"model_id": "another model"},
    "epoch": {"epoch": 1},
}


@pytest.mark.parametrize("what", UNLIKE)
def test_unlike_instances_never_share(place: Place, what: str) -> None:
    with rank(place) as one, rank(place, **UNLIKE[what]) as other:
        store(one)
        assert one.query(HASHES) == len(HASHES)
        assert other.query(HASHES) == 0
        assert other.prefetch(HASHES[:1], [0]) == 0


def test_nothing_is_read_after_the_first_page_that_is_not_there(place: Place) -> None:
    with rank(place) as one:
        store(one)
        empty(one)
        asked = [*HASHES[:2], "not stored", *HASHES[3:]]
        results = one.backend.batch_get_v1(asked, one.pool.indices(FIRST))

        assert results == [True, True, False, False, False, False]
        assert one.backend.counts["not_loaded:never_stored"] == 4


def test_a_flipped_bit_in_a_file_is_a_page_that_is_not_there(place: Place) -> None:
    with rank(place, "prefill") as prefill:
        store(prefill, HASHES[:1])
        (file,) = wait_until(place.blocks, "the page is a file")
    data = bytearray(file.read_bytes())
    data[HEADER_BYTES + 1234] ^= 16
    file.write_bytes(data)

    with rank(place, "decode") as decode:
        assert decode.backend.batch_get_v1(HASHES[:1], decode.pool.indices([0])) == [False]
        assert not any(decode.pool.page(0)), "damaged bytes were given to the engine"
        assert decode.backend.counts["not_loaded:corrupt"] == 1
        store(decode, HASHES[:1])
        assert decode.prefetch(HASHES[:1], [1]) == 1
        assert holds(decode, HASHES[0], 1)


def test_when_the_node_cache_is_killed_pages_are_absent_and_then_there_again(place: Place) -> None:
    with rank(place) as one:
        store(one)
        wait_until(lambda: len(place.blocks()) == len(HASHES), "all pages are files")
        for pid in place.pids():
            kill(pid)
        began_s = time.monotonic()
        assert one.query(HASHES) in (0, len(HASHES))
        assert time.monotonic() - began_s < 30

        wait_until(lambda: one.query(HASHES) == len(HASHES), "there is another node cache")
        empty(one)
        assert one.prefetch(HASHES, SECOND) == len(HASHES)
        assert all(holds(one, *pair) for pair in zip(HASHES, SECOND, strict=True))
        wait_until(
            lambda: one.backup(HASHES[:1], FIRST[:1]) == 1, "it is met by who stores as well"
        )
        store(one, page_hashes("another prompt", 6))


def test_a_node_cache_that_stands_still_costs_one_wait_and_then_nothing(place: Place) -> None:
    with rank(place, lookup_timeout_ms=500, dump_timeout_ms=500) as one:
        store(one)
        (pid,) = place.pids()
        os.kill(pid, signal.SIGSTOP)
        try:
            began_s = time.monotonic()
            assert one.query(HASHES) == 0
            assert one.backup(page_hashes("another prompt", 6), FIRST) == 0
            waited_s = time.monotonic() - began_s
            assert 1.0 <= waited_s < 20.0

            began_s = time.monotonic()
            for _ in range(50):
                assert one.query(HASHES) == 0
                assert one.prefetch(HASHES, SECOND) == 0
                assert one.backup(page_hashes("a third", 6), FIRST) == 0
            assert time.monotonic() - began_s < 5, "calls go on waiting for who doesn't answer"
            assert one.backend.counts["not_loaded:timeout"] == 50 * len(HASHES)
        finally:
            os.kill(pid, signal.SIGCONT)

        wait_until(lambda: one.query(HASHES) == len(HASHES), "it answers again")
        empty(one)
        assert one.prefetch(HASHES, SECOND) == len(HASHES)
        assert all(holds(one, *pair) for pair in zip(HASHES, SECOND, strict=True))


def test_no_call_waits_as_long_as_sglang_does_for_a_thread_that_is_to_stop(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert page_store.MAX_CALL_S < 10
    monkeypatch.setattr(page_store, "MAX_CALL_S", 1.5)
    with rank(place, lookup_timeout_ms=120_000, dump_timeout_ms=120_000) as one:
        (pid,) = place.pids()
        os.kill(pid, signal.SIGSTOP)
        try:
            began_s = time.monotonic()
            assert one.backup(HASHES, FIRST) == 0
            assert one.prefetch(HASHES, FIRST) == 0
            assert time.monotonic() - began_s < 60
        finally:
            os.kill(pid, signal.SIGCONT)


def test_a_prompt_that_is_larger_than_the_node_cache_goes_through_storage(place: Place) -> None:
    pool = MHATokenToKVPoolHost(num_pages=64, page_size=128, layer_num=16, head_dim=64)
    assert len(pool.kv_buffer) == 2 * place.settings().cache_capacity_bytes
    hashes = page_hashes("long", 64)
    with rank(place, pool=pool) as one:
        pool.kv_buffer[:] = np.random.default_rng(0).integers(0, 256, len(pool.kv_buffer))
        before = [pool.page(number) for number in range(64)]
        assert one.backup(hashes, range(64)) == 64
        empty(one)
        assert one.prefetch(hashes, range(64)) == 64
        assert [pool.page(number) for number in range(64)] == before


def test_a_page_that_is_larger_than_the_node_cache_is_refused_at_the_start(place: Place) -> None:
    pool = MHATokenToKVPoolHost(num_pages=1, page_size=1024, layer_num=64, head_num=4, head_dim=64)
    with pytest.raises(ConfigError, match="page"), rank(place, pool=pool):
        pass


def test_after_clear_nothing_is_found_and_storing_goes_on(place: Place) -> None:
    with rank(place) as one, rank(place) as other:
        store(one)
        one.backend.clear()
        assert one.query(HASHES) == 0
        store(one, who="other weights")
        empty(one)
        assert one.prefetch(HASHES, SECOND) == len(HASHES)
        assert holds(one, HASHES[0], SECOND[0], who="other weights")
        assert other.prefetch(HASHES, SECOND) == len(HASHES)
        assert holds(other, HASHES[0], SECOND[0])


def test_other_memory_than_pages_is_refused(place: Place) -> None:
    with rank(place) as one:
        indices = one.pool.indices([0, 1])
        assert one.backend.batch_set_v1(HASHES[:1], indices) == [False]
        assert one.backend.batch_get_v1(HASHES[:3], indices) == [False] * 3
        assert one.backend.batch_set_v1(HASHES[:2], indices[:-1]) == [False] * 2
        assert one.backend.set(HASHES[0], value=object()) is False
        assert one.backend.get(HASHES[0], target_location=object()) is None
        one.pool.layer_num -= 1
        assert one.backend.batch_set_v1(HASHES[:2], indices) == [False] * 2
        assert one.query(HASHES) == 0
        assert one.backend.counts["not_stored:unsupported"] >= 4


def test_one_by_one_pages_are_given_by_the_addresses_of_their_buffers(place: Place) -> None:
    with rank(place) as one:
        compute(one, HASHES[:2], [0, 1])
        addresses, sizes = one.pool.get_page_buffer_meta(one.pool.indices([0, 1]))
        backend = one.backend
        assert backend.set(HASHES[0], None, addresses[:2], sizes[:2])
        assert backend.batch_set(HASHES[1:2], None, [addresses[2:]], [sizes[2:]])
        assert backend.exists(HASHES[1])
        empty(one)

        assert backend.get(HASHES[0], addresses[:2], sizes[:2]) == addresses[:2]
        got = backend.batch_get(HASHES[1:3], [addresses[2:], addresses[:2]], [sizes[2:]] * 2)
        assert got == [addresses[2:], None]
        assert holds(one, HASHES[0], 0)
        assert holds(one, HASHES[1], 1)


def test_a_model_with_a_second_pool_is_refused_at_the_start(place: Place) -> None:
    with rank(place) as one:
        with pytest.raises(UnsupportedEngine, match="keeps swa states beside its KV"):
            one.backend.register_mem_host_pool_v2(MHATokenToKVPoolHost(), "swa")
        assert one.query(HASHES) == 0, "it is closed"
        assert one.backup(HASHES, FIRST) == 0


def test_a_defect_is_counted_and_ends_no_thread_of_the_engine(place: Place) -> None:
    class Broken(MHATokenToKVPoolHost):
        is_broken = False

        def get_page_buffer_meta(self, indices):
            if self.is_broken:
                raise RuntimeError("broken")
            return super().get_page_buffer_meta(indices)

    pool: HostKVCache = Broken()
    with rank(place, pool=pool) as one:
        Broken.is_broken = True
        assert one.backup(HASHES, FIRST) == 0
        assert one.prefetch(HASHES, FIRST) == 0
        assert str(one.backend.counts) == "2 defect:io_error"


def test_a_long_prompt_is_found_and_loaded_in_several_batches(place: Place) -> None:
    pool = MHATokenToKVPoolHost(num_pages=400)
    hashes = page_hashes("long", 300)
    with rank(place, pool=pool) as one:
        compute(one, hashes, list(range(300)))
        assert one.backup(hashes, range(300)) == 300
        empty(one)
        assert one.query([*hashes, "more"]) == 300
        assert one.backend.batch_exists([*hashes, "more"]) == 300
        assert one.prefetch(hashes, range(100, 400)) == 300
        assert pool.page(399) == content(hashes[299], pool)
