"""`ucm doctor` on a bucket of a real server."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from tests.cli.buckets import A, BucketStore, bucket_settings, filled_bucket
from tests.cli.conftest import PROMPT
from tests.cli.parts import ROOT, keys_of, manifest, settings_file, ucm
from tests.faults.s3_server import ENVIRONMENT, S3Server
from tests.store.node.support import wait_until
from tests.store.tiers.s3.conftest import server as server
from tests.store.tiers.s3.conftest import shared_server as shared_server
from tests.store.tiers.s3.s3_tiers import PREFIX
from ucm.store.blocks.namespace import without_strands
from ucm.store.inspect.examine import Diagnosis, examine_model
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
    assert "the oldest of 18 pages was written 0.0 days ago" in found["lifecycle"].found
    assert store.server.ask("GET", "?list-type=2").count(b"<Key>") == before
    assert ucm("doctor", store.config).stdout.splitlines()[-1].startswith("Fit for a store")


def test_what_was_moved_aside_and_what_a_killed_tool_has_left_are_told(store: BucketStore) -> None:
    store.server.ask("PUT", f"{PREFIX}/ucm-probe-0123/1", b"x")
    store.server.ask("PUT", f"{PREFIX}/quarantine/notes.txt", b"of another program")
    assert "quarantine" not in findings(store.config)

    namespace, _, page = store.name(A, keys_of(A, PROMPT)[0]).removeprefix(f"{PREFIX}/").split("/")
    store.server.ask("PUT", f"{PREFIX}/quarantine/{namespace}/{page}.{'0' * 16}", b"x")
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


def test_whether_the_bucket_has_pages_of_a_model_is_told(store: BucketStore) -> None:
    (known,) = examine_model(str(store.config), "a", A)
    assert (known.verdict, known.found) == ("fine", "a: the bucket has its pages")

    (other,) = examine_model(str(store.config), "a", manifest("a", kv_dtype="fp8"))
    assert "the bucket has nothing of it" in other.found
    assert "the nearest namespace differs in" in other.fix and "kv_dtype" in other.fix


def test_a_manifest_whose_pages_have_gone_is_nothing_of_a_model(store: BucketStore) -> None:
    for salt in ("one", "two"):
        for key in keys_of(A, PROMPT, salt=salt):
            store.server.ask("DELETE", store.name(A, key))
    (found,) = examine_model(str(store.config), "a", A)
    assert "the bucket has nothing of it" in found.found


def test_a_model_whose_strands_only_an_engine_knows_is_known_by_all_else(
    store: BucketStore,
) -> None:
    strands = [{"reach": "all"}, {"reach": "window 256"}]
    windows = manifest("gemma", format_version=2, strands=strands)
    (nothing,) = examine_model(str(store.config), "gemma", without_strands(windows))
    store.put(windows, keys_of(windows, PROMPT))
    (known,) = examine_model(str(store.config), "gemma", without_strands(windows))
    assert "has nothing of it" in nothing.found and "has its pages" in known.found


def test_what_can_not_be_told_of_a_model_is_said(tmp_path: Path, server: S3Server) -> None:
    away = bucket_settings(tmp_path, server, s3_endpoint="http://127.0.0.1:9")
    (found,) = examine_model(str(away), "a", A)
    assert "whether the bucket has pages of it can't be told: " in found.found
    assert "can't connect" in found.found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_stopped_leaves_nothing(store: BucketStore, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "ucm.cli.main", "doctor", "--page-kib", "16384"]
    with subprocess.Popen(
        [*command, str(store.config)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        wait_until(lambda: has_probes(store), "it writes")
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode != 0
    assert not has_probes(store)


def has_probes(store: BucketStore) -> bool:
    return b"ucm-probe-" in store.server.ask("GET", "?list-type=2")
