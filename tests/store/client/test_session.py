"""A client's session over a real link, to a peer that answers what the test says."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import closing

import pytest

from tests.store.client.test_link import peer, welcome
from tests.store.node.support import FINGERPRINT, Place, make_keys, wait_until
from ucm.outcome import Outcome
from ucm.store.client.link import NodeLink
from ucm.store.client.session import NodeSession
from ucm.store.node import protocol as p

KEYS = make_keys("session", 3)
OPENING = p.OpenNamespace(
    ns=1, fingerprint=FINGERPRINT, page_bytes=64, block_tokens=1, manifest=b"{}"
)


def serving(
    place: Place, answer: Callable[[p.ClientMessage], list[p.NodeMessage] | None]
) -> Callable[[socket.socket], None]:
    """Hangs up where there is no answer."""

    def serve(sock: socket.socket) -> None:
        welcome(sock, place)
        frames = p.FrameBuffer()
        while data := sock.recv(1 << 16):
            for body in frames.feed(data):
                messages = answer(p.decode_client(body))
                if messages is None:
                    return
                for message in messages:
                    sock.sendall(p.encode(message))

    return serve


def session_of(place: Place) -> NodeSession:
    """Where nobody serves it starts a node cache."""
    return NodeSession(NodeLink(place.settings(), engine_id="e"), OPENING)


def find(session: NodeSession, keys: list[bytes]) -> p.Find:
    return p.Find(id=session.next_id(), ns=1, keys=keys, storage=False, timeout_ms=1000)


def found(question: p.Find) -> p.Found:
    return p.Found(id=question.id, places=bytes(len(question.keys)), reason=Outcome.FINE)


def test_each_answer_goes_to_who_has_asked(place: Place) -> None:
    asked: list[p.Find] = []

    def answer(message: p.ClientMessage) -> list[p.NodeMessage]:
        if isinstance(message, p.Find):
            asked.append(message)
        # Both at once, the second first.
        return [found(each) for each in reversed(asked)] if len(asked) == 2 else []

    heard: dict[str, p.Found] = {}
    with peer(place, serving(place, answer)), closing(session_of(place)) as session:
        wait_until(lambda: session.poll(0.01) or session.is_met, "it is met")
        session.ask(find(session, KEYS[:1]), lambda reply: heard.update(one=reply))
        session.ask(find(session, KEYS[1:]), lambda reply: heard.update(two=reply))
        wait_until(lambda: session.poll(0.01) or len(heard) == 2, "both are answered")

    assert (len(heard["one"].places), len(heard["two"].places)) == (1, 2)


def test_nobody_hears_the_answer_to_a_lookup_that_was_withdrawn(place: Place) -> None:
    withdrawn = threading.Event()

    def answer(message: p.ClientMessage) -> list[p.NodeMessage]:
        if isinstance(message, p.Release):
            (number,) = message.lookups
            withdrawn.set()
            late = p.LookupReply(
                id=number,
                offsets=[0],
                num_stored=1,
                from_files=0,
                head_stored=0,
                reason=Outcome.FINE,
            )
            return [late]
        return [found(message)] if isinstance(message, p.Find) else []

    heard: list[object] = []
    with peer(place, serving(place, answer)), closing(session_of(place)) as session:
        wait_until(lambda: session.poll(0.01) or session.is_met, "it is met")
        number = session.next_id()
        lookup = p.Lookup(id=number, ns=1, keys=KEYS, read_from=0, load=True, timeout_ms=1000)
        session.ask(lookup, heard.append)
        session.release(number)
        session.ask(question := find(session, KEYS), heard.append)
        wait_until(lambda: session.poll(0.01) or heard, "what came after it is answered")

    assert withdrawn.is_set()
    assert heard == [found(question)]


def test_what_a_lost_node_cache_was_asked_has_no_answer_and_the_next_is_opened_anew(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    opened: list[p.OpenNamespace] = []

    def answer(message: p.ClientMessage) -> list[p.NodeMessage] | None:
        if isinstance(message, p.OpenNamespace):
            opened.append(message)
            return [p.NamespaceOpened(ns=message.ns, error="", refused=False)]
        if isinstance(message, p.Find) and len(opened) == 1:
            return None
        assert isinstance(message, p.Find)
        # As if the first one had numbered it.
        return [found(message), p.Found(id=1, places=bytes(3), reason=Outcome.FINE)]

    happened: list[str] = []
    with peer(place, serving(place, answer)), closing(session_of(place)) as session:
        session.on_met = lambda: happened.append("met")
        session.on_lost = lambda: happened.append("lost")
        session.on_opened = lambda opened: happened.append("opened")
        wait_until(lambda: session.poll(0.01) or session.is_met, "it is met")
        session.ask(find(session, KEYS), lambda reply: happened.append("answered"))
        wait_until(lambda: session.poll(0.01) or happened.count("opened") == 2, "the next is met")
        session.ask(find(session, KEYS), lambda reply: happened.append("answered by the next"))
        wait_until(lambda: session.poll(0.01) or "by the next" in happened[-1], "it answers")
        session.poll(0.05)

    assert opened == [OPENING, OPENING]
    assert [each for each in happened if each != "opened"] == [
        *("met", "lost", "met"),
        "answered by the next",
    ]
