"""Addressing by the host's name on a server that people run, which is told its domain."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from examples.cluster.seaweedfs import CREDENTIALS, weed_binary
from tests.cluster import packages
from tests.cluster.seaweedfs import SeaweedServer

# Collected here, with this file's `server`.
from tests.store.tiers.s3.test_process_addressing import *  # noqa: F403
from tests.store.tiers.s3.test_process_addressing import DOMAIN

pytestmark = [pytest.mark.long, pytest.mark.cluster]


@pytest.fixture(scope="module")
def domain_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    if weed_binary() is None:
        pytest.skip(f"not installed: {packages.install_lines()[-1]}")
    with SeaweedServer(tmp_path_factory.mktemp("seaweedfs"), domain=DOMAIN) as server:
        yield server


@pytest.fixture
def server(domain_server: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> SeaweedServer:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    domain_server.clear()
    return domain_server
