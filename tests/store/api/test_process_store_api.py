"""The store API over real node caches: what goes in comes out, and nothing fails silently."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from hashlib import shake_128

import numpy as np
import pytest

from tests.faults.s3_server import BUCKET, ENVIRONMENT, S3Server
from tests.store.api.whole_store import (
    IDS,
    NUM_SHARDS,
    SIZES,
    dump,
    dump_all_shards,
    load,
    open_store,
    row_of,
    rows,
    status_of,
    whole_blocks,
)
from tests.store.node.support import Engine, Place, wait_until
from ucm.config.settings import PIPELINES
from ucm.errors import TaskFailed, TierError
from ucm.store.pipeline import UcmPipelineStore

pytestmark = pytest.mark.process


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_what_is_dumped_is_loaded_bit_for_bit_in_every_pipeline(
    place: Place, pipeline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, object] = {"store_pipeline": pipeline}
    with ExitStack() as stack:
        if "S3" in pipeline:
            for name, value in ENVIRONMENT.items():
                monkeypatch.setenv(name, value)
            server = stack.enter_context(S3Server())
            changes |= {"s3_bucket": BUCKET, "s3_endpoint": server.url}
        store = stack.enter_context(open_store(place, **changes))
        dump_all_shards(store, IDS)
        store.flush()

        for shard in range(NUM_SHARDS):
            assert load(store, IDS, shard) == rows(IDS, shard)


def test_flush_says_that_a_bucket_has_not_got_what_was_dumped(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with (
        S3Server() as server,
        whole_blocks(
            place, store_pipeline="Cache|S3", s3_bucket=BUCKET, s3_endpoint=server.url
        ) as store,
    ):
        server.kill()
        store.wait(store.dump_data(IDS, [0] * len(IDS), rows(IDS)))

        with pytest.raises(TierError):
            store.flush()


def test_flush_names_the_tier_that_has_not_got_what_was_dumped(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with (
        S3Server() as server,
        whole_blocks(
            place, store_pipeline="Cache|Posix|S3", s3_bucket=BUCKET, s3_endpoint=server.url
        ) as store,
    ):
        store.wait(store.dump_data(IDS[:1], [0], rows(IDS[:1])))
        store.flush()
        server.kill()
        store.wait(store.dump_data(IDS, [0] * len(IDS), rows(IDS)))

        with pytest.raises(TierError, match=r"blocks are not in s3: |written to s3"):
            store.flush()

        assert store.lookup(IDS) == [True] * len(IDS)
        server.start()
        wait_until(lambda: _is_flushed(store), "what was refused is written when flush asks again")


def _is_flushed(store: UcmPipelineStore) -> bool:
    try:
        store.flush()
    except TierError:
        return False
    return True


def test_tensors_and_plain_memory_are_the_same_blocks(place: Place) -> None:
    torch = pytest.importorskip("torch")
    with open_store(place, block_size=None, shard_size=None, tensor_size_list=[4096]) as store:
        tensors = [[torch.randn(32, 32).t()] for _ in IDS]
        store.wait(store.dump(IDS, [0] * len(IDS), tensors))
        memory = np.zeros((len(IDS), 4096), np.uint8)
        addresses = memory.ctypes.data + 4096 * np.arange(len(IDS), dtype=np.uint64)
        store.wait(store.load_data(IDS, [0] * len(IDS), addresses.reshape(-1, 1)))
        found = [[torch.empty(32, 32)] for _ in IDS]
        store.wait(store.load(IDS, [0] * len(IDS), found))

    for i in range(len(IDS)):
        assert torch.equal(found[i][0], tensors[i][0])
        assert bytes(memory[i]) == tensors[i][0].contiguous().numpy().tobytes()


def test_a_block_is_there_when_all_its_shards_are_and_not_before(place: Place) -> None:
    with open_store(place) as store, open_store(place) as other:
        for shard in (2, 0, 3):
            dump(store, IDS, shard)
            assert store.lookup(IDS) == other.lookup(IDS) == [False] * len(IDS)
            with pytest.raises(TaskFailed, match="not all of its shards were dumped"):
                load(store, IDS[:1], 2)
        assert store.lookup_on_prefix(IDS) == -1

        dump(store, IDS, 1)

        assert store.lookup(IDS) == other.lookup(IDS) == [True] * len(IDS)
        assert load(other, IDS, 3) == rows(IDS, 3)


def test_shards_may_come_in_any_order_and_in_one_task(place: Place) -> None:
    pairs = [(block_id, shard) for shard in (3, 1, 0, 2) for block_id in reversed(IDS)]
    ids, shards = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    with open_store(place) as store:
        store.wait(store.dump_data(ids, shards, [row_of(*pair) for pair in pairs]))
        loaded = [[bytearray(size) for size in SIZES] for _ in pairs]
        store.wait(store.load_data(ids, shards, loaded))

    assert loaded == [row_of(*pair) for pair in pairs]


def test_blocks_are_found_each_by_itself_and_as_a_prefix(place: Place) -> None:
    ids = [f"long {i}".encode() for i in range(700)]
    with whole_blocks(place, tensor_size_list=[64]) as store:
        absent = {5, 300, 699}
        there = [block_id for i, block_id in enumerate(ids) if i not in absent]
        task = store.dump_data(there, [0] * len(there), [[bytes(64)]] * len(there))
        store.wait(task)

        assert store.lookup(ids) == [i not in absent for i in range(700)]
        assert store.lookup_on_prefix(ids) == 4
        assert store.lookup_on_prefix(ids[6:]) == 300 - 6 - 1
        assert store.lookup_on_prefix(ids[301:699]) == 699 - 301 - 1
        assert (store.lookup([]), store.lookup_on_prefix([])) == ([], -1)


def test_blocks_are_found_in_files_by_another_node_cache(place: Place) -> None:
    with whole_blocks(place) as store:
        dump(store, IDS)
        store.flush()
    with whole_blocks(place, node_cache_socket=place.settings("b").socket_path) as store:
        assert store.lookup(IDS) == [True] * len(IDS)
        assert load(store, IDS) == rows(IDS)


def test_a_prefetched_block_is_loaded_from_memory(place: Place) -> None:
    other = place.settings("b").socket_path
    with whole_blocks(place) as store:
        dump(store, IDS)
        store.flush()
    with whole_blocks(place, node_cache_socket=other) as store, Engine(place.settings("b")) as tool:
        store.prefetch([*IDS, b"nowhere"])
        wait_until(lambda: tool.status().slots["ready"] == len(IDS), "all are in memory")
        for path in place.blocks():
            path.unlink()

        assert load(store, IDS) == rows(IDS)
        assert wait_until(lambda: not tool.status().slots["pins"], "all is given back")


def test_a_block_that_is_absent_fails_the_load_and_is_named(place: Place) -> None:
    with whole_blocks(place) as store:
        dump(store, IDS[:3])
        task = store.load_data(
            [*IDS[:3], b"nowhere"], [0] * 4, [[bytearray(size) for size in SIZES] for _ in range(4)]
        )

        with pytest.raises(TaskFailed) as raised:
            store.wait(task)
        assert str(raised.value) == (
            f"block {b'nowhere'.hex()} can't be loaded: it is not in the store"
        )
        assert store.check(task)
        with pytest.raises(TaskFailed):
            store.wait(task)
        wait_until(lambda: not status_of(place).slots["pins"], "all is given back")


def test_a_damaged_file_fails_the_load_and_can_be_dumped_again(place: Place) -> None:
    with whole_blocks(place, store_pipeline="Posix") as store:
        dump(store, IDS[:1])
        store.flush()
        (path,) = place.blocks()
        data = bytearray(path.read_bytes())
        data[5000] ^= 1
        path.write_bytes(data)

        with pytest.raises(TaskFailed, match="its file is damaged, or is none; the log"):
            load(store, IDS[:1])
        assert store.lookup(IDS[:1]) == [False]
        dump(store, IDS[:1])
        assert load(store, IDS[:1]) == rows(IDS[:1])


def test_stores_with_another_id_or_other_sizes_share_no_blocks(place: Place) -> None:
    with whole_blocks(place) as store:
        dump(store, IDS)
        same_bytes = {"block_size": sum(SIZES), "tensor_size_list": [sum(SIZES)]}
        for changes in ({"unique_id": "another model"}, same_bytes):
            with open_store(place, **{"block_size": None, "shard_size": None, **changes}) as other:
                assert other.lookup(IDS) == [False] * len(IDS)
        with whole_blocks(place) as same:
            assert same.lookup(IDS) == [True] * len(IDS)


def test_a_load_of_more_than_the_node_cache_holds_goes_through_it(place: Place) -> None:
    ids = [f"big {i}".encode() for i in range(48)]
    sizes = [1 << 20]
    contents = [shake_128(block_id).digest(1 << 20) for block_id in ids]
    with open_store(place, block_size=None, shard_size=None, tensor_size_list=sizes) as store:
        store.wait(store.dump_data(ids, [0] * len(ids), [[each] for each in contents]))
        store.flush()
        assert sum(store.lookup(ids)) == len(ids)
        loaded = [[bytearray(1 << 20)] for _ in ids]
        store.wait(store.load_data(ids, [0] * len(ids), loaded))

    assert [bytes(row[0]) for row in loaded] == contents


def test_in_a_pipeline_without_cache_memory_holds_only_what_is_under_way(place: Place) -> None:
    with whole_blocks(place, store_pipeline="Posix") as store:
        dump(store, IDS)
        store.flush()
        assert load(store, IDS) == rows(IDS)

        wait_until(
            lambda: status_of(place, pipeline=("Posix",)).slots["ready"] == 0,
            "memory is given back",
        )
        counters = status_of(place, pipeline=("Posix",)).counters
        assert counters["read_hit"] == len(IDS)


def test_many_threads_and_stores_at_once_get_what_is_theirs(place: Place) -> None:
    with whole_blocks(place) as one, whole_blocks(place) as two, ThreadPoolExecutor(8) as threads:

        def use(i: int) -> bool:
            store = (one, two)[i % 2]
            ids = [f"{i // 3} {j}".encode() for j in range(20)]
            dump(store, ids)
            return load(store, ids) == rows(ids)

        assert all(threads.map(use, range(40)))
    wait_until(lambda: status_of(place).slots["pins"] == 0, "all is given back")


def test_shards_of_one_block_in_several_tasks_at_once_make_one_block(place: Place) -> None:
    """Layer by layer, without waiting in between."""
    with open_store(place) as store:
        tasks = [
            store.dump_data(IDS, [shard] * len(IDS), rows(IDS, shard))
            for shard in range(NUM_SHARDS)
        ]
        for task in tasks:
            store.wait(task)

        assert store.lookup(IDS) == [True] * len(IDS)
        assert load(store, IDS, 2) == rows(IDS, 2)


def test_two_stores_that_dump_the_same_block_both_find_it_dumped(place: Place) -> None:
    with open_store(place) as one, open_store(place) as two:
        dump(one, IDS, 0)
        others = [two.dump_data(IDS, [s] * len(IDS), rows(IDS, s)) for s in range(NUM_SHARDS)]
        assert not two.check(others[-1])
        for shard in range(1, NUM_SHARDS):
            dump(one, IDS, shard)

        for task in others:
            two.wait(task)
        assert load(two, IDS, 3) == rows(IDS, 3)


def test_a_dump_waits_for_room_and_fails_when_none_comes(place: Place) -> None:
    """Blocks that lack a shard hold their slots; nobody else can have them."""
    sizes = {"tensor_size_list": [1 << 20], "shard_size": 1 << 20}
    small = {**sizes, "cache_buffer_capacity_gb": 8 / 1024, "timeout_ms": 2000}
    ids, shards = IDS[:20], [0] * 20
    with open_store(place, block_size=2 << 20, **small) as store:
        task = store.dump_data(ids, shards, [[bytes(1 << 20)]] * 20)

        with pytest.raises(TaskFailed, match="timed out after 2 s, waiting for room"):
            store.wait(task)
        wait_until(lambda: status_of(place).slots["filling"] == 0, "the slots are given back")
        store.wait(store.dump_data([b"x"] * 2, [0, 1], [[bytes(1 << 20)]] * 2))
