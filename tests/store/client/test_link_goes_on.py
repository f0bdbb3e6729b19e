"""A link to the node cache meets errors that nobody has thought of, and goes on."""

from __future__ import annotations

import socket
from contextlib import closing

import pytest

from tests.store.client.test_link import num_open_files, peer, wait_for_end, welcome
from tests.store.node.support import SOON_S, Place, client_of, wait_until
from ucm.store.client import link as link_module
from ucm.store.client.connection import NodeClient
from ucm.store.client.link import NodeLink
from ucm.store.client.rank_link import MemoryTaker, RankLink
from ucm.store.node import protocol as p


def test_whatever_connecting_raises_the_link_tries_again(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A thread that ended would leave its engine without the store for ever, unseen."""
    connect_or_start = link_module.connect_or_start
    tries: list[int] = []

    def connect_at_the_third(*args, **more) -> NodeClient:
        tries.append(1)
        if len(tries) < 3:
            raise KeyError("an error that nobody has thought of")
        return connect_or_start(*args, **more)

    monkeypatch.setattr(link_module, "connect_or_start", connect_at_the_third)

    def serve(sock: socket.socket) -> None:
        welcome(sock, place)
        wait_for_end(sock)

    with peer(place, serve), closing(NodeLink(place.settings(), engine_id="engine")) as link:
        client_of(link)
    assert "unexpected KeyError" in caplog.text


class ClumsyTaker(MemoryTaker):
    """Fails at the first memory that it gets."""

    def __init__(self) -> None:
        self.generations: list[int] = []

    def memory_arrived(self, generation: int, memory_fd: int, welcome: p.Welcome) -> None:
        self.generations.append(generation)
        if len(self.generations) == 1:
            raise ValueError("an error that nobody has thought of")

    def memory_in_use(self, generation: int, offset: int, nbytes: int) -> None:
        pass

    def is_used(self, generation: int) -> bool:
        return False


def test_a_rank_whose_memory_can_t_be_mapped_tries_again_and_leaves_no_descriptor(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    def serve(sock: socket.socket) -> None:
        welcome(sock, place)
        wait_for_end(sock)

    taker = ClumsyTaker()
    with peer(place, serve):
        before = num_open_files()
        link = RankLink(place.settings(), engine_id="engine", on_memory=taker)
        link.start()
        wait_until(lambda: len(taker.generations) > 1, "it has tried again")
        link.close()
        link.join(SOON_S)
        assert not link.is_alive()
        wait_until(lambda: num_open_files() == before, "all is closed")
    assert "unexpected ValueError" in caplog.text
