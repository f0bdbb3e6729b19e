"""`ucm doctor` on a bucket of a real server."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest

from tests.cli.buckets import BucketStore, bucket_settings, filled_bucket
from tests.cli.parts import settings_file, ucm
from tests.faults.s3_server import ENVIRONMENT, S3Server
from tests.store.tiers.s3.conftest import server as server
from tests.store.tiers.s3.conftest import shared_server as shared_server
from tests.store.tiers.s3.s3_tiers import PREFIX
from ucm.store.inspect.examine import Diagnosis
from ucm.store.inspect.verdicts import Finding

pytestmark = pytest.mark.process


@pytest.fixture
def store(tmp_path: Path, server: S3Server) -> BucketStore:
    return filled_bucket(tmp_path, server)


def findings(*args: object, status: int = 0) -> dict[str, Finding]:
    done = ucm("doctor", *args, "--json")
    assert done.returncode == status, done.stdout + done.stderr
    (examined,) = msgspec.json.decode(done.stdout, type=Diagnosis).backends
    assert not any(secret in done.stdout + done.stderr for secret in ENVIRONMENT.values())
    return {finding.check: finding for finding in examined.findings}


def test_a_bucket_is_tried_out_and_left_as_it_was(store: BucketStore) -> None:
    before = store.server.ask("GET", "?list-type=2").count(b"<Key>")
    found = findings(store.config)

    for check in ("endpoint", "list right", "latency", "clock", "put", "get", "delete"):
        assert found[check].verdict == "fine", found[check]
    assert "tokens/s" in found["get"].found and "docs/storage.md" in found["lifecycle"].fix
    assert store.server.ask("GET", "?list-type=2").count(b"<Key>") == before
    assert ucm("doctor", store.config).stdout.splitlines()[-1].startswith("Fit for a store")


def test_what_was_moved_aside_and_what_a_killed_tool_has_left_are_told(store: BucketStore) -> None:
    store.server.ask("PUT", f"{PREFIX}/ucm-probe-0123/1", b"x")
    store.server.ask("PUT", f"{PREFIX}/quarantine/abc/one", b"x")

    found = findings(store.config)
    assert found["leftovers"].verdict == "note" and found["quarantine"].verdict == "warning"


def test_a_bucket_that_is_not_there_is_wrong(tmp_path: Path, server: S3Server) -> None:
    found = findings(bucket_settings(tmp_path, server, s3_bucket="elsewhere"), status=3)
    assert "there is no such bucket" in found["endpoint"].found and "put" not in found


def test_a_server_that_hangs_or_is_away_is_said_so_in_time(
    tmp_path: Path, server: S3Server
) -> None:
    config = bucket_settings(tmp_path, server, posix_io_timeout_ms=2000)
    started_s = time.monotonic()
    with server.stopped():
        assert "no answer in time" in findings(config, status=3)["endpoint"].found
    assert time.monotonic() - started_s < 15
    away = bucket_settings(tmp_path, server, s3_endpoint="http://127.0.0.1:9")
    assert "can't connect" in findings(away, status=3)["endpoint"].found


def test_credentials_that_are_no_good_are_wrong_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with S3Server(checks_after=1) as strict:
        found = findings(bucket_settings(tmp_path, strict), status=3)
    assert "access is denied" in found["list right"].found
    assert "credentials" in found["list right"].fix


def test_files_near_and_a_bucket_far_are_both_looked_at(tmp_path: Path, server: S3Server) -> None:
    (tmp_path / "near").mkdir()
    config = settings_file(
        tmp_path,
        tmp_path / "near",
        store_pipeline="Cache|Posix|S3",
        s3_bucket="pages",
        s3_endpoint=server.url,
    )
    done = ucm("doctor", config, "--json")
    near, far = msgspec.json.decode(done.stdout, type=Diagnosis).backends
    assert near.facts is not None and far.backend.startswith("s3://pages")
    assert {"put", "get"} <= {each.check for each in far.findings}
