"""What storage has refused is written when storage can, though nobody meets it."""

from __future__ import annotations

from tests.store.node.test_writeback import FULL, A, Bench, prompt
from ucm.errors import TierError
from ucm.store.node.saved import Saving


def pass_time(bench: Bench, seconds: float, *, error: TierError | None = None) -> int:
    """In tenths of a second; what is asked of storage meanwhile ends well, or with `error`. Returns
    how much was asked."""
    asked = 0
    for _ in range(round(seconds * 10)):
        bench.now_s += 0.1
        bench.writeback.tick()
        asked += len(bench.pool.jobs)
        bench.pool.end_all(error)
    return asked


def test_what_storage_refused_is_written_when_it_can_though_nobody_meets_it() -> None:
    bench = Bench()
    bench.dump(A)
    bench.pool.end(2, error=FULL)
    bench.pool.end_all()
    assert bench.stored() == set(A[:2])
    assert bench.told.keys() == set(A[2:])

    pass_time(bench, 5.0, error=FULL)
    bench.check_order()
    pass_time(bench, 10.0)

    assert bench.stored() == set(A)
    assert bench.told == {}
    # However often it was tried.
    assert bench.counters["write_failed_full"] == 1
    assert bench.counters["dump_dropped_after_failed"] == 5
    bench.check_nothing_is_held()


def test_what_storage_goes_on_refusing_is_tried_ever_more_seldom_and_then_left_alone() -> None:
    bench = Bench()
    bench.dump(A[:1])
    bench.pool.end_all(FULL)

    asked = [pass_time(bench, 20.0, error=FULL) for _ in range(4)]

    assert asked[0] > asked[1] >= asked[2] > 0
    assert sum(asked) < 20
    assert asked[3] == 0
    assert bench.writeback.state(A[0]) is Saving.REFUSED


def test_no_more_pages_are_tried_again_than_the_queue_has_places() -> None:
    bench = Bench(max_pages=3)
    for keys in (A[:3], A[3:6]):
        bench.dump(keys)
        bench.pool.end_all(FULL)

    pass_time(bench, 10.0)

    assert bench.stored() == set(A[:3])


def test_a_page_that_has_left_memory_is_not_tried_again() -> None:
    bench = Bench()
    bench.dump(A[:1])
    bench.pool.end_all(FULL)
    while bench.slots.find(A[0]) is not None:
        bench.reserve(prompt(f"other {bench.slots.counts().filling}", 1)[0])

    assert pass_time(bench, 10.0) == 0
