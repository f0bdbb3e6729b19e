"""The threads of the node cache, on a real event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from ucm.errors import TierError
from ucm.store.node.io_threads import IoPool

SOON_S = 20.0


class Hung:
    """Calls that don't return before `release`."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def __call__(self) -> str:
        self.released.wait()
        return "late"


@pytest.fixture
def hung() -> Iterator[Hung]:
    call = Hung()
    yield call
    call.released.set()


async def until(condition: Callable[[], object], pool: IoPool) -> None:
    deadline_s = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline_s
        pool.tick()
        await asyncio.sleep(0.005)


def make_pool(*, num_threads: int = 2, timeout_s: float = 0.05, keeps: bool = False) -> IoPool:
    return IoPool(
        "test",
        loop=asyncio.get_running_loop(),
        num_threads=num_threads,
        timeout_s=timeout_s,
        keeps_queue_when_stalled=keeps,
    )


async def test_every_call_ends_once_with_its_result() -> None:
    pool, results = make_pool(num_threads=4, timeout_s=SOON_S), []
    for i in range(500):
        pool.submit(lambda i=i: i, results.append)
    await until(lambda: pool.depth == 0, pool)
    pool.close()

    assert sorted(results) == list(range(500))


async def test_what_a_call_raises_is_its_result_and_costs_no_thread() -> None:
    pool, results = make_pool(num_threads=1), []
    full = TierError("full", reason="full")

    def fail(error: Exception) -> object:
        raise error

    pool.submit(lambda: fail(full), results.append)
    pool.submit(lambda: fail(ZeroDivisionError("odd")), results.append)
    pool.submit(lambda: "well", results.append)
    await until(lambda: pool.depth == 0, pool)
    pool.close()

    assert results[0] is full
    assert isinstance(results[1], TierError)
    assert "ZeroDivisionError: odd" in str(results[1])
    assert results[2] == "well"


async def test_an_overdue_call_is_told_at_once_and_ends_when_it_returns(hung: Hung) -> None:
    pool, events = make_pool(), []
    pool.submit(hung, events.append, on_overdue=lambda: events.append("overdue"))
    await until(lambda: events, pool)

    assert events == ["overdue"]
    assert (pool.num_overdue, pool.depth, pool.stalled) == (1, 1, True)
    hung.released.set()
    await until(lambda: pool.depth == 0, pool)
    pool.close()
    assert events == ["overdue", "late"]
    assert (pool.num_overdue, pool.stalled) == (0, False)


async def test_a_stalled_pool_of_reads_gives_back_its_queue_and_works_again_later(
    hung: Hung,
) -> None:
    pool, queued, started = make_pool(), [], []
    pool.submit(hung, started.append)
    pool.submit(hung, started.append)
    for _ in range(3):
        pool.submit(lambda: "read", queued.append)
    await until(lambda: len(queued) == 3, pool)

    assert [error.reason for error in queued] == ["timeout"] * 3
    assert started == []
    hung.released.set()
    await until(lambda: pool.depth == 0, pool)
    pool.submit(lambda: "read", queued.append)
    await until(lambda: pool.depth == 0, pool)
    pool.close()
    assert queued[3:] == ["read"]


async def test_a_stalled_pool_of_writes_keeps_its_queue(hung: Hung) -> None:
    pool, queued = make_pool(num_threads=1, keeps=True), []
    pool.submit(hung, lambda _: None)
    pool.submit(lambda: "written", queued.append)
    await until(lambda: pool.stalled, pool)
    pool.tick()

    assert queued == []
    hung.released.set()
    await until(lambda: pool.depth == 0, pool)
    pool.close()
    assert queued == ["written"]
