"""`ucm ls` and `ucm du` on a bucket of a real server; other tools refuse it by name."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.cli.buckets import A, BucketStore, filled_bucket
from tests.cli.conftest import PROMPT
from tests.cli.parts import keys_of, tail_of, ucm
from tests.faults.s3_server import S3Server
from tests.store.tiers.s3.conftest import server as server
from tests.store.tiers.s3.conftest import shared_server as shared_server
from ucm.store.inspect.contents import BackendContents

pytestmark = pytest.mark.process
OBJECT_BYTES = 24 << 10


@pytest.fixture
def store(tmp_path: Path, server: S3Server) -> BucketStore:
    return filled_bucket(tmp_path, server)


def test_namespaces_pages_and_tails_are_counted(store: BucketStore) -> None:
    store.put(A, [tail_of(A, PROMPT)])
    done = ucm("ls", store.config, "--json")
    assert done.returncode == 0, done.stderr
    (found,) = msgspec.json.decode(done.stdout, type=list[BackendContents])
    counts = {each.model: (each.num_pages, each.num_tails) for each in found.namespaces}
    assert counts == {"a": (13, 1), "b": (6, 0)}
    assert "19 pages in 2 namespaces" in ucm("ls", store.config).stdout


def test_bytes_are_those_of_the_objects(store: BucketStore) -> None:
    done = ucm("du", store.config, "--json")
    (found,) = msgspec.json.decode(done.stdout, type=list[BackendContents])
    assert {each.model: each.sizes.nbytes for each in found.namespaces if each.sizes} == {
        "a": 12 * OBJECT_BYTES,
        "b": 6 * OBJECT_BYTES,
    }
    assert "hour" in ucm("du", store.config, "--age").stdout
    assert "one" in ucm("du", store.config, "--salt", "--name-salt", "one").stdout


@pytest.mark.parametrize(
    "args",
    [
        ("verify", "{}"),
        ("bench", "{}"),
        ("ls", "{}", "-n", "ab"),
        ("inspect", "abcdef", "{}"),
        ("explain", "{}", "--model", "m", "--prompt-file", "/dev/null"),
    ],
)
def test_others_refuse_a_bucket_in_one_line(store: BucketStore, args: tuple[str, ...]) -> None:
    done = ucm(*(arg.format(store.config) for arg in args))
    assert done.returncode == 1 and done.stdout == ""
    assert "stores in a bucket alone" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_manifest_that_is_gone_is_said_so(store: BucketStore) -> None:
    name = store.name(A, keys_of(A, PROMPT)[0]).split("/")[2]
    store.server.ask("DELETE", f"some/where/{name}/manifest.json")
    assert "? (no manifest)" in ucm("ls", store.config).stdout
