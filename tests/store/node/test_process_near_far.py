"""Files near and a bucket far, behind real node caches: `Cache|Posix|S3`."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.s3_server import BUCKET, ENVIRONMENT, S3Server
from tests.store.node.support import (
    FINGERPRINT,
    PAGE_BYTES,
    Place,
    engine,
    kill,
    log_of,
    make_keys,
    wait_until,
)
from ucm.config.settings import StoreSettings
from ucm.store.blocks.blockfile import HEADER_BYTES
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p
from ucm.store.tiers.posix import paths

pytestmark = pytest.mark.process
KEYS = make_keys("a", 5)
OTHERS = make_keys("b", 5)
IO_TIMEOUT_MS = 2_000


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture(autouse=True)
def _credentials(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    server.clear()


def settings_of(place: Place, server: S3Server, socket: str, **changes: object) -> StoreSettings:
    """Those of one node."""
    return place.settings(
        socket,
        **{
            "pipeline": ("Cache", "Posix", "S3"),
            "s3_bucket": BUCKET,
            "s3_endpoint": server.url,
            "io_timeout_ms": IO_TIMEOUT_MS,
            "retry_ms": 200,
            **changes,
        },
    )


def object_of(key: Key) -> str:
    return f"{FINGERPRINT.hex()}/{key.hex()[:4]}/{key.hex()}.kv"


def is_far(server: S3Server, *keys: Key) -> bool:
    return all(server.has(object_of(key)) for key in keys)


def fill(place: Place, server: S3Server, keys: list[Key]) -> None:
    """By a node cache that has gone since, with what it had in memory."""
    with engine(settings_of(place, server, "fill")) as client:
        client.dump(keys)
        client.wait_written()
        kill(client.pid)
    assert all(place.block(key).exists() for key in keys) and is_far(server, *keys)


def test_what_is_dumped_is_in_both_with_the_same_bytes(place: Place, server: S3Server) -> None:
    with engine(settings_of(place, server, "a")) as client:
        client.dump(KEYS)
        status = client.wait_written()

    assert (status.tier, status.far) == ("posix", "s3")
    assert status.counters["write_done"] == status.counters["far_write_done"] == len(KEYS)
    for key in KEYS:
        assert server.ask("GET", object_of(key)) == place.block(key).read_bytes()


def test_what_is_near_is_read_there(place: Place, server: S3Server) -> None:
    fill(place, server, KEYS)
    with engine(settings_of(place, server, "a")) as client:
        assert client.load(KEYS) == (len(KEYS), len(KEYS))
        counters = client.wait_written().counters

    assert counters["tier_read_pages"] == len(KEYS)
    assert counters["far_tier_read_us"] == counters["far_tier_write_us"] == 0


def test_what_near_lacks_is_read_far_and_is_near_from_then_on(
    place: Place, server: S3Server
) -> None:
    fill(place, server, KEYS)
    for key in KEYS[1:]:
        place.block(key).unlink()

    with engine(settings_of(place, server, "a")) as client:
        assert client.load(KEYS) == (len(KEYS), len(KEYS))
        counters = client.wait_written().counters
        assert counters["tier_read_pages"] == 1
        assert counters["far_tier_read_pages"] == len(KEYS) - 1
        assert all(place.block(key).exists() for key in KEYS)
        kill(client.pid)

    with engine(settings_of(place, server, "b")) as client:
        assert client.load(KEYS) == (len(KEYS), len(KEYS))
        assert client.wait_written().counters["far_tier_read_pages"] == 0


def test_a_damaged_file_is_put_aside_and_its_page_read_far(place: Place, server: S3Server) -> None:
    fill(place, server, KEYS)
    good = place.block(KEYS[2]).read_bytes()
    place.block_with_flipped_bit(KEYS[2])

    with engine(settings_of(place, server, "a")) as client:
        assert client.load(KEYS) == (len(KEYS), len(KEYS))
        client.wait_written()

    assert len(place.in_quarantine()) == 1
    assert place.block(KEYS[2]).read_bytes() == good


def test_a_page_that_is_damaged_in_both_is_absent(place: Place, server: S3Server) -> None:
    fill(place, server, KEYS)
    damaged = place.block_with_flipped_bit(KEYS[2])
    server.ask("PUT", object_of(KEYS[2]), damaged)

    with engine(settings_of(place, server, "a")) as client:
        reply = client.look_up(KEYS)
        assert (len(reply.offsets), reply.reason) == (2, "corrupt")
        assert client.look_up(KEYS).reason == "never_stored"

    assert len(place.in_quarantine()) == 1
    assert not is_far(server, KEYS[2])


def test_a_node_with_other_files_loads_what_is_far(
    place: Place, server: S3Server, tmp_path: Path
) -> None:
    """Two nodes, each with a directory of its own, and one bucket."""
    other = settings_of(place, server, "b", storage_backends=(str(tmp_path),))
    with engine(settings_of(place, server, "a")) as prefill, engine(other) as decode:
        lookup = decode.ask(KEYS, promised=len(KEYS))
        assert decode.load(OTHERS) == (0, 0)
        prefill.dump(KEYS)
        prefill.dump(OTHERS)
        prefill.wait_written()

        assert len(decode.answer(p.LookupReply, lookup).offsets) == len(KEYS)
        assert decode.load(OTHERS) == (len(OTHERS), len(OTHERS))
        decode.wait_written()

    written = paths.block_path(str(tmp_path), FINGERPRINT, KEYS[-1])
    assert Path(written).read_bytes() == place.block(KEYS[-1]).read_bytes()


def test_a_bucket_that_hangs_holds_up_nothing_that_is_near(place: Place, server: S3Server) -> None:
    fill(place, server, KEYS)
    with engine(settings_of(place, server, "a")) as client:
        with server.stopped():
            began_s = time.monotonic()
            new = client.ask([*KEYS, *OTHERS], timeout_ms=1_000)
            assert client.load(KEYS)[0] == len(KEYS)
            client.dump(OTHERS)
            wait_until(
                lambda: all(place.block(key).exists() for key in OTHERS), "near has what is new"
            )
            assert time.monotonic() - began_s < IO_TIMEOUT_MS / 1000
            # It asks far for what near lacked, and is answered in its own time.
            assert len(client.answer(p.LookupReply, new).offsets) >= len(KEYS)
            assert time.monotonic() - began_s < 2 * IO_TIMEOUT_MS / 1000
        wait_until(lambda: is_far(server, *OTHERS), "what hung goes on")


def test_what_is_dumped_while_the_bucket_is_down_gets_there_afterwards(
    place: Place, server: S3Server
) -> None:
    settings = settings_of(place, server, "a")
    with engine(settings) as client:
        server.kill()
        client.dump(KEYS)
        status = wait_until(
            lambda: (each := client.status()).counters.get("far_write_failed_io_error") and each,
            "it is refused",
        )
        assert status.counters["write_done"] == len(KEYS)
        assert client.load(KEYS) == (len(KEYS), 0)

        server.start()
        wait_until(lambda: is_far(server, *KEYS), "they are written after all")
    assert "can't connect" in log_of(settings)


def test_what_a_full_directory_refuses_is_kept_far(
    place: Place, server: S3Server, small_filesystem: Path
) -> None:
    settings = settings_of(place, server, "a", storage_backends=(str(small_filesystem),))
    keys = make_keys("many", 40)
    with engine(settings) as client:
        client.dump(keys)
        wait_until(lambda: is_far(server, *keys), "far has them all")
        # Which may be sooner than near has any.
        wait_until(lambda: client.status().counters.get("write_done"), "near has some of them")
        assert client.status().counters["write_done"] < len(keys)
        # Nobody has to be told: they are kept.
        news = [each for each in client._inbox if isinstance(each, p.SavingNews)]
        assert not any(each.refused for each in news)
        kill(client.pid)

    with engine(settings) as client:
        assert client.load(keys) == (len(keys), len(keys))


@pytest.fixture
def small_filesystem(tmp_path: Path) -> Iterator[Path]:
    """With room for 20 pages or so."""
    where = tmp_path / "small"
    where.mkdir()
    size = 20 * (PAGE_BYTES + HEADER_BYTES)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user can't mount a filesystem")
    yield where
    subprocess.run(["umount", "--lazy", str(where)], check=True)


def test_a_node_cache_killed_before_far_had_a_page_leaves_it_near_and_far_gets_it_in_time(
    place: Place, server: S3Server
) -> None:
    settings = settings_of(place, server, "a", recheck_s=0.05)
    with engine(settings) as client, server.stopped():
        client.dump(KEYS)
        wait_until(lambda: all(place.block(key).exists() for key in KEYS), "near has them")
        kill(client.pid)
    assert not is_far(server, KEYS[-1])

    with engine(settings) as client:
        assert client.load(KEYS) == (len(KEYS), len(KEYS))
        wait_until(
            lambda: client.load(KEYS)[0] and is_far(server, *KEYS),
            "pages that are used again are looked for far, and written",
        )
