"""A node cache that answers wrongly costs its clients hits, and ends none of them."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import closing

import pytest

from tests.store.api.whole_store import whole_blocks
from tests.store.client.test_link import WELCOME, peer, welcome
from tests.store.node.support import FINGERPRINT, Place, client_of, make_keys, wait_until
from ucm.errors import ProtocolError, TaskFailed
from ucm.store.client.answers import Answers
from ucm.store.client.link import NodeLink
from ucm.store.client.rank_link import MemoryTaker, RankLink
from ucm.store.node import protocol as p

KEYS = make_keys("asked", 3)
PAGE = 1024
CAPACITY = WELCOME.capacity_bytes
OPENING = p.OpenNamespace(
    ns=1, fingerprint=FINGERPRINT, page_bytes=PAGE, block_tokens=16, manifest=b"{}"
)
LOOKUP = p.Lookup(id=1, ns=1, keys=list(KEYS), read_from=1, load=True, timeout_ms=1000)
COUNT = p.Lookup(id=2, ns=1, keys=list(KEYS), read_from=1, load=False, timeout_ms=1000)
RESERVE = p.Reserve(id=3, ns=1, keys=list(KEYS), parents=[b""] * 3)
FIND = p.Find(id=4, ns=1, keys=list(KEYS), storage=False, timeout_ms=1000)


def found(*offsets: int, of: p.Lookup = LOOKUP, **more: int) -> p.LookupReply:
    fields = {"num_stored": len(offsets), "from_files": 0, "head_stored": 0, **more}
    return p.LookupReply(id=of.id, offsets=list(offsets), reason="", **fields)


def given(*offsets: int) -> p.ReserveReply:
    return p.ReserveReply(id=RESERVE.id, offsets=list(offsets))


RIGHT: list[p.NodeMessage] = [
    *(
        found(),
        found(0, PAGE),
        found(0, refused=1),
        found(0, brought=1),
        found(CAPACITY - PAGE, head_stored=1, from_files=1),
    ),
    *(found(of=COUNT, num_stored=2), given(0, p.HAVE, p.NO_ROOM), given(0, PAGE, CAPACITY - PAGE)),
    p.Found(id=FIND.id, places=b"\0\1\7", reason=""),
    p.MemoryInUse(offset=0, nbytes=CAPACITY),
]
WRONG: list[p.NodeMessage] = [
    *(found(0, 0, 0), found(0, num_stored=2), found(num_stored=2), found(0, head_stored=2)),
    *(found(CAPACITY - PAGE + 1), found(-1), found(0, from_files=3)),
    *(found(0, refused=2), found(refused=-1), found(0, brought=2), found(0, brought=-1)),
    *(found(0, of=COUNT), found(of=COUNT, num_stored=3), found(of=COUNT, num_stored=-1)),
    *(given(0), given(0, 0, 0, 0), given(), given(0, 0, CAPACITY), given(-3, 0, 0)),
    p.Found(id=FIND.id, places=b"\0\1", reason=""),
    p.Found(id=FIND.id, places=b"\0\1\1\1", reason=""),
    # Of another kind than the question with this id.
    p.ManifestFound(id=LOOKUP.id, manifest=b"", error=""),
    p.Found(id=RESERVE.id, places=b"\0\0\0", reason=""),
    p.ReserveReply(id=FIND.id, offsets=[0, 0, 0]),
    p.MemoryInUse(offset=1, nbytes=CAPACITY),
    p.MemoryInUse(offset=-1, nbytes=1),
    p.MemoryInUse(offset=1, nbytes=-1),
]


def asked() -> Answers:
    answers = Answers(CAPACITY)
    for message in (OPENING, LOOKUP, COUNT, RESERVE, FIND):
        answers.asked(message)
    return answers


@pytest.mark.parametrize("answer", RIGHT, ids=repr)
def test_an_answer_that_fits_its_question_is_passed_on(answer: p.NodeMessage) -> None:
    asked().check(answer)


@pytest.mark.parametrize("answer", WRONG, ids=repr)
def test_an_answer_that_does_not_fit_its_question_is_none(answer: p.NodeMessage) -> None:
    with pytest.raises(ProtocolError, match=f"its {type(answer).__name__} doesn't fit"):
        asked().check(answer)


def test_what_was_not_asked_or_taken_back_is_not_looked_at() -> None:
    answers = asked()
    answers.asked(p.Release(lookups=[LOOKUP.id]))
    for answer in (found(0, 0, 0), p.ReserveReply(id=99, offsets=[1])):
        answers.check(answer)


def answering(
    place: Place,
    answer: Callable[[p.ClientMessage], p.NodeMessage | None],
) -> Callable[[socket.socket], None]:
    def serve(sock: socket.socket) -> None:
        welcome(sock, place)
        frames = p.FrameBuffer()
        while data := sock.recv(1 << 16):
            for body in frames.feed(data):
                message = answer(p.decode_client(body))
                if message is not None:
                    sock.sendall(p.encode(message))

    return serve


def test_a_link_drops_a_node_cache_that_answers_wrongly_and_meets_it_again_later(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    answers = [given(0), given(0, PAGE, p.HAVE)]

    def answer(message: p.ClientMessage) -> p.NodeMessage | None:
        return answers.pop(0) if isinstance(message, p.Reserve) else None

    settings = place.settings()
    with peer(place, answering(place, answer)), closing(NodeLink(settings, engine_id="e")) as link:
        heard: list[p.NodeMessage] = []

        def asks(generation: int) -> None:
            client_of(link)
            for message in (OPENING, RESERVE):
                assert link.send(message)
            wait_until(
                lambda: heard.extend(link.poll(0.05)) or heard or link.generation > generation,
                "an answer, or its end",
            )

        asks(0)
        assert (heard, link.generation) == ([], 1)
        assert "its ReserveReply doesn't fit what it was asked; serving without" in caplog.text
        asks(1)
        assert (heard, link.generation) == ([given(0, PAGE, p.HAVE)], 1)


class Taker(MemoryTaker):
    """A rank, as far as it is told something."""

    def __init__(self) -> None:
        self.generations: list[int] = []
        self.in_use: list[tuple[int, int]] = []

    def memory_arrived(self, generation: int, memory_fd: int, welcome: p.Welcome) -> None:
        self.generations.append(generation)

    def memory_in_use(self, generation: int, offset: int, nbytes: int) -> None:
        self.in_use.append((offset, nbytes))

    def is_used(self, generation: int) -> bool:
        return False


def test_a_rank_pins_nothing_outside_of_the_memory(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    taker = Taker()

    def answer(message: p.ClientMessage) -> p.NodeMessage | None:
        if not isinstance(message, p.MemoryReady):
            return None
        return p.MemoryInUse(offset=0, nbytes=CAPACITY + (len(taker.generations) == 1))

    settings = place.settings()
    with peer(place, answering(place, answer)):
        link = RankLink(settings, engine_id="e", on_memory=taker)
        link.start()
        wait_until(lambda: taker.in_use, "the second answer is right")
        link.close()
        link.join()
    assert taker.in_use == [(0, CAPACITY)]
    assert "its MemoryInUse doesn't fit" in caplog.text


def test_a_store_outlives_a_node_cache_that_answers_wrongly(place: Place) -> None:
    """What is under way fails in time, and says why; the store itself goes on."""

    def answer(message: p.ClientMessage) -> p.NodeMessage | None:
        if isinstance(message, p.OpenNamespace):
            return p.NamespaceOpened(ns=message.ns, error="", refused=False)
        if isinstance(message, p.Find):
            return p.Found(id=message.id, places=b"", reason="")
        return None

    with (
        peer(place, answering(place, answer)),
        whole_blocks(place, timeout_ms=1000) as store,
    ):
        for _ in range(2):
            with pytest.raises(TaskFailed, match="timed out after 1 s"):
                store.lookup([b"block"])
