"""The store API over real node caches: what is lost, late, or makes no sense fails, and says so."""

from __future__ import annotations

import errno
import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.fuse import mount_fuse, needs_fuse
from tests.faults.mounts import mount_tmpfs, own_mounts
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
from tests.store.node.support import Place, kill, wait_until
from ucm.errors import ConfigError, TaskFailed, TierError, UcmError
from ucm.store.api.tasks import Task
from ucm.store.pipeline import UcmPipelineStore

pytestmark = pytest.mark.process


def test_a_block_that_is_never_completed_is_given_up_and_can_be_dumped_again(
    place: Place,
) -> None:
    with open_store(place, timeout_ms=2000) as store:
        dump(store, IDS[:2], 0)
        wait_until(lambda: not status_of(place).slots["filling"], "its slot is given back")

        with pytest.raises(TaskFailed, match="its other shards were dumped too long ago"):
            dump(store, IDS[:2], 1)
        dump_all_shards(store, IDS[:2])
        assert load(store, IDS[:2], 1) == rows(IDS[:2], 1)


def test_when_the_node_cache_is_killed_loads_go_on_with_the_next_one(place: Place) -> None:
    with whole_blocks(place) as store:
        dump(store, IDS)
        store.flush()
        for _ in range(2):
            kill(status_of(place).pid)

            assert load(store, IDS) == rows(IDS)
            assert store.lookup(IDS) == [True] * len(IDS)


def test_when_the_node_cache_is_killed_partly_dumped_blocks_fail_and_can_be_repeated(
    place: Place,
) -> None:
    with open_store(place) as store:
        dump(store, IDS, 0)
        kill(status_of(place).pid)
        wait_until(place.pids, "there is another one")

        with pytest.raises(TaskFailed, match="the node cache was lost"):
            dump(store, IDS, 1)
        dump_all_shards(store, IDS)
        assert store.lookup(IDS) == [True] * len(IDS)


def test_a_store_that_is_closed_fails_what_is_under_way_and_leaves_nothing(place: Place) -> None:
    threads = threading.active_count()
    store = open_store(place)
    dump(store, IDS, 0)
    task = store.load_data(IDS[:1], [0], [[bytearray(size) for size in SIZES]])
    store.close()
    store.close()

    assert store.check(task)
    for use in (lambda: store.wait(task), lambda: store.lookup(IDS)):
        with pytest.raises(TaskFailed):
            use()
    status = wait_until(lambda: no_other_session(place), "its session is gone")
    assert (status.slots["filling"], status.slots["pins"], status.invariant) == (0, 0, "")
    wait_until(lambda: threading.active_count() <= threads, "its threads are gone")


def no_other_session(place: Place) -> Any:
    status = status_of(place)
    return status if list(status.sessions) == ["watch"] else None


# What is collected may be what tests before it have left, sockets of another library too.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_store_that_is_forgotten_is_closed(place: Place) -> None:
    store = whole_blocks(place)
    del store
    gc.collect()

    wait_until(lambda: no_other_session(place), "its session is gone")


@own_mounts
def test_flush_says_when_pages_did_not_get_to_storage(place: Place) -> None:
    mount_tmpfs(place.store, size_bytes=1 << 20)
    with whole_blocks(place, tensor_size_list=[100_000]) as store:
        ids = IDS[:20]
        store.wait(store.dump_data(ids, [0] * 20, [[bytes(100_000)]] * 20))

        with pytest.raises(TierError, match=r"\d+ blocks are not in storage: [0-9a-f]+ \(full\)"):
            store.flush()
        assert store.lookup(ids) == [True] * 20
        with pytest.raises(TierError, match=r"the log of the node cache says why: /"):
            store.flush()


@needs_fuse
def test_an_outage_is_told_once_and_not_by_every_lookup(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        mount_fuse(place.store, tmp_path / "mounted") as mount,
        whole_blocks(place, storage_backends=str(mount.path)) as store,
    ):
        assert not any(store.lookup(IDS))
        mount.fail("lookup", errno.EIO)
        for _ in range(12):
            assert not any(store.lookup(IDS))
        said = [each.message for each in caplog.records if "could not tell" in each.message]
        mount.release()
    assert said == ["storage could not tell about some blocks: io_error"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"store_pipline": "Cache"}, "store_pipline: unknown setting, did you mean store_pipeline"),
        ({"store_pipeline": "Cache|Poxis"}, 'unknown stage "Poxis", did you mean Posix?'),
        ({"tensor_size_list": None, "shard_size": None}, "tensor_size_list: missing"),
        ({"timeout_ms": 0}, "timeout_ms: expected a number > 0"),
        ({"tensor_size_list": [1 << 30], "shard_size": 1 << 30}, "raise cache_buffer_capacity_gb"),
    ],
)
def test_a_configuration_that_can_not_work_is_refused_in_one_line(
    place: Place, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        open_store(place, **{"block_size": None, **changes})

    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_where_no_node_cache_can_be_the_start_fails_and_says_why(place: Place) -> None:
    in_the_way = place.directory / "file"
    in_the_way.write_text("not a directory")

    with pytest.raises(ConfigError, match="node_cache_socket: can't make"):
        whole_blocks(place, node_cache_socket=str(in_the_way / "x.sock"))


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda store, ids: store.load_data(ids, [0], [[bytearray(1)] * 2]), "a buffer of 1 bytes"),
        (lambda store, ids: store.load_data(ids, [0], [row_of(b"")]), "read-only buffer"),
        (lambda store, ids: store.dump_data(ids, [0, 1], [row_of(b"")]), "2 shard indexes"),
        (lambda store, ids: store.dump_data(ids, [NUM_SHARDS], [row_of(b"")]), "shard 4"),
        (lambda store, ids: store.dump_data(ids, [0], [[1, 2, 3]]), "a row of 3 entries"),
        (lambda store, ids: store.dump_data(ids, [0], [[1, 2]], 99), "prerequisite_handle"),
    ],
)
def test_what_makes_no_sense_is_refused_before_it_begins(
    place: Place, use: Callable[[UcmPipelineStore, list[bytes]], Task], words: str
) -> None:
    with open_store(place) as store, pytest.raises(ValueError, match=words):
        use(store, IDS[:1])


def test_addresses_of_a_device_are_refused(place: Place) -> None:
    with whole_blocks(place, device_id=0) as store, pytest.raises(ValueError, match="as tensors"):
        store.load_data(IDS[:1], [0], [[4096, 8192]])


def test_a_store_opens_no_file_of_its_storage(place: Place) -> None:
    """All of it is the node cache's: a hung mount can't hang this process."""
    with whole_blocks(place) as store:
        dump(store, IDS)
        store.flush()
        load(store, IDS)
        targets = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]

    assert not [each for each in targets if each.startswith(str(place.store))]


def test_every_error_is_one_of_ours() -> None:
    assert issubclass(TaskFailed, UcmError)
