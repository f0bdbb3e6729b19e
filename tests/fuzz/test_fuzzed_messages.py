"""Messages of the node cache's socket with any damage, both ways: the connection ends, or goes on.

What can be read is also acted on: by a node cache's decisions, and by a client that has questions
open.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from copy import deepcopy
from itertools import count
from typing import Any, cast

import msgspec

from tests.fuzz.inputs import bad_inputs, bounded, bounds, cut, few_and_many
from tests.parts.node import FINGERPRINT, NAMESPACE_MESSAGE, PAGE, Node, key
from tests.parts.pools import _result
from ucm.config.settings import StoreSettings
from ucm.errors import ProtocolError
from ucm.outcome import Outcome
from ucm.store.client.answers import Answers
from ucm.store.client.connection import NodeClient, _receive_welcome
from ucm.store.client.greeting import check_pages, ignored_settings
from ucm.store.client.link import NodeLink
from ucm.store.client.session import NodeSession
from ucm.store.node import protocol as p
from ucm.store.node.frames import LENGTH

KEYS = [key(i) for i in range(4)]
NO_PARENTS = [b""] * len(KEYS)
CAPACITY_BYTES = 64 * PAGE
SETTINGS = StoreSettings(storage_backends=("/mnt/kv",), socket_path="/run/ucm/a.sock")
LOOKUP = p.Lookup(id=1, ns=1, keys=list(KEYS), read_from=1, load=True, timeout_ms=1000, promised=2)
RESERVE = p.Reserve(id=2, ns=1, keys=list(KEYS), parents=NO_PARENTS)
FIND = p.Find(id=3, ns=1, keys=list(KEYS), storage=True, timeout_ms=10)
ASK_MANIFEST = p.GetManifest(id=4, fingerprint=FINGERPRINT)
CLIENT_MESSAGES: list[p.ClientMessage] = [
    *(LOOKUP, RESERVE, FIND, ASK_MANIFEST, NAMESPACE_MESSAGE, p.MemoryReady(), p.Shutdown()),
    p.Hello(version=p.VERSION, session="s/0", role="scheduler", pid=1),
    p.Commit(ns=1, keys=list(KEYS), parents=[b"", *KEYS[:-1]]),
    p.Abort(ns=1, keys=list(KEYS)),
    p.Release(lookups=[1, 2]),
    p.GetStatus(id=5),
    p.Lookup(id=6, ns=1, keys=list(KEYS), read_from=0, load=False, timeout_ms=1, tail_tokens=3),
    p.Reserve(id=7, ns=1, keys=list(KEYS), parents=NO_PARENTS, tail_tokens=2),
]
WELCOME = p.Welcome(
    version=p.VERSION,
    arena="a",
    capacity_bytes=CAPACITY_BYTES,
    pid=1,
    settings=msgspec.to_builtins(SETTINGS),
)
NODE_MESSAGES: list[p.NodeMessage] = [
    WELCOME,
    p.NamespaceOpened(ns=1, error="", refused=False),
    p.ManifestFound(id=4, manifest=b"{}", error=""),
    p.LookupReply(
        id=1, offsets=[0, PAGE], num_stored=2, from_files=1, head_stored=1, reason=Outcome.LATE
    ),
    p.Found(id=3, places=bytes(4), reason=Outcome.FINE),
    p.ReserveReply(id=2, offsets=[0, PAGE, p.HAVE, p.NO_ROOM]),
    p.SavingNews(refused=list(KEYS[:2]), saved=list(KEYS[2:]), reason=Outcome.FULL),
    p.Notice(text="the store is full"),
    p.MemoryInUse(offset=0, nbytes=PAGE),
    p.RanksReady(count=2),
    p.Status(
        id=0, pid=1, arena="a", slots={}, sessions={"s": {"pins": 1}}, queues={}, counters={},
        invariant="",
    ),
]  # fmt: skip
# Heads of arrays, maps, texts and numbers that claim much; an extension; a map as a key.
WORDS = [
    *(b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff"),
    *(
        b"\xcf" + b"\xff" * 8,
        b"\xd3\x80" + b"\0" * 7,
        b"\xcb\x7f\xf8" + b"\0" * 6,
        b"\x00",
        b"\xff",
    ),
    *(
        b"\xd6\xff\0\0\0\1",
        b"\xc7\x0c\xff" + b"\xff" * 12,
        b"\x81\x80\xc0",
        b"\xc0",
        b"\x91" * 3000,
    ),
    *(b"\xa6Lookup", b"\xa6Commit", b"\xacReserveReply", b"\xa5Found", b"\xa0", b"\x90", b"\x80"),
    *(b"\xabLookupReply", b"\xadManifestFound", b"\xc4\x20" + KEYS[0], b"\xc4\x20" + KEYS[3]),
]


# In place of any value of a message: what is of another kind, or of another size.
ODD: list[Any] = [
    *(0, 1, 2, 3, 4, -1, -2, -3, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1, -(1 << 63)),
    *(PAGE, CAPACITY_BYTES, CAPACITY_BYTES - PAGE, 0.5, float("nan"), None, True, False),
    *("", "scheduler", "\ud7ff" * 100, b"", bytes(31), bytes(32), KEYS[0], KEYS[3], bytes(100)),
    *([], list(KEYS), KEYS * 2, [b""] * 4, [[]], [1, 2, 3, 4], {}, {"a": 1}, {"s": {"a": 1}}),
    *(Outcome.LATE.value, "nonsense"),
]


def odd(body: bytes, rng: random.Random) -> bytes:
    """The message with one to three values replaced, taken out or put in."""
    message = msgspec.msgpack.decode(body)
    for _ in range(rng.choice((1, 1, 2, 3))):
        place = message
        while inner := [each for each in place if isinstance(each, list)]:
            if rng.random() < 0.5:
                break
            place = rng.choice(inner)
        i, what = rng.randrange(len(place) + 1), rng.randrange(5)
        place[i : i + (what > 0)] = [] if what == 1 else [deepcopy(rng.choice(ODD))]
    return msgspec.msgpack.encode(message)


def damaged(messages: list[Any], num_inputs: int) -> Iterator[bytes]:
    """Frames: half of them of readable bodies with odd values, half of damaged bytes. The length of
    one in twenty is not that of its body."""
    rng = random.Random(3)
    bodies = [p.encode(each)[LENGTH.size :] for each in messages]
    for body in bad_inputs(bodies, num_inputs, words=WORDS):
        if rng.random() < 0.5:
            body = odd(rng.choice(bodies), rng)
        length = rng.randrange(1 << 32) if rng.random() < 0.05 else len(body)
        yield LENGTH.pack(length) + body


class WrongClient:
    """Of a node cache that other clients use as well; a new one after each error."""

    def __init__(self) -> None:
        self.node = Node(num_slots=16)
        self.node.store(*KEYS[:2])
        self._numbers = count(3)
        self._connect()

    def _connect(self) -> None:
        name = f"wrong/{next(self._numbers)}"
        hello = p.Hello(version=p.VERSION, session=name, role="scheduler", pid=3)
        self._connection = self.node.core.connect(hello, lambda message: p.encode(message) and None)
        self.node.core.handle(self._connection, NAMESPACE_MESSAGE)

    def say(self, pieces: list[bytes]) -> int:
        """How many messages could be read."""
        frames = p.FrameBuffer()
        try:
            bodies = [body for piece in pieces for body in frames.feed(piece)]
            messages = [p.decode_client(body) for body in bodies]
            for message in messages:
                # What these are about is the connection's, not the core's.
                if not isinstance(message, (p.Hello, p.GetStatus, p.Shutdown)):
                    self.node.core.handle(self._connection, message)
        except ProtocolError:
            self.node.core.dropped(self._connection)
            self.node.core.closed(self._connection)
            self._connect()
            raise
        return len(messages)

    def go_on(self) -> None:
        """Storage answers, and what was to be done later is done."""
        for pool in (self.node.reads, self.node.writes):
            while pool.jobs:
                call, on_done, _ = pool.jobs.pop(0)
                on_done(_result(call))
        self.node.timers.fire()
        self.node.core.check()


@few_and_many
def test_a_node_cache_drops_who_talks_nonsense_and_serves_the_others(num_inputs: int) -> None:
    client, rng, num_read = WrongClient(), random.Random(4), 0
    with bounds():
        for i, data in enumerate(damaged(CLIENT_MESSAGES, num_inputs)):
            with bounded(data):
                num_read += client.say(cut(data, rng))
            if i % 50 == 0:
                client.go_on()
    assert num_read > num_inputs / 20
    counts = client.node.core.slots.counts()
    assert counts.aside == 0


class Wired:
    """The client's half of a socket, of which a test has the other."""

    def __init__(self) -> None:
        self.theirs, mine = socket.socketpair()
        self.memory_fd = os.memfd_create("memory")
        os.ftruncate(self.memory_fd, CAPACITY_BYTES)
        self.client = NodeClient(mine, WELCOME, os.dup(self.memory_fd))

    def close(self) -> None:
        self.client.close()
        self.theirs.close()
        os.close(self.memory_fd)


class WiredLink:
    """A link, as a session sees one, over that socket: without the thread that connects."""

    def __init__(self, wired: Wired) -> None:
        self.client, self.generation, self.ranks_ready, self.problem = wired.client, 0, 0, None
        self.answers = Answers(CAPACITY_BYTES)

    def poll(self, timeout_s: float = 0.0) -> list[p.NodeMessage]:
        messages = self.client.poll(timeout_s)
        for message in messages:
            self.answers.check(message)
        return messages

    def send(self, message: p.ClientMessage) -> bool:
        self.answers.asked(message)
        return True


def asking_session(wired: Wired) -> NodeSession:
    """All its questions are open, and who waits for an answer uses it as its kind is used."""
    session = NodeSession(cast(NodeLink, WiredLink(wired)), NAMESPACE_MESSAGE)
    session.poll()
    session.ask(LOOKUP, lambda reply: (reply.offsets, reply.num_stored, reply.reason))
    session.ask(RESERVE, lambda reply: list(zip(KEYS, reply.offsets, strict=True)))
    session.ask(FIND, lambda found: list(zip(KEYS, found.places, strict=True)))
    session.ask(ASK_MANIFEST, lambda found: bytes(found.manifest) + found.error.encode())
    session.on_saving = lambda news: [*news.refused, *news.saved]
    return session


@few_and_many
def test_a_client_leaves_a_node_cache_that_talks_nonsense(num_inputs: int) -> None:
    """And never takes the answer to one question for that to another."""
    rng, num_heard = random.Random(5), 0
    with bounds():
        for data in damaged(NODE_MESSAGES, num_inputs):
            wired = Wired()
            session = asking_session(wired)
            for piece in cut(data, rng):
                wired.theirs.sendall(piece)
            with bounded(data):
                session.poll()
                num_heard += session.take_news()
            wired.close()
    assert num_heard > num_inputs / 20


def greet(data: bytes) -> None:
    mine, theirs = socket.socketpair()
    memory_fd = os.memfd_create("memory")
    try:
        os.ftruncate(memory_fd, CAPACITY_BYTES)
        socket.send_fds(theirs, [data], [memory_fd])
        theirs.shutdown(socket.SHUT_WR)
        welcome, fd = _receive_welcome(mine)
        os.close(fd)
        check_pages(SETTINGS, welcome)
        ignored_settings(SETTINGS, welcome).encode()
    finally:
        for each in (mine, theirs):
            each.close()
        os.close(memory_fd)


@few_and_many
def test_a_greeting_with_any_damage_is_refused_or_understood(num_inputs: int) -> None:
    """By a client of this version, whatever a later one greets with."""
    open_before = len(os.listdir("/proc/self/fd"))
    with bounds():
        for data in damaged([WELCOME, WELCOME, WELCOME, p.Notice(text="no room")], num_inputs):
            with bounded(data):
                greet(data)
    assert len(os.listdir("/proc/self/fd")) == open_before
