"""Identities that may do no more than docs/storage.md says they need, on a server that looks."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from examples.cluster.seaweedfs import ALL_ACTIONS, CREDENTIALS, weed_binary
from tests.cli.buckets import A, BucketStore, bucket_settings
from tests.cli.conftest import PROMPT
from tests.cli.parts import keys_of, ucm
from tests.cluster import packages
from tests.cluster.seaweedfs import SeaweedServer
from tests.cluster.test_s3_nodes import BLOCKS, flipped, name_of, node, prompt, settings_of
from tests.faults.s3_server import BUCKET
from tests.store.node.support import Engine, Place, log_of, wait_until
from tests.store.tiers.s3.s3_tiers import PREFIX

pytestmark = [pytest.mark.long, pytest.mark.cluster]

# This server's words for the policy of docs/storage.md: objects below the prefix, and a listing.
READ = (f"Read:{BUCKET}/{PREFIX}/*", f"List:{BUCKET}")
LEAST = (*READ, f"Write:{BUCKET}/{PREFIX}/*")


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place(Path(tempfile.mkdtemp(prefix="ucm-")))
    yield made
    made.close()


class Servers:
    """One after the other over the same objects."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()

    def start(self, actions: Sequence[str]) -> SeaweedServer:
        """The one before ends."""
        self.close()
        return self._stack.enter_context(SeaweedServer(self._folder, actions=actions))

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Servers]:
    if weed_binary() is None:
        pytest.skip(f"not installed: {packages.install_lines()[-1]}")
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    servers = Servers(tmp_path / "server")
    yield servers
    servers.close()


def test_the_documented_rights_are_enough_for_nodes_and_every_tool(
    servers: Servers, place: Place, tmp_path: Path
) -> None:
    server = servers.start(LEAST)
    with node(place, server, "a", s3_prefix=PREFIX) as prefill:
        prefill.dump(prompt(0))
        prefill.wait_written()
    bad = name_of(server, prompt(0)[2])
    server.ask("PUT", bad, flipped(server.ask("GET", bad)))
    with node(place, server, "b", s3_prefix=PREFIX) as decode:
        assert decode.load(prompt(0))[0] == 2
        wait_until(lambda: bad not in server.names(), "it has left its place")
        decode.dump(prompt(0))
        decode.wait_written()
        assert decode.status().counters["tier_write_errors"] == 0

    store = BucketStore(server, bucket_settings(tmp_path, server))
    store.put(A, keys_of(A, PROMPT))
    done = ucm("doctor", store.config)
    assert done.returncode == 0 and done.stdout.endswith("Fit for a store, with 1 warning (!).\n")
    assert "! quarantine" in done.stdout
    one = store.name(A, keys_of(A, PROMPT)[0])
    server.ask("PUT", one, flipped(server.ask("GET", one)))
    moved = ucm("verify", store.config, "--quarantine")
    assert moved.returncode == 3 and f"moved to {PREFIX}/quarantine/" in moved.stdout
    for args in (("ls",), ("du",), ("reclaim", "--older-than-days", 0)):
        done = ucm(args[0], store.config, *args[1:])
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert store.num_pages() == 0 and "2 files in quarantine" in ucm("ls", store.config).stdout
    assert ucm("inspect", keys_of(A, PROMPT)[0].hex(), store.config).returncode == 3


def test_who_may_only_read_loads_serves_from_memory_and_says_once_that_nothing_is_written(
    servers: Servers, place: Place, tmp_path: Path
) -> None:
    server = servers.start(ALL_ACTIONS)
    with node(place, server, "a", s3_prefix=PREFIX) as prefill:
        prefill.dump(prompt(0))
        prefill.wait_written()
    store = BucketStore(server, bucket_settings(tmp_path, server))
    store.put(A, keys_of(A, PROMPT))

    server = servers.start(READ)
    before = server.names()
    settings = settings_of(place, server, "b", s3_prefix=PREFIX)
    with Engine(settings) as decode:
        decode.open_namespace()
        assert decode.load(prompt(0)) == (BLOCKS, BLOCKS)
        for i in range(1, 10):
            decode.dump(prompt(i))
            assert decode.load(prompt(i)) == (BLOCKS, 0)
            time.sleep(0.1)
        wait_until(lambda: "can't be written" in log_of(settings), "it is said")
        said = [line for line in log_of(settings).splitlines() if "WARNING" in line]
        assert len(said) == 1 and "can't be written: access is denied" in said[0]
        assert decode.status().invariant == ""

    config = bucket_settings(tmp_path, server)
    done = ucm("doctor", config)
    assert done.returncode == 0
    assert "Fit to read a store, not to write one, with 1 warning (!)." in done.stdout
    assert "! write right" in done.stdout and "latency" in done.stdout
    assert "10 pages in 2 namespaces" in ucm("ls", config).stdout
    # The manifest of nodes of tests is none.
    assert "10 pages are whole, 1 is damaged" in ucm("verify", config).stdout
    refused = ucm("reclaim", config, "--older-than-days", 0)
    assert refused.returncode == 3 and refused.stdout.endswith("0 pages deleted, 0 B.\n")
    assert "not all could be deleted" in refused.stderr and "access is denied" in refused.stderr
    assert server.names() == before


def test_who_may_not_list_serves_and_tools_say_which_right_they_lack(
    servers: Servers, place: Place, tmp_path: Path
) -> None:
    """This server says 404 of what isn't there even so; others don't."""
    server = servers.start([each for each in LEAST if not each.startswith("List")])
    with node(place, server, "a", s3_prefix=PREFIX) as prefill:
        prefill.dump(prompt(0))
        prefill.wait_written()
    with node(place, server, "b", s3_prefix=PREFIX) as decode:
        assert decode.load(prompt(0)) == (BLOCKS, BLOCKS)
    config = bucket_settings(tmp_path, server)
    done = ucm("doctor", config)
    assert done.returncode == 0 and "allow s3:ListBucket" in done.stdout
    for args in (("ls",), ("du",), ("verify",), ("reclaim", "--older-than-days", 0)):
        done = ucm(args[0], config, *args[1:])
        assert done.returncode == 1 and "can't be listed: access is denied" in done.stderr
        assert len(done.stderr.splitlines()) == 1
