"""Rows of vLLM's host memory through real node caches: right, or left out."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from tests.integration.tiering.rows import (
    ROW_BYTES,
    Host,
    content,
    make_keys,
    manifest,
    settings_of,
)
from tests.store.node.support import Engine, Place, kill, wait_until
from ucm.integration.tiering.counts import Series, TierCounts
from ucm.integration.tiering.row_store import RowStore, result_of
from ucm.integration.tiering.rows import HostRows
from ucm.outcome import Outcome
from ucm.store.blocks.blockfile import HEADER_BYTES
from ucm.store.node import protocol as p

pytestmark = pytest.mark.process

HostMaker = Callable[..., Host]


@pytest.fixture
def host(place: Place) -> Iterator[HostMaker]:
    hosts: list[Host] = []

    def make(node: str = "a", **changes: int) -> Host:
        hosts.append(Host(place, node, **changes))
        return hosts[-1]

    yield make
    for each in hosts:
        each.close()


def pid_of(one: Host) -> int:
    with Engine(one.settings.store, session="watch", role="tool") as watch:
        return watch.pid


def test_rows_that_one_node_has_stored_another_loads(host: HostMaker) -> None:
    one, other = host("a"), host("b")
    keys = make_keys("shared", 8)
    assert one.dump(keys).job.is_whole
    one.wait_files(keys)

    assert other.load(keys) == set(keys)
    assert other.counted()[Series("ucm_tiering_loaded_rows", ())] == 8


def test_a_row_is_written_after_the_one_that_precedes_it_in_the_prompt(
    host: HostMaker, place: Place
) -> None:
    """By whoever stores which of them: so the last one stands for all."""
    one = host()
    keys = make_keys("order", 12)
    parents = [b"", *keys[:-1]]
    rows = one.fill(keys)
    for number in reversed(range(0, 12, 3)):
        part = slice(number, number + 3)
        one.store.store(number, keys[part], rows[part], parents[part])
    seen: list[int] = []

    def look() -> bool:
        seen.append(sum(one.file(key).exists() for key in keys))
        there = [one.file(key).exists() for key in reversed(keys)]
        # Looked at from the last: what came in between is of one before it.
        assert there == sorted(there)
        return all(there)

    wait_until(look, "all rows in files")
    one.store.drain()
    assert len(one.store.take_ended()) == 4


def test_rows_that_are_not_there_are_left_out_and_the_others_loaded(host: HostMaker) -> None:
    one = host()
    keys = make_keys("some", 9)
    one.dump(keys[::2])

    assert one.load(keys) == set(keys[::2])
    lost = Series("ucm_tiering_lost_rows", (Outcome.NEVER_STORED.value,))
    assert one.counted()[lost] == 4


def test_a_row_with_a_flipped_bit_is_left_out(host: HostMaker, place: Place) -> None:
    one, other = host("a"), host("b")
    keys = make_keys("damaged", 5)
    one.dump(keys)
    one.wait_files(keys)
    data = bytearray(one.file(keys[2]).read_bytes())
    data[HEADER_BYTES + 77] ^= 4
    one.file(keys[2]).write_bytes(data)

    assert other.load(keys) == {*keys[:2], *keys[3:]}
    assert other.counted()[Series("ucm_tiering_lost_rows", (Outcome.CORRUPT.value,))] == 1
    assert len(place.in_quarantine()) == 1
    # Who was told that it is there is told now that it is not.
    found: p.Found = done_result(other, keys)
    assert [bool(place) for place in found.places] == [True, True, False, True, True]


def done_result(one: Host, keys: list) -> p.Found:
    task = one.store.find(keys)
    wait_until(lambda: task.has_ended, "an answer")
    found = result_of(task)
    assert isinstance(found, p.Found)
    return found


def test_two_writers_of_the_same_rows_both_end_well_and_there_is_one_file_of_each(
    host: HostMaker, place: Place
) -> None:
    one, other, reader = host("a"), host("a"), host("b")
    keys = make_keys("twice", 12)
    one.begin_dump(keys)
    other.begin_dump(keys)

    assert one.end().job.is_whole and other.end().job.is_whole
    one.wait_files(keys)
    assert len(place.blocks()) == 12
    assert reader.load(keys) == set(keys)


def test_writers_on_two_nodes_don_t_mind_each_other(host: HostMaker, place: Place) -> None:
    one, other = host("a"), host("b")
    keys = make_keys("twice on two", 12)
    one.begin_dump(keys)
    other.begin_dump(keys)

    assert one.end().job.is_whole and other.end().job.is_whole
    one.wait_files(keys)
    assert len(place.blocks()) == 12 and not place.in_quarantine()


def test_rows_that_a_client_began_and_died_over_are_stored_by_who_waited_for_it(
    host: HostMaker,
) -> None:
    one = host()
    keys = make_keys("orphaned", 3)
    with Engine(one.settings.store, session="dies", role="store") as stranger:
        stranger.client.send(
            p.OpenNamespace(
                ns=1,
                fingerprint=one.store.names.fingerprint,
                page_bytes=ROW_BYTES,
                block_tokens=4,
                manifest=b"{}",
            )
        )
        stranger.answer(p.NamespaceOpened)
        assert min(stranger.reserve(keys)) >= 0
        one.begin_dump(keys)
        time.sleep(0.2)
        assert one.store.take_ended() == []  # it was told that they are there, and looked

    assert one.end().job.is_whole
    assert one.load(keys) == set(keys)


def test_what_is_promised_is_waited_for_and_brought_here(host: HostMaker) -> None:
    prefill, decode = host("a"), host("b")
    keys = make_keys("promised", 6)
    task = decode.store.wait_for(keys, 30.0)
    time.sleep(0.1)
    assert not task.has_ended
    prefill.dump(keys)

    wait_until(lambda: task.has_ended, "the promised rows have come")
    assert result_of(task) is Outcome.FINE
    places = done_result(decode, keys).places
    assert all(each & p.IN_MEMORY for each in places)


def test_what_is_promised_and_never_comes_is_waited_for_in_its_time_only(host: HostMaker) -> None:
    decode = host()
    started_s = time.monotonic()
    task = decode.store.wait_for(make_keys("never", 2), 0.5)

    wait_until(lambda: task.has_ended, "the wait is over")
    assert time.monotonic() - started_s < 5
    assert result_of(task) is not Outcome.FINE


def test_a_node_cache_that_dies_in_the_middle_is_gone_on_without(host: HostMaker) -> None:
    """Its clients start the next one; what was in files comes from there."""
    one = host()
    keys = make_keys("killed", 10)
    one.dump(keys)
    one.wait_files(keys)
    kill(pid_of(one))

    assert one.load(keys) == set(keys)
    more = make_keys("after it", 10)
    assert one.dump(more).job.is_whole
    assert one.load(more) == set(more)


def test_a_node_cache_that_stands_still_keeps_a_job_no_longer_than_its_time_and_then_nobody(
    host: HostMaker,
) -> None:
    one = host(lookup_timeout_ms=500)
    keys = make_keys("still", 4)
    one.dump(keys)
    pid = pid_of(one)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert one.load(keys) == set()
        wait_until(lambda: not one.store.is_ready, "nobody is asked any more")
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: one.store.is_ready, "it answers again")
    assert one.load(keys) == set(keys)


def test_a_node_cache_that_stays_silent_is_given_nothing_more_and_jobs_end_at_once(
    host: HostMaker,
) -> None:
    one = host(lookup_timeout_ms=300, dump_timeout_ms=600)
    keys = make_keys("silent", 4)
    pid = pid_of(one)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert not one.dump(keys).job.done
        wait_until(lambda: one.store._driver.is_silent, "it is given up")
        started_s = time.monotonic()
        ended = one.dump(keys)
        assert time.monotonic() - started_s < 0.3 and not ended.job.is_whole
    finally:
        os.kill(pid, signal.SIGCONT)
    assert one.counted()[Series("ucm_tiering_dropped_rows", ())] == 8
    wait_until(lambda: one.store.is_ready, "it answers again")
    assert one.dump(keys).job.is_whole
    assert one.load(keys) == set(keys)


def test_a_wait_that_is_withdrawn_ends_and_what_comes_later_is_found(host: HostMaker) -> None:
    prefill, decode = host("a"), host("b")
    keys = make_keys("withdrawn", 3)
    task = decode.store.wait_for(keys, 60.0)
    time.sleep(0.1)
    decode.store.withdraw(task)

    wait_until(lambda: task.has_ended, "it has ended", within_s=5.0)
    assert result_of(task) is None
    prefill.dump(keys)
    prefill.wait_files(keys)
    assert decode.load(keys) == set(keys)


def test_rows_that_fit_into_no_node_cache_are_dropped_and_the_log_says_why(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    rows = HostRows(address=0, num_rows=1, row_bytes=1 << 30)
    large = manifest(k_size=1 << 30)
    store = RowStore(settings_of(place, "a"), rows, large, name="large", counts=TierCounts())
    try:
        wait_until(lambda: store._driver.has_ended, "it is refused")
        store.store(1, make_keys("large", 1), [0], [b""])
        assert [ended.job.done for ended in store.take_ended()] == [set()]
        assert not store.is_ready
    finally:
        store.close()
    assert any(
        "the store can't be used" in record.message and "1073741824" in record.message
        for record in caplog.records
    )


def test_a_drained_store_has_told_of_every_job(host: HostMaker) -> None:
    one = host()
    keys = make_keys("drained", 8)
    for number in range(4):
        one.store.store(number, keys[number::4], one.fill(keys[number::4]), [b"", b""])
    one.store.drain()

    assert sorted(ended.number for ended in one.store.take_ended()) == [0, 1, 2, 3]


def test_after_it_was_reopened_it_finds_nothing_of_what_was_there_before(host: HostMaker) -> None:
    one = host()
    keys = make_keys("before", 3)
    one.dump(keys)
    before = one.store.names.fingerprint
    one.store.reopen(manifest(epoch=7))
    wait_until(lambda: one.store.is_ready, "the node cache answers")

    assert one.store.names.fingerprint != before
    names = [one.store.names.key(b"x" * 36)]
    assert one.load(names) == set()
    one.dump(names)
    assert one.load(names) == set(names)
    assert content(names[0]) == one[0]
