"""A mount that goes away under a running node cache: nothing lands on the disk below it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.faults.fuse import mount_fuse, needs_fuse
from tests.faults.mounts import mount_again, mount_tmpfs, own_mounts, take_away
from tests.store.api.whole_store import dump, load, rows, whole_blocks
from tests.store.node.support import Place, log_of, wait_until
from ucm.errors import TaskFailed, TierError
from ucm.store.pipeline import UcmPipelineStore
from ucm.store.tiers.posix.paths import BACKEND_ID

pytestmark = pytest.mark.process

BEFORE = [b"before %d" % i for i in range(20)]
WHILE = [b"while %d" % i for i in range(200)]
AFTER = [b"after %d" % i for i in range(20)]
ALL = [*BEFORE, *WHILE, *AFTER]


class Mounted:
    """What `place.store` shows lies in `server`, whether it is mounted or not."""

    def __init__(self, place: Place, kind: str, stack: ExitStack) -> None:
        self.server = place.directory / "server"
        self._store = place.store
        self._kind = kind
        self._stack = stack
        if kind == "disk":
            mount_tmpfs(self.server, size_bytes=64 << 20)
        self.come_back()

    def come_back(self) -> None:
        if self._kind == "disk":
            mount_again(self.server, self._store)
        else:
            self._mount = self._stack.enter_context(mount_fuse(self.server, self._store))

    def go_away(self) -> None:
        take_away(self._store)
        if self._kind == "server":
            self._mount.kill_server()


@contextmanager
def mounted(place: Place, kind: str) -> Iterator[Mounted]:
    with ExitStack() as stack:
        yield Mounted(place, kind, stack)


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def flushes(store: UcmPipelineStore) -> bool:
    try:
        store.flush()
    except TierError:
        return False
    return True


class Dumping:
    """One block after the other, in another thread."""

    def __init__(self, store: UcmPipelineStore) -> None:
        self.num_done = 0
        self.refused: list[TaskFailed] = []
        self._store = store
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        for block_id in WHILE:
            try:
                dump(self._store, [block_id])
            except TaskFailed as error:
                self.refused.append(error)
            self.num_done += 1

    def join(self) -> None:
        self._thread.join()


@own_mounts
@pytest.mark.parametrize("kind", ["disk", pytest.param("server", marks=needs_fuse)])
def test_a_mount_that_goes_away_under_dumps_is_told_and_is_used_again_when_it_is_back(
    place: Place, kind: str
) -> None:
    with mounted(place, kind) as mount, whole_blocks(place) as store:
        dump(store, BEFORE)
        store.flush()
        dumping = Dumping(store)
        wait_until(lambda: dumping.num_done > 20, "it dumps")
        mount.go_away()
        dumping.join()
        dump(store, AFTER)

        with pytest.raises(TierError, match=r"\d+ blocks are not in storage: .*log of the node"):
            store.flush()
        assert files_below(place.store) == []
        assert dumping.refused == []
        said = [
            line
            for line in log_of(place.settings()).splitlines()
            if " ERROR " in line and f"{place.store}: this is not the storage backend" in line
        ]
        assert len(said) == 1

        mount.come_back()
        wait_until(lambda: flushes(store), "everything is in storage")

        assert f"{place.store}: storage backend" in log_of(place.settings())
        assert len(place.blocks()) == len(ALL)
        with whole_blocks(place, node_cache_socket=place.settings("b").socket_path) as other:
            assert load(other, ALL) == rows(ALL)


@own_mounts
@needs_fuse
def test_a_disk_of_this_machine_with_the_same_id_does_not_stand_in_for_a_shared_mount(
    place: Place,
) -> None:
    """Somebody has copied the store there, or the mount began as a directory of this disk."""
    with mounted(place, "server") as mount, whole_blocks(place) as store:
        dump(store, BEFORE)
        store.flush()
        mount.go_away()
        shutil.copy(mount.server / BACKEND_ID, place.store)

        dump(store, AFTER)

        with pytest.raises(TierError, match="20 blocks are not in storage"):
            store.flush()
        assert files_below(place.store) == [BACKEND_ID]
        assert "its id is there on a filesystem of this machine alone" in log_of(place.settings())
        (place.store / BACKEND_ID).unlink()
        mount.come_back()
        wait_until(lambda: flushes(store), "everything is in storage")
        assert len(place.blocks()) == len(BEFORE) + len(AFTER)
