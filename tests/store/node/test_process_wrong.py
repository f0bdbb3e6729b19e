"""Wrong clients of the same user, and real ones that are dropped, against a real node cache."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.store.node.support import (
    PAGE_BYTES,
    Engine,
    Place,
    engine,
    log_of,
    make_keys,
    wait_until,
)
from ucm.config.settings import StoreSettings
from ucm.errors import NodeUnavailable, TaskFailed, UcmError
from ucm.store.client.connection import NodeClient
from ucm.store.client.start import connect_or_start
from ucm.store.node import protocol as p
from ucm.store.pipeline import UcmPipelineStore

pytestmark = pytest.mark.process


@pytest.fixture
def good(place: Place) -> Iterator[Engine]:
    with engine(place.settings(), "good/0") as client:
        yield client


def lose(client: NodeClient) -> str:
    """Until the client knows that it hears nothing more."""
    said = ""

    def lost() -> bool:
        nonlocal said
        try:
            client.poll(0.05)
        except UcmError as error:
            said = str(error)
        return bool(said)

    wait_until(lost, "it knows")
    return said


def test_what_a_dropped_client_still_writes_lands_in_nobodys_page(
    place: Place, good: Engine
) -> None:
    """Its process lives on, and its ranks copy until they hear of it."""
    keys, others = make_keys("wrong", 4), make_keys("right", 500)
    with engine(place.settings(), "wrong/0") as wrong:
        offsets = wrong.reserve(keys)
        wrong.client.send(p.Commit(ns=1, keys=[keys[0]], parents=[keys[0]]))
        assert "lost the node cache" in lose(wrong.client)

        assert good.status().slots["aside"] == 4
        # More than there is memory: each slot that may be used is used.
        for start in range(0, len(others), 50):
            mine = others[start : start + 50]
            assert not set(good.dump(mine)) & set(offsets)
            for offset in offsets:
                wrong.memory[offset : offset + PAGE_BYTES] = b"\xff" * PAGE_BYTES
            assert good.load(mine) == (50, 0)
            good.wait_written()
        assert good.status().slots["aside"] == 4
    wait_until(lambda: not good.status().slots["aside"], "its end has closed")
    assert good.status().invariant == ""
    assert set(good.status().sessions) == {"good/0"}


def test_nobody_can_cut_the_memory_short(good: Engine) -> None:
    size = good.client.welcome.capacity_bytes
    for new_size in (0, size - 4096, size + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(good.client.memory_fd, new_size)
    keys = make_keys("a", 3)
    good.dump(keys)
    assert good.load(keys) == (3, 0)


def test_the_memory_is_in_no_core_dump(good: Engine) -> None:
    smaps = Path(f"/proc/{good.pid}/smaps").read_text()
    (mapping,) = (part for part in smaps.split("VmFlags:") if "memfd:ucm-node-cache" in part)
    after = smaps.split(mapping)[1].splitlines()[0]
    assert " dd" in after


def test_who_does_not_say_who_it_is_is_shown_out(place: Place) -> None:
    settings = place.settings(hello_timeout_ms=200)
    with Engine(settings), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.settimeout(20.0)
        silent.connect(settings.socket_path)
        assert silent.recv(100) == b""


def test_there_are_no_more_clients_than_there_may_be(place: Place) -> None:
    settings = place.settings(max_clients=2)
    with Engine(settings, "a/0") as one, Engine(settings, "b/0"):
        why = r"refuses this client: there are 2 clients \(node_cache_max_clients\)$"
        for _ in range(50):
            with pytest.raises(NodeUnavailable, match=why):
                NodeClient.connect(settings.socket_path, session="c/0", role="tool", timeout_s=5.0)
        with pytest.raises(NodeUnavailable, match=why):
            connect_or_start(settings, session="c/0", role="scheduler", timeout_s=0.1)
        assert one.status().invariant == ""
    with Engine(settings, "d/0") as later:
        assert later.pid == one.pid


def knock(settings: StoreSettings, message: bytes) -> None:
    """Says this, and waits for the end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock, suppress(ConnectionError):
        sock.settimeout(20.0)
        sock.connect(settings.socket_path)
        sock.sendall(message)
        while sock.recv(4096):
            pass


def test_however_many_are_dropped_or_refused_the_log_says_each_kind_once(place: Place) -> None:
    settings = place.settings(max_clients=2)
    with Engine(settings, "good/0") as good:
        for _ in range(5):
            knock(settings, b"\xff" * 100)
        with Engine(settings, "other/0"):
            for _ in range(5):
                knock(settings, b"")
        assert good.status().counters["clients_dropped"] == 5
    log = log_of(settings)
    assert (log.count("dropped a client: "), log.count("refused a connection: ")) == (1, 1)


def in_a_fork(read_end: int, write_end: int) -> int:
    """A child that lives until the pipe is closed."""
    child = os.fork()
    if not child:
        os.close(write_end)
        os.read(read_end, 1)
        os._exit(0)
    return child


def test_the_child_of_a_client_keeps_nothing_of_it(place: Place, good: Engine) -> None:
    keys = make_keys("a", 4)
    good.dump(keys)
    read_end, write_end = os.pipe()
    with engine(place.settings(), "forks/0") as forks:
        assert len(forks.look_up(keys).offsets) == 4
        child = in_a_fork(read_end, write_end)
        # As a kill would do it: no word, only the end of this process's descriptors.
        forks.client._sock.close()
    try:
        wait_until(lambda: set(good.status().sessions) == {"good/0"}, "it is gone")
        wait_until(lambda: not good.status().slots["pins"], "and its pins with it")
    finally:
        os.close(write_end)
        os.close(read_end)
        os.waitpid(child, 0)


def test_the_child_of_a_client_is_told_at_once_that_it_is_none(place: Place, good: Engine) -> None:
    config = {
        "storage_backends": str(place.store),
        "node_cache_socket": place.settings().socket_path,
        "tensor_size_list": [4096],
        "timeout_ms": 60_000,
    }
    with UcmPipelineStore(config) as store:
        read_end, write_end = os.pipe()
        child = os.fork()
        if not child:
            try:
                with pytest.raises(NodeUnavailable, match="forked from"):
                    good.client.send(p.GetStatus(id=1))
                with pytest.raises(TaskFailed, match=r"forked from \d+, which opened"):
                    store.lookup([b"x"])
                os.write(write_end, b"told")
            finally:
                os._exit(0)
        os.close(write_end)
        assert os.read(read_end, 10) == b"told"
        os.close(read_end)
        os.waitpid(child, 0)
        assert store.lookup([b"x"]) == [False]


def test_a_store_leaves_no_descriptor_also_one_that_is_refused(place: Place, good: Engine) -> None:
    config = {
        "storage_backends": str(place.store),
        "node_cache_socket": place.settings().socket_path,
        "tensor_size_list": [4096],
    }

    def num_open() -> int:
        return len(os.listdir("/proc/self/fd"))

    UcmPipelineStore(config).close()
    before = num_open()
    for _ in range(3):
        UcmPipelineStore(config).close()
        with pytest.raises(UcmError):
            UcmPipelineStore({**config, "tensor_size_list": [1 << 36]})
    wait_until(lambda: num_open() == before, "all is closed")
