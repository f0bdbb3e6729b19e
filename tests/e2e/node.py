"""A node cache as a test sees it: over its socket, and by its process."""

from __future__ import annotations

import mmap
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from examples.cluster.processes import run_folder
from tests.e2e.store import Namespace
from ucm.errors import UcmError
from ucm.store.blocks.keys import Key
from ucm.store.client.connection import NodeClient
from ucm.store.node import protocol as p

IDLE_EXIT_S = 5
_TEST_SESSION = "test-"
_Message = TypeVar("_Message", bound=p.NodeMessage)

# The memory of every node cache that a test has asked, as (device, inode): nobody may hold it when
# all is over.
memories: set[tuple[int, int]] = set()


class Node:
    """What makes servers one node: they share this socket. The first of them starts the process."""

    def __init__(
        self,
        name: str,
        *,
        capacity_mib: int = 256,
        mounted_at: Path | None = None,
        **more: int,
    ) -> None:
        """`mounted_at`: where this node sees the store, if not in its folder. `more` are further
        settings of the store."""
        self.socket_path = str(run_folder() / f"{name}.sock")
        self.capacity_mib = capacity_mib
        self._mounted_at = mounted_at
        self._more = more

    def settings(self) -> dict[str, Any]:
        store = {} if self._mounted_at is None else {"storage_backends": str(self._mounted_at)}
        return {
            **store,
            **self._more,
            "min_free_gb": 0,  # the disk that tests run on may be nearly full
            "cache_buffer_capacity_gb": self.capacity_mib / 1024,
            "node_cache_idle_exit_s": IDLE_EXIT_S,
            "node_cache_socket": self.socket_path,
        }

    # -- over the socket -------------------------------------------------------------------

    def status(self) -> p.Status:
        with self._connect() as client:
            client.send(p.GetStatus(id=1, check=True))
            return _await(client, p.Status)

    def wait(
        self, what: str, condition: Callable[[p.Status], bool], *, timeout_s: float = 30.0
    ) -> p.Status:
        """Until a status fulfils `condition`; an assertion with the last status otherwise."""
        deadline_s = time.monotonic() + timeout_s
        last: object = None
        while time.monotonic() < deadline_s:
            try:
                status = self.status()
            except UcmError as error:
                last = error
            else:
                if condition(status):
                    return status
                last = status
            time.sleep(0.02)
        raise AssertionError(f"not {what} after {timeout_s:.0f} s: {last}")

    def wait_quiet(self) -> p.Status:
        """Until nothing is pinned, filled, read or written; the slots' invariant must hold."""
        status = self.wait("quiet", is_quiet)
        assert status.invariant == ""
        return status

    def leave(self) -> None:
        """Tells the process to write out what is queued and to end."""
        pid = self.status().pid
        with self._connect() as client:
            client.send(p.Shutdown())
            _wait_gone(pid)

    def kill(self) -> int:
        """kill -9; the pid that was."""
        pid = self.status().pid
        os.kill(pid, signal.SIGKILL)
        _wait_gone(pid)
        return pid

    @contextmanager
    def pages(self, namespace: Namespace, keys: list[Key]) -> Iterator[list[memoryview]]:
        """These pages, brought from files if need be, verified and pinned, writable: the memory
        from which engines load."""
        with self._connect() as client:
            opening = p.OpenNamespace(
                ns=1,
                fingerprint=namespace.fingerprint,
                page_bytes=namespace.page_bytes,
                block_tokens=namespace.block_tokens,
                manifest=namespace.manifest_json,
            )
            client.send(opening)
            opened = _await(client, p.NamespaceOpened)
            assert not opened.error, opened
            ask = p.Lookup(id=2, ns=1, keys=list(keys), read_from=0, load=True, timeout_ms=20_000)
            client.send(ask)
            reply = _await(client, p.LookupReply)
            assert len(reply.offsets) == len(keys), reply
            memory = memoryview(mmap.mmap(client.memory_fd, client.welcome.capacity_bytes))
            size = namespace.page_bytes
            yield [memory[offset : offset + size] for offset in reply.offsets]

    def _connect(self) -> NodeClient:
        session = f"{_TEST_SESSION}{uuid.uuid4().hex}"
        client = NodeClient.connect(self.socket_path, session=session, role="tool", timeout_s=5.0)
        memory = os.fstat(client.memory_fd)
        memories.add((memory.st_dev, memory.st_ino))
        return client


def engine_sessions(status: p.Status) -> dict[str, dict[str, int]]:
    """The sessions of engines: a test's own are not counted."""
    sessions = status.sessions.items()
    return {name: fields for name, fields in sessions if not name.startswith(_TEST_SESSION)}


def engines_of(status: p.Status) -> set[str]:
    """Who is connected. A rank that was ahead of its scheduler side holds on to the session that it
    left, so one engine may have two."""
    return {name.rpartition("/")[0] for name in engine_sessions(status)}


def count(status: p.Status, counter: str) -> int:
    """A counter of the node cache; one that never counted isn't there."""
    return status.counters.get(counter, 0)


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def is_quiet(status: p.Status) -> bool:
    sessions = engine_sessions(status).values()
    held = [fields["pins"] + fields["filling"] for fields in sessions]
    slots = status.slots
    waiting = slots["pins"] + slots["filling"] + slots["aside"] + sum(status.queues.values())
    return not waiting and not any(held)


def _await(client: NodeClient, kind: type[_Message], timeout_s: float = 30.0) -> _Message:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        for message in client.poll(0.5):
            if isinstance(message, kind):
                return message
    raise AssertionError(f"no {kind.__name__} within {timeout_s:.0f} s")


def _wait_gone(pid: int, timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while is_alive(pid):
        assert time.monotonic() < deadline_s, f"process {pid} lives on"
        time.sleep(0.01)
