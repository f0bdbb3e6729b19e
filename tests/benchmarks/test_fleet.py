"""The model of a fleet: its servers, what its storage charges, and a small run of it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from benchmarks.fleet_run import Fleet, FleetSizes, Outcome
from benchmarks.fleet_world import Charge, Filesystem, FleetPool, FleetTier, Server, World
from benchmarks.request_trace import TracedRequest
from tests.parts.node import NAMESPACE, key
from tests.source import ROOT
from ucm.store.blocks.keys import Key


def filesystem(*, per_s: float = 10.0, latency_s: float = 1.0) -> Filesystem:
    world = World()
    metadata, data = (
        Server(world, name, per_s=per_s, latency_s=latency_s) for name in ("metadata", "data")
    )
    return Filesystem(world, metadata, data)


def play(world: World) -> None:
    while world.step():
        pass


def test_a_server_takes_one_thing_after_the_other_and_latency_is_nobody_s_turn() -> None:
    fs = filesystem()
    ends_s: list[float] = []
    for _ in range(3):
        fs.metadata.serve(5, lambda: ends_s.append(fs.world.now_s))
    play(fs.world)

    assert ends_s == [1.5, 2.0, 2.5]
    assert fs.metadata.utilisation(3.0) == 0.5


def test_charges_are_paid_one_after_the_other_and_counted_by_kind() -> None:
    fs = filesystem()
    charges = [Charge("open", 1), Charge("read", nbytes=10), Charge("open", 1)]
    done_s: list[float] = []
    fs.pay(charges, lambda: done_s.append(fs.world.now_s))
    play(fs.world)

    assert done_s == [pytest.approx(0.1 + 1 + 1 + 1 + 0.1 + 1)]
    assert (fs.counts["open"], fs.bytes_moved) == (2, 10)


def test_threads_of_a_node_begin_what_is_urgent_first_and_no_more_than_they_are() -> None:
    fs = filesystem()
    tier = FleetTier(fs)
    pool = FleetPool(fs, tier, num_threads=1)
    ended: list[str] = []
    for name, urgent in (("page", False), ("other page", False), ("question", True)):
        pool.submit(
            lambda: tier.charges.append(Charge("open", 1)),
            lambda _, name=name: ended.append(name),  # type: ignore[misc]
            urgent=urgent,
        )
    assert pool.depth == 3
    play(fs.world)

    assert ended == ["question", "page", "other page"] and pool.depth == 0
    assert fs.world.now_s == pytest.approx(3.3)


def operations(tier: FleetTier) -> int:
    return sum(charge.operations for charge in tier.take_charges())


def test_questions_by_order_are_fewer_than_exact_ones_and_have_the_same_answer() -> None:
    fs = filesystem()
    keys = [key(i) for i in range(64)]
    fs.pages = dict.fromkeys(keys[:50], (True, 0))
    by_order, exact = FleetTier(fs), FleetTier(fs, exact=True)

    assert by_order.leads_to(NAMESPACE, keys) == exact.leads_to(NAMESPACE, keys) == 50
    assert operations(by_order) < 12 < 50 < operations(exact)
    assert by_order.leads_to(NAMESPACE, keys[60:]) == 0
    # A look, a listing, and the name asked as one that is to be made.
    assert operations(by_order) == 3


def prompt(user: int, turns: int) -> tuple[Key, ...]:
    return tuple(Key(sha256(f"{user} {i}".encode()).digest()) for i in range(4 * turns))


def run(**changes: float | str) -> Outcome:
    requests = [
        TracedRequest(at_ns=0, keys=prompt(user, turn), has_tail=False)
        for turn in range(1, 6)
        for user in range(8)
    ]
    sizes: dict[str, float] = {
        "num_nodes": 4,
        "num_simulated": 4,
        "num_requests": 40,
        "rate_per_s": 0.1,
        "keeps": 2.0,
        "metadata_per_s": 10_000,
        "data_bytes_per_s": 1e11,
    }

    async def ran() -> Outcome:
        return Fleet(requests, FleetSizes(**{**sizes, **changes})).run()  # type: ignore[arg-type]

    return asyncio.run(ran())


def test_turns_of_conversations_find_what_the_turns_before_have_stored() -> None:
    outcome = run()

    # Of a turn's blocks all but the new four, from the second turn on.
    assert 0.6 < outcome.hit_share < 0.8
    assert outcome.num_unanswered <= 1
    assert outcome.by_kind["publish"] > 4 * 4 - 1
    assert outcome.by_kind["reclaim"] == 0
    assert 0 < outcome.ttft_s(0.5) <= outcome.ttft_s(0.99)


def test_a_fleet_of_copies_loads_the_servers_as_many_times() -> None:
    one, ten = run(), run(num_nodes=40)

    assert ten.requests_per_s == pytest.approx(10 * one.requests_per_s)
    assert ten.used["metadata server"] == pytest.approx(10 * one.used["metadata server"], rel=0.3)
    assert ten.used["engines"] == pytest.approx(one.used["engines"], rel=0.01)


def test_a_server_that_is_too_slow_is_the_bottleneck_and_is_felt() -> None:
    slow = run(metadata_per_s=20)

    assert slow.bottleneck == "metadata server"
    assert slow.ttft_s(0.5) > 2 * run().ttft_s(0.5)


def test_polls_of_a_hand_off_hardly_grow_where_storage_is_slower() -> None:
    fast, slow = run(), run(data_bytes_per_s=1e10)

    assert slow.ttft_s(0.5) > 1.1 * fast.ttft_s(0.5)
    assert slow.by_kind["poll"] < 2 * fast.by_kind["poll"]


def test_with_affinity_a_turn_comes_to_where_the_turns_before_lie_in_memory() -> None:
    # So few that load sends none elsewhere.
    anywhere = run(num_simulated=8, num_nodes=8, rate_per_s=0.05)
    at_home = run(num_simulated=8, num_nodes=8, rate_per_s=0.05, affinity="prefix")

    # What is opened is what is new, by decode.
    assert at_home.by_kind["probe hit"] == 0 < anywhere.by_kind["probe hit"]
    assert at_home.by_kind["open"] < 4.5 < 5 < anywhere.by_kind["open"]
    assert at_home.hit_share == pytest.approx(anywhere.hit_share, abs=0.05)


def test_a_store_that_keeps_less_than_is_written_is_reclaimed() -> None:
    assert run(keeps=0.2).by_kind["reclaim"] > 0


def test_a_trace_that_is_not_there_is_said_with_where_it_is_published(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/fleet.py", "--trace", str(tmp_path / "none.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "none.jsonl" in done.stderr and "kvcache-ai/Mooncake" in done.stderr
