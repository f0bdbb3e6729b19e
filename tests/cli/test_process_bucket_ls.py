"""`ucm ls` and `ucm du` on a bucket of a real server; tools of directories refuse it by name."""

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
from ucm.store.inspect.contents import BackendContents, PageEntry

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


def test_pages_of_a_namespace_are_listed(store: BucketStore) -> None:
    store.put(A, [tail_of(A, PROMPT)])
    name = store.name(A, keys_of(A, PROMPT)[0]).split("/")[2]
    done = ucm("ls", store.config, "-n", name[:12], "--json")
    found = [msgspec.json.decode(line, type=PageEntry) for line in done.stdout.splitlines()]
    keys = {key.hex() for salt in ("one", "two") for key in keys_of(A, PROMPT, salt=salt)}
    tail = tail_of(A, PROMPT)
    assert {each.key for each in found} == keys | {tail.hex()}
    assert {each.key: each.num_tokens for each in found if each.num_tokens} == {
        tail.hex(): tail.num_tokens
    }
    assert {each.nbytes for each in found} == {OBJECT_BYTES} and found[0].namespace == name
    assert "13 pages; the age is" in ucm("ls", store.config, "-n", name[:12]).stdout


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
        ("bench", "{}"),
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
