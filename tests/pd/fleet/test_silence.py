"""Who waits for an instance that says nothing: what is known, and when another one is asked."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import pytest
from yarl import URL

from ucm.pd.fleet.breaker import Breaker
from ucm.pd.fleet.instance import Instance, Role
from ucm.pd.fleet.silence import InstanceLost, InstanceSilent, Patience, Scout, unless_lost

SILENT_AFTER_S = 0.05


def instance(name: str) -> Instance:
    breakers = [Breaker(max_failures=3, open_s=5.0) for _ in range(2)]
    return Instance(URL(f"http://{name}:1"), Role.DECODE, *breakers)


def scout(patience: Patience | None = None, *, may_move: bool = True) -> Scout:
    return Scout(patience or Patience(SILENT_AFTER_S), "whole", lambda: may_move)


async def never() -> None:
    await asyncio.Event().wait()


async def waits(of: Instance, by: Scout | None, *, for_s: float = 2.0) -> BaseException | None:
    """What ends the wait, if anything does within that time."""
    try:
        await asyncio.wait_for(unless_lost(of, never(), by), for_s)
    except (InstanceSilent, InstanceLost) as error:
        return error
    except asyncio.TimeoutError:
        return None
    raise AssertionError("nothing was to come")


async def test_one_request_is_asked_elsewhere_and_the_others_wait_for_what_becomes_of_it():
    silent = instance("silent")
    scouts = [scout() for _ in range(3)]
    ends = await asyncio.gather(*(waits(silent, each) for each in scouts))
    assert 1 == sum(isinstance(end, InstanceSilent) for end in ends)
    assert 2 == ends.count(None)


async def test_where_it_is_answered_sooner_than_it_had_waited_all_leave_the_silent_one():
    silent, other = instance("silent"), instance("other")
    first, second = scout(), scout()
    others = asyncio.create_task(waits(silent, second))
    assert isinstance(await waits(silent, first), InstanceSilent)
    first.answered(other, took_s=SILENT_AFTER_S / 2)
    end = await others
    assert isinstance(end, (InstanceLost, InstanceSilent))
    assert "open" == silent.state
    assert "closed" == other.state


async def test_where_it_takes_as_long_elsewhere_the_silent_one_keeps_its_requests():
    silent, other = instance("silent"), instance("other")
    patience = Patience(SILENT_AFTER_S)
    first = scout(patience)
    assert isinstance(await waits(silent, first), InstanceSilent)
    first.answered(other, took_s=60.0)
    first.close()
    assert "closed" == silent.state
    assert patience.limit_s("whole") >= 60.0
    assert await waits(silent, scout(patience), for_s=10 * SILENT_AFTER_S) is None


@pytest.mark.parametrize("came", ["worked", "answered_late"])
async def test_an_instance_that_has_something_for_anybody_is_not_silent(came: str):
    busy, other = instance("busy"), instance("other")
    first = scout()
    waiting = asyncio.create_task(waits(busy, first, for_s=1.5))
    if came == "worked":
        await asyncio.sleep(SILENT_AFTER_S / 5)
        busy.worked()
        assert await waiting is None
        return
    assert isinstance(await waiting, InstanceSilent)
    busy.worked()
    first.answered(other, took_s=0.0)
    assert "closed" == busy.state


async def test_what_a_server_says_whose_engine_stands_still_counts_for_nothing():
    silent = instance("silent")
    waiting = asyncio.create_task(waits(silent, scout()))
    while not waiting.done():
        silent.heard()  # its models, say
        await asyncio.sleep(SILENT_AFTER_S / 10)
    assert isinstance(waiting.result(), InstanceSilent)


@pytest.mark.parametrize("by", [None, functools.partial(scout, may_move=False)])
async def test_nobody_leaves_who_can_go_nowhere(by: Any):
    silent = instance("silent")
    assert await waits(silent, by and by(), for_s=10 * SILENT_AFTER_S) is None


def test_a_long_wait_is_forgotten_by_and_by():
    patience = Patience(1.0)
    patience.took("whole", 100.0)
    assert 1.0 == patience.limit_s("streamed")
    for _ in range(1000):
        patience.took("whole", 0.1)
    assert 1.0 == patience.limit_s("whole")
