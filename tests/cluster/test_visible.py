"""How soon a node sees the pages of another one, with whatever its client remembers of absences."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.cluster.conftest import record
from tests.cluster.nodes import Cluster

pytestmark = [pytest.mark.long, pytest.mark.cluster, pytest.mark.timeout(180)]

NUM_PAGES = 48
NUM_UNTOUCHED = 96
NUM_MISSED = 8
SOON_S = 1.0
# What clients that are processes remember by themselves, which ordinary lookups don't ask past.
FUSE_S = 1.0
# Also on a machine with other work. Clients remember listings and absences for 15 seconds and more.
SURELY_S = 8.0


def delays(published_s: Sequence[float], seen_s: Sequence[float | None]) -> list[float]:
    unseen = [i for i, each in enumerate(seen_s) if each is None]
    assert not unseen, f"never seen: pages {unseen} of {len(seen_s)}"
    return [max(0.0, (b or 0.0) - a) for a, b in zip(published_s, seen_s, strict=True)]


@pytest.mark.parametrize("into", ["new directories", "old directories"])
def test_a_page_that_is_waited_for_is_seen_within_a_second(
    cluster: Cluster, store: str, into: str
) -> None:
    """Also on clients that cache listings, where its directory was there without it; and where it
    comes in the tick of a look."""
    asked = {"name": "awaited", "count": NUM_PAGES}
    if into == "old directories":
        cluster.a.ask("publish", store, **asked)
        cluster.a.ask("remove", store, **asked)
    cluster.b.begin("wait_promised", store, **asked, at_once=4, timeout_ms=20_000)
    published_s = cluster.a.ask("publish", store, **asked, pause_s=0.1)
    seen = delays(published_s, cluster.b.node.end())
    record(cluster, f"hand-off, {into}", seen)
    assert max(seen) <= SOON_S


@pytest.mark.parametrize("into", ["new directories", "old directories"])
def test_who_looks_while_a_page_comes_sees_it_without_any_doubt(
    cluster: Cluster, into: str
) -> None:
    """Past listings without it that the client remembers, and past absences in the tick in which
    its directories came. To doubt would have the client forget both."""
    store = cluster.new_store()
    cluster.a.ask("publish", store, name="first", count=1)
    asked = {"name": "looked for", "count": NUM_PAGES}
    if into == "old directories":
        cluster.a.ask("publish", store, **asked)
        cluster.a.ask("remove", store, **asked)
    cluster.b.begin("wait_in_storage", store, **asked, at_once=2, timeout_s=15.0)
    published_s = cluster.a.ask("publish", store, **asked, pause_s=0.05)
    assert max(delays(published_s, cluster.b.node.end())) <= SURELY_S


def test_a_page_that_is_waited_for_is_seen_whose_writer_touches_nothing(
    cluster: Cluster, store: str
) -> None:
    """Only who waits can end then what a look in its tick has left behind."""
    asked = {"name": "untouched", "count": NUM_UNTOUCHED}
    cluster.b.begin("wait_promised", store, **asked, at_once=12, timeout_ms=20_000)
    published_s = cluster.a.ask("publish_untouched", store, **asked, pause_s=0.05)
    assert max(delays(published_s, cluster.b.node.end())) <= SURELY_S


def test_ordinary_lookups_go_past_what_the_client_remembers_of_a_miss(
    cluster: Cluster, store: str
) -> None:
    asked = {"name": "forgotten", "count": NUM_MISSED}
    assert cluster.b.ask("load", store, **asked) == 0
    cluster.b.begin("wait_ordinary", store, **asked, timeout_s=15.0, pause_s=0.0)
    published_s = cluster.a.ask("publish", store, **asked, pause_s=0.02)
    assert max(delays(published_s, cluster.b.node.end())) <= SURELY_S


def test_ordinary_lookups_see_a_page_within_a_second_after_they_missed_it(
    cluster: Cluster, store: str
) -> None:
    asked = {"name": "missed", "count": NUM_PAGES}
    assert cluster.b.ask("load", store, **asked) == 0
    cluster.b.begin("wait_ordinary", store, **asked, timeout_s=20.0, pause_s=0.0)
    published_s = cluster.a.ask("publish", store, **asked, pause_s=0.02)
    seen = delays(published_s, cluster.b.node.end())
    record(cluster, "lookup after a miss", seen)
    assert max(seen) <= SOON_S + (0.0 if cluster.name.startswith("nfs") else FUSE_S)
