"""The contract of every tier, with its pages on a real shared filesystem."""

from __future__ import annotations

import sys

import pytest

from tests.cluster.nodes import Cluster

pytestmark = [pytest.mark.long, pytest.mark.cluster, pytest.mark.timeout(400)]


def test_the_contract_of_every_tier_holds(cluster: Cluster) -> None:
    folder = f"{cluster.a.path}/{cluster.new_store()}"
    command = (
        f"{sys.executable} -m pytest -q -p no:cacheprovider -p no:randomly --basetemp={folder} "
        f"-k TestPosixTier tests/store/tiers/posix/test_tier.py"
    )
    cluster.a.node.begin("run", command=command, timeout_s=200.0)
    done = cluster.a.node.end(timeout_s=220.0)
    assert done["status"] == 0, done["output"]
