"""Real node caches over storage that is slow or hangs: what is small does not wait behind pages."""

from __future__ import annotations

import pytest

from tests.faults.fuse import mount_fuse, needs_fuse
from tests.store.api.whole_store import IDS, dump, load, rows, whole_blocks
from tests.store.node.support import Place, engine, make_keys, wait_until
from ucm.store.blocks.keys import Key

pytestmark = [pytest.mark.process, needs_fuse]

KEYS = make_keys("slow", 64)


def test_a_new_store_opens_while_many_pages_wait_to_be_written(place: Place) -> None:
    """Each write takes a second: what waits before it would take a minute."""
    settings = place.settings(write_threads=1, cache_capacity_bytes=128 << 20)
    with mount_fuse(place.directory / "below", place.store, delays_s={"write": 1.0}) as mount:
        with engine(settings) as client:
            client.dump(KEYS)
            with whole_blocks(place, unique_id="another", timeout_ms=20_000) as store:
                assert client.status().queues["write_pages"] > 32
                dump(store, IDS[:2])
                assert load(store, IDS[:2]) == rows(IDS[:2])
        assert mount.calls["write"] >= 1


def test_a_store_opens_though_storage_hangs_and_hears_why_nothing_is_written(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        mount_fuse(place.directory / "below", place.store, hang=["lookup"]) as mount,
        whole_blocks(place, timeout_ms=20_000, posix_io_timeout_ms=500) as store,
    ):
        assert "storage has not answered for 0.5 s (no manifest written)" in caplog.text
        dump(store, IDS[:2])
        assert load(store, IDS[:2]) == rows(IDS[:2])
        mount.release()


def write_below(place: Place, keys: list[Key]) -> None:
    """Files as another node would have left them, where a mount is to show them."""
    place.write(keys)
    (place.directory / "below").mkdir()
    for each in list(place.store.iterdir()):
        each.rename(place.directory / "below" / each.name)


def test_a_lookup_is_answered_before_the_pages_that_others_read(place: Place) -> None:
    write_below(place, KEYS)
    settings = place.settings(read_threads=2)
    with (
        mount_fuse(place.directory / "below", place.store, delays_s={"read": 1.0}) as mount,
        engine(settings) as reader,
        engine(settings, "other/0") as asker,
    ):
        reading = reader.ask(KEYS, timeout_ms=60_000)
        wait_until(lambda: mount.calls["read"] >= 2, "the pages are being read")

        reply = asker.look_up(make_keys("never stored", 4), timeout_ms=10_000)

        assert (reply.reason, len(reply.offsets)) == ("never_stored", 0)
        assert reading


@pytest.mark.parametrize("read_threads", [2, 8])
def test_who_asks_does_not_wait_behind_those_that_wait_for_promised_pages(
    place: Place, read_threads: int
) -> None:
    """Each look for a promised page takes seconds, and there are always more of them to come."""
    write_below(place, KEYS[:8])
    settings = place.settings(read_threads=read_threads)
    with (
        mount_fuse(place.directory / "below", place.store, delays_s={"opendir": 2.0}) as mount,
        engine(settings) as decode,
        engine(settings, "other/0") as asker,
    ):
        waiting = [
            decode.ask(make_keys(f"hand-off {i}", 4), promised=4, timeout_ms=120_000)
            for i in range(64)
        ]
        wait_until(lambda: mount.calls["opendir"] >= 1, "promised pages are being looked for")

        for key in KEYS[:8]:
            assert asker.load([key]) == (1, 1)

        assert decode.status().queues["lookups"] == len(waiting)
