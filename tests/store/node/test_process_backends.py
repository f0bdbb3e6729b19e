"""Real node caches over two storage backends: when one hangs or is missing, the other one does not
feel it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.fuse import FuseMount, mount_fuse, needs_fuse
from tests.store.node.support import (
    FINGERPRINT,
    PAGE_BYTES,
    Engine,
    Place,
    alive,
    content,
    engine,
    log_of,
    make_keys,
    wait_until,
)
from ucm.config.settings import StoreSettings
from ucm.store.blocks.keys import Key
from ucm.store.blocks.page_layout import padded_bytes
from ucm.store.node import protocol as p
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.tier import PosixTier
from ucm.store.tiers.tier import TierNamespace

pytestmark = [pytest.mark.process, needs_fuse]

STORED = make_keys("stored", 64)
NEW = make_keys("new", 64)
LOOKUP_MS = 60_000


class TwoBackends:
    """`hung` shows `below`. Pages of `STORED` are in both; those of `NEW` are not stored yet."""

    def __init__(self, place: Place) -> None:
        self.good, self.below = place.store, place.directory / "below"
        self.hung = place.directory / "hung"
        both = PosixTier([str(self.good), str(self.below)])
        namespace = TierNamespace(FINGERPRINT, PAGE_BYTES, b"{}")
        both.open_namespace(namespace)
        page = memoryview(mmap.mmap(-1, padded_bytes(PAGE_BYTES)))
        for key in [*STORED, *NEW]:
            page[:PAGE_BYTES] = content(key)
            staged = both.stage(namespace, key, page, num_tokens=128)
            assert staged is not None
            both.publish(staged)
        self._of_good = {key for key in [*STORED, *NEW] if _file(self.good, key).exists()}
        for key in NEW:
            _file(self.good if key in self._of_good else self.below, key).unlink()

    def in_good(self, keys: Sequence[Key]) -> list[Key]:
        return [key for key in keys if key in self._of_good]

    def in_hung(self, keys: Sequence[Key]) -> list[Key]:
        return [key for key in keys if key not in self._of_good]

    def are_written(self, keys: Sequence[Key]) -> bool:
        return all(
            _file(self.good if key in self._of_good else self.below, key).exists() for key in keys
        )

    def in_files(self) -> set[Path]:
        """All files that hold pages or may come to hold them."""
        return {
            path for each in (self.good, self.below) for path in each.rglob("*") if path.is_file()
        }

    def settings(self, place: Place, **changes: object) -> StoreSettings:
        backends = (str(self.good), str(self.hung))
        return place.settings(storage_backends=backends, io_timeout_ms=1000, **changes)

    @contextmanager
    def mounted(self, *, hang: Sequence[str] = ()) -> Iterator[FuseMount]:
        with mount_fuse(self.below, self.hung, hang=hang) as mount:
            try:
                yield mount
            finally:
                mount.release()


def _file(backend: Path, key: Key) -> Path:
    return Path(paths.block_path(str(backend), FINGERPRINT, key))


def dump_each(client: Engine, keys: Sequence[Key]) -> None:
    """Pages that nothing precedes, as the store API dumps them."""
    none = [b""] * len(keys)
    client.client.send(p.Reserve(id=99, ns=1, keys=list(keys), parents=none))
    offsets = client.answer(p.ReserveReply, 99).offsets
    assert min(offsets) >= 0, "each has a slot"
    client.fill(keys, offsets)
    client.client.send(p.Commit(ns=1, keys=list(keys), parents=none))


def find(client: Engine, keys: Sequence[Key], *, timeout_ms: int = LOOKUP_MS) -> p.Found:
    message = p.Find(id=98, ns=1, keys=list(keys), storage=True, timeout_ms=timeout_ms)
    client.client.send(message)
    return client.answer(p.Found, 98)


@pytest.mark.parametrize("since", ["a moment ago", "long"])
def test_a_backend_that_hangs_costs_its_own_pages_and_no_others(place: Place, since: str) -> None:
    """Whatever was asked of it, the other one's pages are found, read and written."""
    both = TwoBackends(place)
    settings = both.settings(place, read_threads=2, write_threads=2, write_queue_pages=16)
    with both.mounted() as mount, engine(settings) as client:
        mount.hang("lookup")
        for key in both.in_hung(STORED)[:8]:
            client.ask([key], timeout_ms=LOOKUP_MS)
        dump_each(client, both.in_hung(NEW)[:12])
        if since == "long":
            wait_until(
                lambda: (
                    {"reads_stalled": 1, "writes_stalled": 1}.items()
                    <= client.status().slots.items()
                ),
                "the node cache knows",
            )
            for doing in ("read", "written"):
                said = f"storage hangs: {both.hung} can't be {doing}"
                assert log_of(settings).count(said) == 1

        stored, new = both.in_good(STORED), both.in_good(NEW)
        assert set(find(client, stored).places) == {p.IN_STORAGE}
        for key in stored:
            assert client.load([key]) == (1, 1)
        for key in new:
            dump_each(client, [key])
            wait_until(lambda: both.are_written([key]), "a page of the other one is written")  # noqa: B023

        mount.release()
        wait_until(lambda: both.are_written(both.in_hung(NEW)[:12]), "what waited is written")
        for key in both.in_hung(STORED)[8:]:
            assert client.load([key]) == (1, 1)
        assert client.status().invariant == ""


def test_of_a_prompt_over_both_backends_what_hangs_ends_the_hit_at_once(place: Place) -> None:
    """A hit is a prefix, so it ends at the first block of the one that hangs, and doesn't wait."""
    both = TwoBackends(place)
    prompt = [*both.in_good(STORED)[:5], *both.in_hung(STORED)[:1], *both.in_good(STORED)[5:]]
    with both.mounted() as mount, engine(both.settings(place, read_threads=2)) as client:
        mount.hang("lookup")
        client.ask(both.in_hung(STORED)[1:2], timeout_ms=LOOKUP_MS)
        wait_until(lambda: client.status().slots["reads_stalled"], "the node cache knows")

        reply = client.look_up(prompt, timeout_ms=LOOKUP_MS)

        assert (len(reply.offsets), reply.reason) == (5, "timeout")


def test_pages_of_a_prompt_dont_wait_for_those_that_hang(place: Place) -> None:
    """A page is published after the one before it. While that one hangs, the pages behind it give
    up their places in the queue, which others need."""
    both = TwoBackends(place)
    good, hung = both.in_good(NEW), both.in_hung(NEW)
    settings = both.settings(place, write_threads=2, write_queue_pages=8)
    with both.mounted() as mount, engine(settings) as client:
        mount.hang("lookup")
        prompt = [hung[0], *good[:8]]
        client.dump(prompt)
        dump_each(client, hung[1:3])
        wait_until(lambda: client.status().queues["write_pages"] == 3, "the others gave up")

        dump_each(client, good[8:16])
        wait_until(lambda: both.are_written(good[8:16]), "they had places")
        assert not any(both.are_written([key]) for key in prompt)

        mount.release()
        client.wait_written()
        client.dump(prompt)
        wait_until(lambda: both.are_written(prompt), "all of the prompt is written")


def test_a_node_cache_leaves_when_only_what_hangs_is_left(place: Place) -> None:
    both = TwoBackends(place)
    settings = both.settings(place, write_threads=1, write_queue_pages=64)
    with both.mounted() as mount, engine(settings) as client:
        mount.hang("lookup")
        dump_each(client, [*both.in_hung(NEW)[:3], *both.in_good(NEW)])
        client.client.send(p.Shutdown())

        wait_until(lambda: both.are_written(both.in_good(NEW)), "what could be written was")
        wait_until(
            lambda: "leaving with 3 pages unwritten" in log_of(settings), "it waits no longer"
        )
        mount.release()
        wait_until(lambda: not alive(client.pid), "it has left")


def check_that_pages_are_read_and_none_are_written(
    client: Engine, both: TwoBackends, *, name: str
) -> None:
    good, files = both.in_good(STORED), both.in_files()
    assert set(find(client, good).places) == {p.IN_STORAGE}
    for key in good:
        assert client.load([key]) == (1, 1)
    assert client.look_up(both.in_hung(STORED)[:1]).reason == "never_stored"
    new = [*both.in_good(NEW)[:2], *both.in_hung(NEW)[:2]]
    for key in new:
        dump_each(client, [key])
    refused: set[bytes] = set()
    while refused != set(new):
        news = client.answer(p.SavingNews)
        assert news.reason == "io_error"
        refused |= set(news.refused)
    said = client.answer(p.Notice).text
    while "nothing is written to any storage backend" not in said:
        said = client.answer(p.Notice).text
    assert name in said
    assert both.in_files() == files


def check_that_all_pages_are_read_and_written(client: Engine, both: TwoBackends) -> None:
    for key in both.in_hung(STORED):
        wait_until(lambda: client.load([key]) == (1, 1), "it was found")  # noqa: B023
    wait_until(lambda: dump_and_look(client, both), "pages are written as ever")


def dump_and_look(client: Engine, both: TwoBackends) -> bool:
    """What was refused is tried again when it is met."""
    client.dump(NEW)
    return both.are_written(NEW)


def test_a_backend_that_hangs_at_the_start_is_named_and_the_other_one_is_read(
    place: Place,
) -> None:
    both = TwoBackends(place)
    with both.mounted(hang=["lookup"]) as mount, Engine(both.settings(place)) as client:
        opened = client.open_namespace()
        assert f"{both.hung}: storage has not answered for 1 s" in opened.error
        assert not opened.refused

        check_that_pages_are_read_and_none_are_written(client, both, name=str(both.hung))

        mount.release()
        check_that_all_pages_are_read_and_written(client, both)


def test_a_backend_that_is_missing_at_the_start_is_named_and_the_other_one_is_read(
    place: Place,
) -> None:
    """Its mount comes later, and no engine has to be started anew."""
    both = TwoBackends(place)
    both.hung = place.directory / "mounts" / "hung"
    with Engine(both.settings(place)) as client:
        opened = client.open_namespace()
        assert f"{both.hung}: can't be made, because {both.hung.parent} is not" in opened.error
        assert not opened.refused

        check_that_pages_are_read_and_none_are_written(client, both, name=str(both.hung))

        both.hung.parent.mkdir()
        os.symlink(both.below, both.hung)
        check_that_all_pages_are_read_and_written(client, both)
