"""The first start of all: pages come while their storage is only being made."""

from __future__ import annotations

import pytest

from tests.faults.fuse import mount_fuse, needs_fuse
from tests.store.api.whole_store import dump, load, rows, status_of, whole_blocks
from tests.store.conftest import place as place
from tests.store.node.support import Place

IDS = [f"first {i}".encode() for i in range(6)]
# Of each write: that of the id is the first.
MAKING_S = 1.5


@needs_fuse
@pytest.mark.process
def test_pages_that_come_while_a_store_is_being_made_are_stored_by_themselves(place: Place) -> None:
    """Nobody has to meet them again."""
    with mount_fuse(place.directory / "below", place.store) as mount:
        mount.slow("write", MAKING_S)
        settings = {"posix_io_timeout_ms": 500, "posix_retry_ms": 60_000, "min_free_gb": 0}
        with whole_blocks(place, **settings) as store:
            dump(store, IDS)
            assert not place.blocks(), "the test must be quicker"
            store.flush(10 * MAKING_S)
            counters = status_of(place).counters
        assert counters.get("write_failed_io_error", 0) == 0
        assert len(place.blocks()) == len(IDS)
        with whole_blocks(place) as store:
            assert load(store, IDS) == rows(IDS)
