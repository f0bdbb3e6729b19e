"""Why there is no node cache, or none that answers, is said by who misses it."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.store.api.whole_store import IDS, dump, load, open_store, whole_blocks
from tests.store.client.test_link import peer, wait_for_end, welcome
from tests.store.node.support import Engine, Place, child, log_of
from ucm.errors import ConfigError, NodeUnavailable, TaskFailed
from ucm.store.api import driver
from ucm.store.client import start
from ucm.store.client.start import connect_or_start
from ucm.store.node.limits import Left
from ucm.store.node.lock import this_process, try_lock, why_held_up

pytestmark = pytest.mark.process


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(
    ("setting", "value", "why"),
    [
        ("page_key_file", "/nowhere/key", "page_key_file: /nowhere/key: can't be read"),
        ("file_group", "nobodys-group", "file_group: nobodys-group: no such group"),
    ],
)
def test_who_would_start_one_refuses_settings_that_only_a_node_cache_reads(
    place: Place, setting: str, value: str, why: str
) -> None:
    for attempt in range(2):
        with pytest.raises(ConfigError, match=why):
            connect_or_start(
                place.settings(**{setting: value}), session=f"{attempt}", role="tool", timeout_s=5.0
            )
    with pytest.raises(ConfigError, match=why):
        open_store(place, **{setting: value})
    assert place.pids() == []
    with Engine(place.settings()) as mended:
        assert mended.status().invariant == ""


def test_who_would_start_one_without_memory_for_it_says_so(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "memory_left", lambda: Left(1 << 20, "/cg/memory.max"))
    with pytest.raises(ConfigError, match=r"cache_buffer_capacity_gb: 1.0 MiB of memory are left"):
        connect_or_start(place.settings(), session="x/0", role="scheduler", timeout_s=5.0)


def test_whoever_serves_has_settings_of_its_own(place: Place) -> None:
    """Its key may be one that engines can't read."""
    with Engine(place.settings()) as first:
        other: dict[str, Any] = {"page_key_file": "/nowhere/key"}
        with Engine(place.settings(**other), "second/0") as second:
            assert second.pid == first.pid


def test_a_start_that_its_settings_have_ended_is_explained_to_who_waits(place: Place) -> None:
    settings = place.settings(page_key_file="/nowhere/key")
    with child("serve", settings) as serving:
        serving.wait(30.0)
    with pytest.raises(NodeUnavailable) as raised:
        connect_or_start(settings, session="x/0", role="worker", timeout_s=0.1)
    assert "the last one that was started has ended: page_key_file: /nowhere/key" in str(
        raised.value
    )
    with Engine(place.settings()):
        assert why_held_up(settings.socket_path).startswith("pid ")


@pytest.mark.long
def test_of_one_that_is_stopped_everybody_is_told_who_it_is(place: Place) -> None:
    settings = place.settings()
    with whole_blocks(place, timeout_ms=2000) as store:
        dump(store, IDS[:2])
        store.flush()
        (pid,) = place.pids()
        why = f"pid {pid} holds the lock and does not answer: it is stopped, kill -CONT {pid}"
        with stopped(pid):
            with pytest.raises(NodeUnavailable, match=why):
                connect_or_start(settings, session="x/0", role="tool", timeout_s=0.1)
            with pytest.raises(TaskFailed, match=rf"timed out after 2 s, waiting for {why}"):
                load(store, IDS[:2])
            with pytest.raises(NodeUnavailable, match=why):
                whole_blocks(place, timeout_ms=2000)
        assert Path(f"/proc/{pid}").exists()
    assert "the node cache failed" not in log_of(settings)


def test_of_one_that_greets_a_store_and_says_no_more_its_user_is_told_who_it_is(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_START_S", 0.5)
    path = place.settings().socket_path

    def greet(sock: socket.socket) -> None:
        welcome(sock, place)
        wait_for_end(sock)

    lock = try_lock(path)
    assert lock is not None
    lock.note(this_process(failures=0, tried_s=0.0))
    who = f"pid {os.getpid()} holds the lock and does not answer"
    why = rf"the node cache has not answered for \d s: {who}; its log: {path}.log"
    with peer(place, greet), pytest.raises(NodeUnavailable, match=why):
        whole_blocks(place, timeout_ms=500)
    lock.release()
