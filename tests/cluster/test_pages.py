"""Two node caches on two mounts: what one stores the other loads, whole or not at all."""

from __future__ import annotations

import pytest

from tests.cluster.nodes import Cluster
from ucm.store.tiers.posix import paths

pytestmark = [pytest.mark.long, pytest.mark.cluster, pytest.mark.timeout(180)]

NUM_PAGES = 24


def test_what_either_node_stores_the_other_loads(cluster: Cluster, store: str) -> None:
    for here, there in ((cluster.a, cluster.b), (cluster.b, cluster.a)):
        asked = {"name": f"of {here.node.name}", "count": NUM_PAGES}
        here.ask("dump", store, **asked)
        assert there.ask("load", store, **asked) == NUM_PAGES
        assert there.ask("status", store)["invariant"] == ""


def test_two_nodes_that_begin_a_store_at_once_have_one_id_and_each_others_pages(
    cluster: Cluster,
) -> None:
    """With its manifest and its directories, which both make as well."""
    for _ in range(4):
        store = cluster.new_store()
        for each in (cluster.a, cluster.b):
            each.begin("publish", store, name=f"of {each.node.name}", count=4)
        for each in (cluster.a, cluster.b):
            each.node.end()
        for here, there in ((cluster.a, cluster.b), (cluster.b, cluster.a)):
            said = there.ask("look", store, name=f"of {here.node.name}", count=4)["said"]
            assert said == ["HIT"] * 4
        ids = {
            each.node.run(f"cat {each.path}/{store}/{paths.BACKEND_ID}")
            for each in (cluster.a, cluster.b)
        }
        assert len(ids) == 1


def test_all_pages_are_there_after_both_nodes_have_mounted_again(cluster: Cluster) -> None:
    store, asked = cluster.new_store(), {"name": "kept", "count": NUM_PAGES}
    cluster.a.ask("publish", store, **asked)
    for each in (cluster.a, cluster.b):
        each.unmount()
        each.mount()
        assert each.ask("look", store, **asked)["said"] == ["HIT"] * NUM_PAGES


def test_a_page_that_another_node_removes_or_replaces_while_it_is_read_is_right_or_absent(
    cluster: Cluster, store: str
) -> None:
    asked = {"name": "fought over", "count": NUM_PAGES}
    cluster.a.ask("publish", store, **asked)
    cluster.a.begin("replace", store, **asked, within_s=4.0)
    said = set()
    for _ in range(10):
        said |= set(cluster.b.ask("look", store, **asked)["said"])
    cluster.a.node.end()
    assert said <= {"HIT", "ABSENT"}
    assert cluster.b.ask("load", store, **asked) == NUM_PAGES


def test_a_page_that_is_removed_while_this_node_reads_it_leaves_a_sweep_without_trouble(
    cluster: Cluster,
) -> None:
    """NFS clients keep it under a name of their own as long as it is open."""
    store, asked = cluster.new_store(), {"name": "open", "count": 4}
    cluster.a.ask("publish", store, **asked)
    swept = cluster.a.ask("sweep_beside_open_pages", store, **asked)
    assert swept["problem"] == ""
    assert swept["num_files"] == 0
    kept = [name for name in swept["left"] if name.startswith(".nfs")]
    assert not cluster.name.startswith("nfs") or kept, swept["left"]
