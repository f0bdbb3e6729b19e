"""Node caches over one bucket of a server that people run, and what can go wrong with it."""

from __future__ import annotations

import hashlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.seaweedfs import SeaweedServer
from tests.faults.s3_server import BUCKET
from tests.store.node.support import Engine, Place, engine, log_of, make_keys, wait_until
from ucm.config.settings import StoreSettings
from ucm.store.blocks.keys import Key

pytestmark = [pytest.mark.long, pytest.mark.cluster]

BLOCKS = 4
OUTAGE_S = 3.0
# What a server that has just started, and a breaker, take.
BACK_S = 60.0


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place(Path(tempfile.mkdtemp(prefix="ucm-")))
    yield made
    made.close()


def node(place: Place, server: SeaweedServer, name: str, **changes: object) -> Engine:
    """A node cache of its own. Nobody else has what it has in memory."""
    return engine(settings_of(place, server, name, **changes))


def settings_of(place: Place, server: SeaweedServer, name: str, **changes: object) -> StoreSettings:
    return place.settings(
        name,
        pipeline=("Cache", "S3"),
        storage_backends=(),
        s3_bucket=BUCKET,
        s3_endpoint=server.url,
        **{"cache_capacity_bytes": 256 << 20, "io_timeout_ms": 2_000, "retry_ms": 200, **changes},
    )


def prompt(i: int) -> list[Key]:
    return make_keys(f"prompt {i}", BLOCKS)


def loads_all(one: Engine, count: int) -> bool:
    """With every byte checked."""
    return all(one.load(prompt(i))[0] == BLOCKS for i in range(count))


def name_of(server: SeaweedServer, key: Key) -> str:
    (name,) = [name for name in server.names() if name.endswith(f"/{key.hex()}.kv")]
    return name


def test_a_server_that_is_killed_under_load_and_comes_back_costs_hits_and_no_page(
    place: Place, server: SeaweedServer
) -> None:
    with node(place, server, "a") as prefill, node(place, server, "b") as decode:
        written, stop = 0, threading.Event()
        slowest_s = 0.0

        def write() -> None:
            nonlocal written
            while not stop.is_set():
                prefill.dump(prompt(written))
                written += 1
                time.sleep(0.05)

        def read() -> None:
            nonlocal slowest_s
            while not stop.is_set():
                for i in range(written):
                    began_s = time.monotonic()
                    decode.load(prompt(i))
                    slowest_s = max(slowest_s, time.monotonic() - began_s)
                time.sleep(0.05)

        threads = [threading.Thread(target=each) for each in (write, read)]
        for each in threads:
            each.start()
        time.sleep(OUTAGE_S)
        server.kill()
        time.sleep(OUTAGE_S)
        before = written
        server.start()
        time.sleep(OUTAGE_S)
        stop.set()
        for each in threads:
            each.join()
        assert 0 < before < written
        # A call's deadline for each of the few that go at once, and what the machine needs.
        assert slowest_s < 10.0
        with node(place, server, "c") as fresh:
            wait_until(lambda: loads_all(fresh, written), "all is in the bucket", within_s=BACK_S)
        for each in (prefill, decode):
            assert each.status().invariant == ""


def truncated(whole: bytes) -> bytes:
    return whole[:-1]


def flipped(whole: bytes) -> bytes:
    return whole[:9000] + bytes([whole[9000] ^ 4]) + whole[9001:]


def foreign(whole: bytes) -> bytes:
    return hashlib.shake_128(b"of another program").digest(len(whole))


@pytest.mark.parametrize("damage", [truncated, flipped, foreign])
def test_a_damaged_object_is_absent_until_a_node_has_computed_it_again(
    place: Place, server: SeaweedServer, damage: Callable[[bytes], bytes]
) -> None:
    with node(place, server, "a") as prefill:
        prefill.dump(prompt(0))
        prefill.wait_written()
    bad = name_of(server, prompt(0)[2])
    server.ask("PUT", bad, damage(server.ask("GET", bad)))

    with node(place, server, "b") as decode:
        assert decode.load(prompt(0))[0] == 2
        wait_until(lambda: bad not in server.names(), "it has left its place")
        decode.dump(prompt(0))
        decode.wait_written()
    with node(place, server, "c") as fresh:
        assert fresh.load(prompt(0)) == (BLOCKS, BLOCKS)


def test_two_nodes_that_write_the_same_pages_at_once_leave_them_whole(
    place: Place, server: SeaweedServer
) -> None:
    count = 20
    with node(place, server, "a") as here, node(place, server, "b") as there:
        both = [
            threading.Thread(target=lambda one=one: [one.dump(prompt(i)) for i in range(count)])
            for one in (here, there)
        ]
        for each in both:
            each.start()
        for each in both:
            each.join()
        for one in (here, there):
            counters = one.wait_written().counters
            assert not [name for name in counters if name.startswith("write_failed")], counters
    with node(place, server, "c") as fresh:
        assert loads_all(fresh, count)
    assert len([name for name in server.names() if name.endswith(".kv")]) == count * BLOCKS


@pytest.mark.parametrize("wrong", ["a key of nobody's", "another secret"])
def test_credentials_that_are_not_good_are_one_line_and_serving_goes_on(
    place: Place, server: SeaweedServer, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    variable = "AWS_SECRET_ACCESS_KEY" if wrong == "another secret" else "AWS_ACCESS_KEY_ID"
    monkeypatch.setenv(variable, "HIDDEN")
    settings = settings_of(place, server, "a")
    with Engine(settings) as one:
        one.open_namespace()
        for i in range(20):
            assert one.load(prompt(i)) == (0, 0)
            one.dump(prompt(i))
            # From memory.
            assert one.load(prompt(i)) == (BLOCKS, 0)
            time.sleep(0.1)
    log = log_of(settings).splitlines()
    said = [line for line in log if "access is denied" in line]
    for kind in ("lookup failed", "write failed io error"):
        assert len([line for line in said if f"{kind}:" in line]) <= 1
    assert 1 <= len(said) <= 3
    assert not [line for line in log if "HIDDEN" in line or "a-secret" in line]
    assert not [name for name in server.names() if name.endswith(".kv")]
