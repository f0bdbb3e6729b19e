"""Real node caches over directories that are emptied and disks that are full for a while: what was
dumped gets to storage all the same, or whoever dumped it is told which blocks did not."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.faults.mounts import mount_tmpfs, own_mounts
from tests.store.api.whole_store import IDS, dump, load, rows, whole_blocks
from tests.store.node.support import Place, engine, make_keys, wait_until
from ucm.errors import TaskFailed, TierError
from ucm.store.pipeline import UcmPipelineStore
from ucm.store.tiers.posix.paths import BACKEND_ID

pytestmark = pytest.mark.process

KEYS = make_keys("saved", 6)


def empty(place: Place) -> None:
    for each in list(place.store.iterdir()):
        if each.name != BACKEND_ID:
            shutil.rmtree(each)


def flushes(store: UcmPipelineStore) -> bool:
    try:
        store.flush()
    except TierError:
        return False
    return True


def test_blocks_that_are_dumped_after_the_store_was_emptied_are_files_once_flush_returns(
    place: Place,
) -> None:
    with whole_blocks(place) as store:
        dump(store, IDS)
        store.flush()
        empty(place)

        dump(store, IDS)
        store.flush()

        assert len(place.blocks()) == len(IDS)


def test_flush_writes_again_what_was_removed_between_the_dump_and_the_flush(place: Place) -> None:
    with whole_blocks(place) as store, engine(place.settings()) as watch:
        dump(store, IDS)
        watch.wait_written()
        empty(place)

        store.flush()

        assert len(place.blocks()) == len(IDS)


def test_flush_names_the_blocks_that_are_neither_in_storage_nor_in_memory(place: Place) -> None:
    with (
        whole_blocks(place, store_pipeline="Posix") as store,
        engine(place.settings(pipeline=("Posix",))) as watch,
    ):
        dump(store, IDS)
        watch.wait_written()
        empty(place)

        with pytest.raises(TierError, match=rf"40 blocks are not in storage: {IDS[0].hex()} "):
            store.flush()


@pytest.mark.parametrize("damage", ["shorter", "of another block", "a damaged header"])
def test_a_file_that_is_not_whole_does_not_count_as_stored(place: Place, damage: str) -> None:
    with whole_blocks(place) as store, engine(place.settings()) as watch:
        dump(store, IDS[:2])
        watch.wait_written()
        first, other = sorted(place.blocks())
        good = first.read_bytes()
        if damage == "shorter":
            first.write_bytes(good[:-4096])
        elif damage == "of another block":
            first.write_bytes(other.read_bytes())
        else:
            first.write_bytes(b"?" + good[1:])

        store.flush()

        assert first.read_bytes() == good


@own_mounts
def test_a_disk_that_was_full_for_a_while_has_everything_in_the_end(place: Place) -> None:
    mount_tmpfs(place.store, size_bytes=1 << 20)
    filler = place.store / "filler"
    with whole_blocks(place) as store:
        dump(store, IDS[:1])
        store.flush()
        filler.write_bytes(bytes(os.statvfs(place.store).f_bavail * 4096))
        dump(store, IDS)
        with pytest.raises(TierError, match=r"39 blocks are not in storage: [0-9a-f]+ \(full\)"):
            store.flush()
        filler.unlink()

        # Lookups are enough.
        def are_there() -> bool:
            return store.lookup(IDS) == [True] * len(IDS) and len(place.blocks()) == len(IDS)

        wait_until(are_there, "what is met is written")
        store.flush()
        assert load(store, IDS) == rows(IDS)


def test_a_prompt_whose_files_were_removed_is_written_again_when_it_is_looked_up(
    place: Place,
) -> None:
    with engine(place.settings(recheck_s=0.05)) as client:
        client.dump(KEYS)
        client.wait_written()
        empty(place)

        def are_there() -> bool:
            assert client.load(KEYS) == (6, 0)
            return place.blocks() == {place.block(key) for key in KEYS}

        wait_until(are_there, "what is met is written")


def test_a_dump_waits_for_places_in_the_queue_and_all_of_it_is_written(place: Place) -> None:
    ids = [f"many {i}".encode() for i in range(400)]
    with whole_blocks(place, posix_write_queue_pages=8, posix_write_threads=1) as store:
        dump(store, ids)
        store.flush()

    assert len(place.blocks()) == len(ids)


def test_a_dump_that_finds_no_place_in_time_fails_and_says_what_it_waited_for(place: Place) -> None:
    with (
        whole_blocks(
            place, posix_write_queue_pages=1, posix_write_threads=1, timeout_ms=1500
        ) as store,
        engine(place.settings()) as other,
    ):
        # Another client holds the only place, and does not fill it.
        other.reserve(KEYS[:1])

        with pytest.raises(TaskFailed, match="room in the node cache"):
            dump(store, IDS[:2])
