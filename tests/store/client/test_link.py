"""A client of a node cache against peers that are not one, or not a healthy one."""

from __future__ import annotations

import logging
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import msgspec
import pytest
from msgspec.structs import replace

from tests.store.node.support import SOON_S, Place, client_of, wait_until
from ucm.errors import NodeUnavailable, ProtocolError
from ucm.store.client.connection import NodeClient
from ucm.store.client.link import NodeLink, session_name
from ucm.store.node import protocol as p

WELCOME = p.Welcome(version=p.VERSION, arena="x", capacity_bytes=4096, pid=os.getpid())


@contextmanager
def peer(
    place: Place, serve: Callable[[socket.socket], None], hellos: list[bytes] | None = None
) -> Iterator[str]:
    """Somebody at the node cache's socket, who hears each client's Hello and then does `serve`."""
    path = place.settings().socket_path
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen()

        def run() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                with sock:
                    (hellos if hellos is not None else []).append(sock.recv(1 << 16))
                    serve(sock)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield path
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def connect(path: str, timeout_s: float = SOON_S) -> NodeClient:
    return NodeClient.connect(path, session="x/0", role="tool", timeout_s=timeout_s)


def welcome(
    sock: socket.socket,
    place: Place | None = None,
    *,
    version: int = p.VERSION,
    memory_bytes: int | None = None,
    unreadable: bool = False,
) -> None:
    """As the node cache of `place` does it."""
    memory_fd = os.memfd_create("test")
    os.ftruncate(memory_fd, WELCOME.capacity_bytes if memory_bytes is None else memory_bytes)
    settings = msgspec.to_builtins(place.settings()) if place is not None else {}
    message = replace(WELCOME, version=version, settings=settings)
    said = p.encode(p.RanksReady(count=1) if unreadable else message)
    socket.send_fds(sock, [said[:-1] + b"\xc1" if unreadable else said], [memory_fd])
    os.close(memory_fd)


def wait_for_end(sock: socket.socket) -> None:
    while sock.recv(1 << 16):
        pass


def healthy(sock: socket.socket) -> None:
    welcome(sock)
    wait_for_end(sock)


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_nobody_at_the_socket_is_unavailable(place: Place) -> None:
    with pytest.raises(NodeUnavailable, match=r"no node cache answers at .*sock"):
        connect(place.settings().socket_path)


def test_a_peer_that_says_nothing_is_unavailable_after_the_timeout(place: Place) -> None:
    with peer(place, wait_for_end) as path, pytest.raises(NodeUnavailable, match="timed out"):
        connect(path, timeout_s=0.1)


ODD_PEERS: dict[str, tuple[Callable[[socket.socket], None], str]] = {
    "closes": (lambda sock: None, "did not answer with its memory"),
    "speaks another protocol": (lambda sock: sock.sendall(b"HTTP/1.1 400 \r\n\r\n"), "frame of"),
    "sends no memory": (lambda sock: sock.sendall(p.encode(WELCOME)), "did not answer"),
    "has less memory than it says": (lambda sock: welcome(sock, memory_bytes=4095), "other memory"),
    "greets unreadably": (lambda sock: welcome(sock, unreadable=True), "unreadable message"),
    "is newer": (lambda sock: welcome(sock, version=p.VERSION + 1), "stop it, so that a new one"),
}


@pytest.mark.parametrize("odd", ODD_PEERS.values(), ids=ODD_PEERS.keys())
def test_no_descriptor_is_left_of_a_peer_that(
    place: Place, odd: tuple[Callable[[socket.socket], None], str]
) -> None:
    serve, text = odd

    def then_wait(sock: socket.socket) -> None:
        serve(sock)
        sock.shutdown(socket.SHUT_WR)
        wait_for_end(sock)

    before = num_open_files()
    with peer(place, then_wait) as path, pytest.raises(ProtocolError, match=text) as raised:
        connect(path)

    assert "\n" not in str(raised.value)
    assert num_open_files() == before


def test_a_connection_that_ends_is_unavailable_after_its_last_message(place: Place) -> None:
    def serve(sock: socket.socket) -> None:
        welcome(sock)
        sock.sendall(p.encode(p.RanksReady(count=1)) + p.encode(p.RanksReady(count=2)))

    with peer(place, serve) as path, connect(path) as client:
        messages: list[p.NodeMessage] = []

        def poll_until_lost() -> None:
            while True:
                messages.extend(client.poll(SOON_S))

        with pytest.raises(NodeUnavailable, match=f"lost the node cache .pid {os.getpid()}."):
            poll_until_lost()
        assert messages == [p.RanksReady(count=1), p.RanksReady(count=2)]
        with pytest.raises(NodeUnavailable, match="closed"):
            client.send(p.GetStatus(id=1))


def test_a_message_in_many_pieces_arrives_whole(place: Place) -> None:
    message = p.LookupReply(
        id=1,
        offsets=list(range(50_000)),
        num_stored=50_000,
        from_files=0,
        head_stored=0,
        reason="",
    )

    def serve(sock: socket.socket) -> None:
        welcome(sock)
        frame = p.encode(message)
        for i in range(0, len(frame), 5000):
            sock.sendall(frame[i : i + 5000])
        wait_for_end(sock)

    with peer(place, serve) as path, connect(path) as client:
        arrived: list[p.NodeMessage] = []
        wait_until(lambda: arrived.extend(client.poll(0.05)) or arrived, "it arrives")
        assert arrived == [message]


def test_a_peer_that_does_not_read_costs_memory_within_a_bound_and_no_time(place: Place) -> None:
    release = threading.Event()

    def serve(sock: socket.socket) -> None:
        welcome(sock)
        release.wait(SOON_S)

    def ask_without_end() -> None:
        while True:
            client.send(p.Release(lookups=list(range(1 << 20))))

    with peer(place, serve) as path, connect(path) as client:
        with pytest.raises(NodeUnavailable, match="it has stopped reading"):
            ask_without_end()
        release.set()


def test_a_process_with_very_many_open_files_can_wait_for_answers(place: Place) -> None:
    """Engines have more than the 1024 that select(2) can take."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] < 1300:
        pytest.skip("this process may not open that many files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 1300), limits[1]))
    fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with peer(place, healthy) as path, connect(path) as client:
            assert client.fileno() > 1024
            assert client.poll(0.05) == []
    finally:
        for fd in fds:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_link_goes_on_to_the_next_generation_with_each_loss(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    hang_up = threading.Semaphore(0)
    hellos: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        welcome(sock, place)
        sock.sendall(p.encode(p.RanksReady(count=2)))
        hang_up.acquire(timeout=SOON_S)

    def is_connected() -> bool:
        link.poll(0.01)
        return link.ranks_ready == 2

    caplog.set_level(logging.CRITICAL, logger="ucm")
    with (
        peer(place, serve, hellos),
        closing(NodeLink(place.settings(), engine_id="engine")) as link,
    ):
        for generation in range(3):
            wait_until(is_connected, "it is connected")
            assert link.generation == generation
            assert link.client is not None
            hang_up.release()
            wait_until(lambda g=generation: link.poll(0.01) or link.generation > g, "it is lost")
        client_of(link)
        link.close()
        hang_up.release()

    names = [session_name("engine", generation) for generation in range(4)]
    assert [decode_hello(each).session for each in hellos[:4]] == names


def test_a_link_that_nobody_polls_has_the_next_connection_when_it_is_asked(place: Place) -> None:
    hang_up = threading.Event()
    hellos: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        welcome(sock, place)
        sock.sendall(p.encode(p.RanksReady(count=len(hellos))))
        hang_up.wait(SOON_S)
        hang_up.clear()

    with (
        peer(place, serve, hellos),
        closing(NodeLink(place.settings(), engine_id="engine")) as link,
    ):
        client_of(link)
        for losses in (1, 2):
            hang_up.set()
            wait_until(lambda n=losses: len(hellos) == n + 1, "it is connected again")
        wait_until(lambda: link.poll() and link.ranks_ready == 3, "the third has spoken")
        assert link.generation == 2
        link.close()
        hang_up.set()


def test_a_connection_that_is_lost_is_not_used_again(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, logger="ucm")
    refuse = threading.Event()

    def serve(sock: socket.socket) -> None:
        if not refuse.is_set():
            welcome(sock, place)
        refuse.set()

    with peer(place, serve), closing(NodeLink(place.settings(), engine_id="engine")) as link:
        wait_until(lambda: link.poll(0.01) or link.generation == 1, "it is lost")
        assert (link.client, link.ranks_ready) == (None, 0)
        assert not link.send(p.GetStatus(id=1))


def decode_hello(data: bytes) -> p.Hello:
    (body,) = p.FrameBuffer().feed(data)
    message = p.decode_client(body)
    assert isinstance(message, p.Hello)
    return message


def test_a_closed_link_says_nothing_and_leaves_no_descriptor(place: Place) -> None:
    def serve(sock: socket.socket) -> None:
        welcome(sock, place)
        wait_for_end(sock)

    with peer(place, serve):
        before = num_open_files()
        link = NodeLink(place.settings(), engine_id="engine")
        client_of(link)
        link.close()

        assert link.client is None
        assert link.poll(0.01) == []
        assert not link.send(p.GetStatus(id=1))
        wait_until(lambda: num_open_files() == before, "all is closed")


def test_a_peer_that_says_why_it_refuses_is_heard_also_when_it_has_hung_up(place: Place) -> None:
    def refuse(sock: socket.socket) -> None:
        sock.sendall(p.encode(p.Notice(text="there is no room")))

    with peer(place, refuse) as path, pytest.raises(NodeUnavailable, match=r"there is no room$"):
        connect(path)


def test_what_the_socket_takes_later_is_sent_while_an_answer_is_waited_for(place: Place) -> None:
    question = p.Release(lookups=[1 << 40] * 300_000)
    num_bytes = len(p.encode(question))
    reads = threading.Event()

    def serve(sock: socket.socket) -> None:
        welcome(sock, place)
        reads.wait()
        left = num_bytes
        while left and (data := sock.recv(1 << 16)):
            left -= len(data)
        if not left:
            sock.sendall(p.encode(p.RanksReady(count=7)))
        wait_for_end(sock)

    with peer(place, serve) as path, connect(path) as client:
        client.send(question)
        assert client.has_unsent
        threading.Timer(0.2, reads.set).start()
        assert client.poll(SOON_S) == [p.RanksReady(count=7)]
        assert not client.has_unsent
