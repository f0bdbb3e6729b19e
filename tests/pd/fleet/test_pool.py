"""Who gets what is free, and when an instance is left alone."""

from __future__ import annotations

import asyncio

import pytest
from yarl import URL

from ucm.pd.fleet.breaker import Breaker
from ucm.pd.fleet.instance import Role
from ucm.pd.fleet.pool import NoInstance, Pool, PoolRules, QueueFull

A, B = URL("http://a:1"), URL("http://b:1")


def pool(*urls: URL, max_running: int = 1, max_queued: int = 100, timeout_s: float = 10.0) -> Pool:
    made = Pool(
        Role.DECODE,
        PoolRules(
            max_running=max_running,
            max_queued=max_queued,
            queue_timeout_s=timeout_s,
            silent_after_s=10.0,
            breaker_failures=3,
            breaker_open_s=5.0,
        ),
    )
    for url in urls:
        made.add(url)
    return made


async def waiting(made: Pool, count: int) -> list[asyncio.Task]:
    tasks = [asyncio.create_task(made.admit(tokens=1)) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


async def test_an_instance_that_comes_is_filled_at_once_with_those_who_wait():
    made = pool(A, max_running=2)
    for _ in range(2):
        await made.admit(tokens=1)
    tasks = await waiting(made, 6)

    made.add(B)

    admitted = await asyncio.gather(*tasks[:2])
    assert [B, B] == [each.url for each in admitted]
    assert 4 == made.num_queued
    for task in tasks[2:]:
        task.cancel()


async def test_when_the_last_instance_goes_all_who_wait_hear_it():
    made = pool(A)
    await made.admit(tokens=1)
    tasks = await waiting(made, 3)

    made.remove(A)

    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [NoInstance] * 3 == [type(result) for result in results]


async def test_one_whom_nothing_free_suits_lets_others_go_first():
    made = pool(A, B)
    first, second = await made.admit(tokens=1), await made.admit(tokens=1)
    made.leave(first, tokens=1)
    picky = asyncio.create_task(made.admit(tokens=1, but=[first]))
    await asyncio.sleep(0)

    assert first is await made.admit(tokens=1)
    assert not picky.done()
    made.leave(second, tokens=1)
    assert second is await picky


async def test_one_who_leaves_when_it_is_its_turn_gives_the_turn_back():
    made = pool(A)
    held = await made.admit(tokens=5)
    (leaving, staying) = await waiting(made, 2)

    made.leave(held, tokens=5)  # the turn is given here, and the task has not run yet
    leaving.cancel()

    assert held is await staying
    made.leave(held, tokens=1)
    assert (0, 0) == (held.running, held.tokens)


async def test_more_than_may_wait_and_longer_than_one_may_wait_are_turned_away():
    made = pool(A, max_queued=1, timeout_s=0.05)
    held = await made.admit(tokens=1)
    (task,) = await waiting(made, 1)
    with pytest.raises(QueueFull, match="1 requests wait"):
        await made.admit(tokens=1)
    with pytest.raises(QueueFull, match="was free within"):
        await task
    assert (1, 0) == (held.running, made.num_queued)


def test_a_breaker_opens_after_failures_in_a_row_and_lets_one_try_after_a_while():
    now = 0.0
    breaker = Breaker(max_failures=2, open_s=5.0, clock=lambda: now)
    breaker.failed()
    breaker.succeeded()
    breaker.failed()
    assert ("closed", True) == (breaker.state, breaker.allows())
    breaker.failed()
    assert ("open", False) == (breaker.state, breaker.allows())

    now = 5.0
    assert ("half-open", True) == (breaker.state, breaker.allows())
    breaker.begin()
    assert not breaker.allows()
    breaker.failed()
    assert "open" == breaker.state

    now = 10.0
    breaker.begin()
    breaker.ended()
    assert breaker.allows()
    breaker.succeeded()
    assert "closed" == breaker.state


async def test_who_waits_for_a_certain_instance_gets_that_one_and_holds_up_nobody():
    made = pool(A, B)
    first, second = await made.admit(tokens=1), await made.admit(tokens=1)
    bound = asyncio.create_task(made.admit_to(first, tokens=1))
    await asyncio.sleep(0)
    (other,) = await waiting(made, 1)
    assert 2 == made.num_queued

    made.leave(second, tokens=1)
    assert second is await other
    assert not bound.done()
    made.drain(first.url)
    made.leave(first, tokens=1)
    await bound
    assert (1, 0) == (first.running, made.num_queued)


async def test_who_leaves_while_he_waits_for_a_certain_instance_takes_no_place():
    made = pool(A, max_queued=1)
    only = await made.admit(tokens=1)
    bound = asyncio.create_task(made.admit_to(only, tokens=1))
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await made.admit_to(only, tokens=1)
    bound.cancel()
    await asyncio.gather(bound, return_exceptions=True)
    made.leave(only, tokens=1)
    assert (0, 0) == (only.running, made.num_queued)
