"""A bucket behind real node caches: hand-off, an outage, and credentials that don't fit."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.faults.s3_server import BUCKET, ENVIRONMENT, S3Server
from tests.store.node.support import Engine, Place, engine, log_of, make_keys, wait_until
from ucm.config.settings import StoreSettings
from ucm.store.node import protocol as p

pytestmark = pytest.mark.process
KEYS = make_keys("a", 5)
OTHERS = make_keys("b", 5)
IO_TIMEOUT_MS = 2_000
RETRY_MS = 200


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture(autouse=True)
def _credentials(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    server.clear()


def settings_of(place: Place, server: S3Server, socket: str) -> StoreSettings:
    """Those of one node."""
    return place.settings(
        socket,
        pipeline=("Cache", "S3"),
        storage_backends=(),
        s3_bucket=BUCKET,
        s3_endpoint=server.url,
        io_timeout_ms=IO_TIMEOUT_MS,
        retry_ms=RETRY_MS,
    )


def test_what_one_node_dumps_another_loads(place: Place, server: S3Server) -> None:
    with (
        engine(settings_of(place, server, "a")) as prefill,
        engine(settings_of(place, server, "b")) as decode,
    ):
        assert decode.load(KEYS) == (0, 0)

        prefill.dump(KEYS)
        status = prefill.wait_written()

        assert status.tier == "s3" and status.counters["write_done"] == len(KEYS)
        assert decode.load(KEYS) == (len(KEYS), len(KEYS))


def test_promised_pages_arrive_while_they_are_written(place: Place, server: S3Server) -> None:
    """Asked for before they are there."""
    with (
        engine(settings_of(place, server, "a")) as prefill,
        engine(settings_of(place, server, "b")) as decode,
    ):
        lookup = decode.ask(KEYS, promised=len(KEYS))
        prefill.dump(KEYS)

        assert len(decode.answer(p.LookupReply, lookup).offsets) == len(KEYS)


def test_an_outage_costs_hits_and_what_was_dumped_in_it_is_written_afterwards(
    place: Place, server: S3Server
) -> None:
    prefill_settings = settings_of(place, server, "a")
    with (
        engine(prefill_settings) as prefill,
        engine(settings_of(place, server, "b")) as decode,
    ):
        prefill.dump(KEYS)
        prefill.wait_written()
        server.kill()
        began_s = time.monotonic()

        assert decode.load(KEYS) == (0, 0)
        prefill.dump(OTHERS)
        assert prefill.load(KEYS) == prefill.load(OTHERS) == (5, 0)
        assert time.monotonic() - began_s < 2 * IO_TIMEOUT_MS / 1000

        server.start()
        wait_until(
            lambda: (
                decode.load(OTHERS) == (len(OTHERS), len(OTHERS))
                or decode.load(OTHERS)[0] == len(OTHERS)
            ),
            "what was dumped in the outage has come by the bucket",
        )
    assert "can't connect" in log_of(prefill_settings)


def test_of_a_server_that_hangs_in_the_middle_of_a_prompt_decode_gets_what_is_there_and_then_all(
    place: Place, server: S3Server
) -> None:
    """Pages of one prompt are on their way side by side: some get there, and some before them
    don't until they are written once more."""
    keys = make_keys("long", 60)
    with (
        engine(settings_of(place, server, "a")) as prefill,
        engine(settings_of(place, server, "b")) as decode,
    ):
        lookup = decode.ask(keys, promised=len(keys))
        prefill.dump(keys)
        wait_until(lambda: prefill.status().counters.get("write_done", 0) > 4, "some are written")
        with server.stopped():
            counters = wait_until(
                lambda: _with_failures(prefill.status()), "the server was waited for in vain"
            )
        assert counters["write_done"] < len(keys)
        decode.answer(p.LookupReply, lookup)
        decode.client.send(p.Release(lookups=[lookup]))
        decode.load(keys)

        wait_until(lambda: decode.load(keys)[0] == len(keys), "all are there")
        counters = prefill.wait_written().counters
        # The server may have taken one that was given up.
        num_there = counters["write_done"] + counters.get("write_already_there", 0)
        assert num_there == len(keys)


def _with_failures(status: p.Status) -> dict[str, int]:
    failed = any(name.startswith("write_failed") for name in status.counters)
    return status.counters if failed else {}


def test_credentials_that_do_not_fit_are_one_line_and_serving_goes_on(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAHIDDEN")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "HIDDEN")
    with S3Server(checks_after=1) as strict:
        settings = settings_of(place, strict, "a")
        with Engine(settings) as client:
            client.open_namespace()
            for keys in (KEYS, OTHERS):
                assert client.load(keys) == (0, 0)
                client.dump(keys)
                assert client.load(keys) == (5, 0)

    log = log_of(settings)
    assert "access is denied" in log
    assert "HIDDEN" not in log
    for kind in ("lookup failed", "write failed io error"):
        assert len([line for line in log.splitlines() if f"{kind}:" in line]) <= 1
