"""A node cache that dies or stops at any moment costs hits until the next one is there."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import closing

import pytest

from tests.store.node.support import (
    FINGERPRINT,
    PAGE_BYTES,
    SOON_S,
    Place,
    client_of,
    engine,
    kill,
    make_keys,
    wait_until,
)
from ucm.config.settings import StoreSettings
from ucm.store.client.link import NodeLink
from ucm.store.client.rank_link import MemoryTaker, RankLink
from ucm.store.node import protocol as p

pytestmark = pytest.mark.process
KEYS = make_keys("a", 6)


class Taker(MemoryTaker):
    """A rank's memory: which generations arrived."""

    def __init__(self) -> None:
        self.generations: list[int] = []
        self.in_use: list[tuple[int, int]] = []
        self.copying: set[int] = set()

    def memory_arrived(self, generation: int, memory_fd: int, welcome: p.Welcome) -> None:
        assert os.fstat(memory_fd).st_size == welcome.capacity_bytes
        self.generations.append(generation)

    def memory_in_use(self, generation: int, offset: int, nbytes: int) -> None:
        self.in_use.append((offset, nbytes))

    def is_used(self, generation: int) -> bool:
        return generation in self.copying


class Rank:
    def __init__(self, settings: StoreSettings, engine_id: str) -> None:
        self.taker = Taker()
        self.link = RankLink(settings, engine_id=engine_id, on_memory=self.taker)
        self.link.start()

    def close(self) -> None:
        self.link.close()
        self.link.join(SOON_S)
        assert not self.link.is_alive()


def connected(link: NodeLink, generation: int = 0, *, num_ranks: int) -> bool:
    """A link notices a loss only after all that came before it: `generation` may be the old one."""
    link.poll(0.02)
    return (link.generation, link.ranks_ready) == (generation, num_ranks) and bool(link.client)


def wait_connected(link: NodeLink, generation: int = 0, *, num_ranks: int) -> None:
    what = f"generation {generation} with {num_ranks} ranks"
    wait_until(lambda: connected(link, generation, num_ranks=num_ranks), what)


def answer(link: NodeLink, question: p.ClientMessage, kind: type[p.LookupReply]) -> p.LookupReply:
    assert link.send(question)
    replies: list[p.LookupReply] = []

    def arrived() -> bool:
        replies.extend(m for m in link.poll(0.02) if isinstance(m, kind))
        return bool(replies)

    wait_until(arrived, "an answer")
    return replies[0]


def look_up(link: NodeLink) -> p.LookupReply:
    namespace = p.OpenNamespace(
        ns=1, fingerprint=FINGERPRINT, page_bytes=PAGE_BYTES, block_tokens=128, manifest=b"{}"
    )
    link.send(namespace)
    question = p.Lookup(id=1, ns=1, keys=list(KEYS), read_from=0, load=True, timeout_ms=5000)
    return answer(link, question, p.LookupReply)


def test_links_find_the_next_node_cache_by_themselves_and_hit_its_files(place: Place) -> None:
    settings = place.settings()
    with (
        closing(NodeLink(settings, engine_id="engine")) as link,
        closing(Rank(settings, "engine")) as rank,
        closing(Rank(settings, "engine")) as other_rank,
    ):
        for generation in range(3):
            wait_connected(link, generation, num_ranks=2)
            if generation == 0:
                with engine(settings, "writer/0") as writer:
                    writer.dump(KEYS)
                    writer.wait_written()
            reply = look_up(link)
            assert len(reply.offsets) == len(KEYS)
            assert reply.from_files == (len(KEYS) if generation else 0)
            assert link.client is not None
            kill(link.client.welcome.pid)

        wait_connected(link, 3, num_ranks=2)
        assert rank.taker.generations == other_rank.taker.generations == [0, 1, 2, 3]


def test_a_link_that_is_closed_starts_no_node_cache_any_more(place: Place) -> None:
    threads = threading.active_count()
    for _ in range(5):
        link = NodeLink(place.settings(), engine_id="engine")
        kill(client_of(link).welcome.pid)

        link.close()

        assert threading.active_count() == threads, "nobody is left who could start one"


def test_a_rank_that_saw_one_loss_more_comes_back_to_the_scheduler_side(place: Place) -> None:
    settings = place.settings()
    with (
        closing(NodeLink(settings, engine_id="engine")) as link,
        closing(Rank(settings, "engine")) as rank,
    ):
        wait_connected(link, num_ranks=1)
        rank.link.follow(1)
        wait_connected(link, num_ranks=0)

        def followed() -> bool:
            rank.link.follow(link.generation)
            return connected(link, num_ranks=1)

        wait_until(followed, "the rank is back")
        assert rank.taker.generations == [0, 1, 0]


def test_pages_stay_pinned_while_a_rank_copies_them_after_its_engine_lost_the_connection(
    place: Place,
) -> None:
    settings = place.settings()
    with engine(settings, "writer/0") as observer, closing(Rank(settings, "engine")) as rank:
        observer.dump(KEYS)
        link = NodeLink(settings, engine_id="engine")
        wait_connected(link, num_ranks=1)
        assert len(look_up(link).offsets) == len(KEYS)
        rank.taker.copying = {0}

        link.close()
        rank.link.follow(1)
        wait_until(lambda: rank.taker.generations == [0, 1], "the rank has gone on")
        assert observer.status().slots["pins"] == len(KEYS)

        rank.taker.copying = set()
        wait_until(lambda: not observer.status().slots["pins"], "the copies have ended")
        assert "engine/0" not in observer.status().sessions


def test_a_rank_is_told_of_all_the_memory_while_nobody_waits_for_the_node_cache(
    place: Place,
) -> None:
    settings = place.settings()
    with engine(settings, "engine/0") as client, closing(Rank(settings, "engine")) as rank:
        capacity_bytes = client.client.welcome.capacity_bytes
        wait_until(lambda: rank.taker.in_use == [(0, capacity_bytes)], "it was told")
        with closing(Rank(settings, "engine")) as late:
            wait_until(lambda: late.taker.in_use == [(0, capacity_bytes)], "it was told as well")


@pytest.mark.parametrize("num_writes", [0, 1, 20])
def test_a_node_cache_killed_while_it_writes_leaves_right_pages_in_prompt_order(
    place: Place, num_writes: int
) -> None:
    settings, keys = place.settings(), make_keys("long", 300)
    with engine(settings) as client:
        client.dump(keys)
        wait_until(lambda: len(place.blocks()) >= num_writes, "some are written")
        kill(client.pid)
    written = place.blocks()

    with engine(settings) as client:
        assert client.load(keys) == (len(written), len(written))
        client.dump(keys)
        client.wait_written()
        assert client.load(keys)[0] == len(keys)
    assert written == {place.block(key) for key in keys[: len(written)]}


def in_time(call: Callable[[], object]) -> None:
    """The call returns, whatever the other process does."""
    thread = threading.Thread(target=call)
    thread.start()
    thread.join(SOON_S)
    assert not thread.is_alive()


def test_a_node_cache_that_has_stopped_holds_up_nobody(place: Place) -> None:
    settings = place.settings()
    with closing(NodeLink(settings, engine_id="engine")) as link, engine(settings, "x/0") as other:
        client_of(link)
        os.kill(other.pid, signal.SIGSTOP)
        question = p.Lookup(id=1, ns=1, keys=KEYS * 1000, read_from=0, load=True, timeout_ms=100)

        for _ in range(20):
            in_time(lambda: link.send(question))
        in_time(lambda: link.poll(0.1))
        in_time(lambda: other.client.poll(0.1))

        os.kill(other.pid, signal.SIGCONT)
        assert other.status().invariant == ""
        assert other.load(KEYS) == (0, 0)
