"""What a node cache says of its storage."""

from __future__ import annotations

import pytest

from tests.store.node.support import PAGE_BYTES, Place, engine, make_keys

pytestmark = pytest.mark.process
KEYS = make_keys("a", 3)
TOTALS = ("tier_write_pages", "tier_write_bytes", "tier_read_pages", "tier_read_bytes")


def test_a_status_has_what_was_written_and_read(place: Place) -> None:
    place.write(make_keys("b", 2))
    with engine(place.settings()) as client:
        client.dump(KEYS)
        written = client.wait_written().counters
        assert [written[name] for name in TOTALS] == [3, 3 * PAGE_BYTES, 0, 0]
        assert written["tier_write_us"] > 0

        assert client.load(make_keys("b", 2)) == (2, 2)

        read = client.status().counters
        assert [read[name] for name in TOTALS] == [3, 3 * PAGE_BYTES, 2, 2 * PAGE_BYTES]
        assert read["tier_read_us"] > 0


def test_a_node_cache_without_storage_says_nothing_of_it(place: Place) -> None:
    with engine(place.settings(pipeline=("Cache",), storage_backends=())) as client:
        client.dump(KEYS)

        assert not [name for name in client.status().counters if name.startswith("tier_")]
