"""After all of the others: no process of theirs lives, and nobody holds their memory."""

from __future__ import annotations

import pytest

from examples.cluster import guard
from examples.cluster.processes import run_folder, run_processes
from tests.e2e import node
from tests.e2e.checks import wait_until
from tests.e2e.conftest import DeploymentMaker
from tests.e2e.deployment import Fleets, Oracle
from tests.e2e.watch import holders
from ucm.config.settings import load_settings
from ucm.store.client.start import spawn

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def test_node_caches_leave_when_they_are_idle_and_nobody_holds_their_memory(
    fleets: Fleets,
    deployment: DeploymentMaker,
    started_oracle: Oracle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One more, so that this test stands by itself too: it is seen while it lives.
    last = node.Node("last")
    monkeypatch.setenv(guard.RUN_VARIABLE, str(run_folder()))
    spawn(load_settings(deployment("last").settings(last)).store)
    status = last.wait("started", lambda status: True)
    assert status.pid in run_processes()
    assert status.pid in holders(node.memories)
    fleets.end()
    started_oracle.server.kill()
    wait_until(lambda: not run_processes(), "node caches that idle have left")
    assert holders(node.memories) == {}
