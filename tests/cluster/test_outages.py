"""Storage that is away for a while, or full: deadlines are kept, and confirmed pages are right."""

from __future__ import annotations

import time

import pytest

from tests.cluster.nodes import Cluster

pytestmark = [pytest.mark.long, pytest.mark.cluster, pytest.mark.timeout(300)]

NUM_PAGES = 24
# That of a lookup (`Engine.look_up`), and what a busy machine needs.
DEADLINE_S = 10.0 + 5.0
# Servers of NFSv4 take nothing new for 10 seconds after a start.
BACK_S = 45.0
OUTAGES = ("link of A", "server", "export", "killed", "brick", "both bricks", "OSD", "MDS", "redis")


@pytest.mark.parametrize("fault", OUTAGES)
def test_an_outage_costs_hits_and_no_page_that_was_confirmed(
    cluster: Cluster, store: str, fault: str
) -> None:
    outage, a, b = cluster.faults[fault], cluster.a, cluster.b
    before, after = ({"name": name, "count": NUM_PAGES} for name in ("before", "after"))
    assert not failed(a.ask("dump", store, **before))
    b.ask("stop", store)

    outage.begin()
    try:
        began_s = time.monotonic()
        a.ask("load", store, name="never stored", count=1)
        assert time.monotonic() - began_s < DEADLINE_S
    finally:
        outage.end()

    healed_s = time.monotonic()
    while failed(a.ask("dump", store, name=f"probe {time.monotonic()}", count=1)):
        assert time.monotonic() - healed_s < BACK_S
    b.start(store)
    assert b.ask("load", store, **before) == NUM_PAGES
    a.ask("dump", store, **after)
    assert b.ask("load", store, **after) == NUM_PAGES


def failed(dumped: dict[str, dict[str, int]]) -> int:
    """How many pages of this dump were not written at once."""
    return dumped["not_written"]


@pytest.mark.parametrize("fault", ["full"])
def test_a_full_filesystem_takes_pages_again_once_there_is_room(
    cluster: Cluster, store: str, fault: str
) -> None:
    full, a, b = cluster.faults[fault], cluster.a, cluster.b
    before, during = ({"name": name, "count": NUM_PAGES} for name in ("before", "during"))
    assert not failed(a.ask("dump", store, **before))
    full.begin()
    try:
        assert failed(a.ask("dump", store, **during))
    finally:
        full.end()
    deadline_s = time.monotonic() + BACK_S
    while b.ask("load", store, **during) < NUM_PAGES:
        assert time.monotonic() < deadline_s, "what was refused is not written again"
        time.sleep(0.5)
    assert b.ask("load", store, **before) == NUM_PAGES


def test_nothing_is_written_below_a_mount_that_has_gone(cluster: Cluster, store: str) -> None:
    a, b = cluster.a, cluster.b
    before, during = ({"name": name, "count": NUM_PAGES} for name in ("before", "during"))
    assert not failed(a.ask("dump", store, **before))
    a.unmount()
    try:
        # As a mount point looks that somebody has prepared, or that an earlier fault has left.
        a.node.run(f"mkdir -p {a.path}/{store}")
        assert failed(a.ask("dump", store, **during)) == NUM_PAGES
        assert a.node.run(f"find {a.path}/{store} -mindepth 1") == ""
    finally:
        a.node.run(f"rm -rf --one-file-system {a.path}/{store}")
        a.mount()
    assert b.ask("load", store, **before) == NUM_PAGES
    deadline_s = time.monotonic() + BACK_S
    while b.ask("load", store, **during) < NUM_PAGES:
        assert time.monotonic() < deadline_s, "what was refused is not written again"
        time.sleep(0.5)
