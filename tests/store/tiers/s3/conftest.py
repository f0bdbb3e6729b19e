from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.s3_server import ENVIRONMENT, S3Server


@pytest.fixture(scope="session")
def shared_server() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture
def server(shared_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """With an empty bucket, and credentials in the environment of this process."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    shared_server.clear()
    return shared_server
