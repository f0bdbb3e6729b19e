"""Promised pages behind real node caches over storage that fails for a moment, or for good."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator

import pytest

from tests.faults.fuse import mount_fuse, needs_fuse
from tests.faults.s3_proxy import S3Proxy
from tests.faults.s3_server import BUCKET, ENVIRONMENT, S3Server
from tests.store.node.support import Engine, Place, engine, make_keys
from ucm.config.settings import StoreSettings
from ucm.store.node import protocol as p

pytestmark = pytest.mark.process
KEYS = make_keys("a", 12)
# Those of all pauses, of 0.1, 0.2, 0.4 and 0.8 s.
WAITS_S = 1.5


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Proxy]:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    server.clear()
    with S3Proxy(server.port) as proxy:
        yield proxy


def settings_of(place: Place, url: str, socket: str) -> StoreSettings:
    return place.settings(
        socket,
        pipeline=("Cache", "S3"),
        storage_backends=(),
        s3_bucket=BUCKET,
        s3_endpoint=url,
        io_timeout_ms=2_000,
        retry_ms=500,
    )


def load_promised(client: Engine) -> tuple[int, str, float]:
    """How many pages came, why no more, and after how many seconds."""
    began_s = time.monotonic()
    reply = client.answer(p.LookupReply, client.ask(KEYS, promised=len(KEYS)))
    client.client.send(p.Release(lookups=[reply.id]))
    return len(reply.offsets), reply.reason, time.monotonic() - began_s


@needs_fuse
@pytest.mark.parametrize("operation", ["open", "read"])
def test_a_file_that_can_not_be_read_once_is_read_all_the_same(
    place: Place, operation: str
) -> None:
    place.write(KEYS)
    mounted = place.directory / "mounted"
    with mount_fuse(place.store, mounted) as mount:
        settings = place.settings("a", storage_backends=(str(mounted),), direct_io=True)
        with engine(settings) as decode:
            mount.fail(operation, errno.EIO, times=1)

            assert load_promised(decode)[:2] == (len(KEYS), "")
            assert decode.status().counters["promised_again"] == 1


@needs_fuse
def test_a_mount_that_fails_for_good_is_asked_a_few_times_and_then_not_waited_for(
    place: Place,
) -> None:
    place.write(KEYS)
    mounted = place.directory / "mounted"
    with mount_fuse(place.store, mounted) as mount:
        settings = place.settings("a", storage_backends=(str(mounted),), direct_io=True)
        with engine(settings) as decode:
            mount.fail("open", errno.EIO)
            before = mount.calls["open"]
            pages, reason, seconds = load_promised(decode)
            asked = mount.calls["open"] - before
            assert (pages, reason) == (0, "io_error") and seconds >= WAITS_S
            # Eight threads, two pages of each at a time, in the first round and in each further.
            assert asked <= 5 * 16

            _, reason, seconds = load_promised(decode)
            assert reason == "io_error" and seconds < WAITS_S / 2

            mount.release()
            assert load_promised(decode)[:2] == (len(KEYS), "")


@pytest.mark.parametrize(("method", "block"), [("GET", 4), ("HEAD", -1)])
def test_a_request_that_fails_once_costs_no_page(
    place: Place, proxy: S3Proxy, method: str, block: int
) -> None:
    """The client has tried it again by itself, at once."""
    with (
        engine(settings_of(place, proxy.url, "a")) as prefill,
        engine(settings_of(place, proxy.url, "b")) as decode,
    ):
        prefill.dump(KEYS)
        prefill.wait_written()
        proxy.break_off(method, f"{KEYS[block].hex()}.kv", times=2)

        assert load_promised(decode)[:2] == (len(KEYS), "")
        assert decode.status().counters["promised_again"] == 1


@pytest.mark.parametrize("away_s", [0.7, 1.2])
def test_a_server_that_is_back_while_there_is_time_costs_no_page(
    place: Place, proxy: S3Proxy, away_s: float
) -> None:
    """All that is asked of it fails meanwhile, so it is left alone for a moment as well. When it is
    back, one request is let through at first."""
    with (
        engine(settings_of(place, proxy.url, "a")) as prefill,
        engine(settings_of(place, proxy.url, "b")) as decode,
    ):
        prefill.dump(KEYS)
        prefill.wait_written()
        proxy.break_off("GET", ".kv")
        healer = threading.Timer(away_s, proxy.heal)
        healer.start()

        assert load_promised(decode)[:2] == (len(KEYS), "")
        healer.join()


def test_a_server_that_stays_away_is_asked_next_to_nothing(place: Place, proxy: S3Proxy) -> None:
    with (
        engine(settings_of(place, proxy.url, "a")) as prefill,
        engine(settings_of(place, proxy.url, "b")) as decode,
    ):
        prefill.dump(KEYS)
        prefill.wait_written()
        proxy.break_off("GET", ".kv")
        proxy.break_off("HEAD", ".kv")
        before = proxy.calls.total()
        for _ in range(20):
            pages, reason, _ = load_promised(decode)
            assert (pages, reason) == (0, "io_error")

        # Each counts twice, as the client tries it again.
        assert proxy.calls.total() - before < 40
