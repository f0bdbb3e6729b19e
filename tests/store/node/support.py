"""Real node caches for tests: started, talked to, and killed, also when a test fails."""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from typing_extensions import Self

from tests.store.tiers.posix import tree
from ucm.config.settings import StoreSettings
from ucm.store.blocks.blockfile import HEADER_BYTES
from ucm.store.blocks.keys import Key
from ucm.store.blocks.page_layout import padded_bytes
from ucm.store.client.connection import NodeClient
from ucm.store.client.link import NodeLink
from ucm.store.client.start import connect_or_start, log_path
from ucm.store.node import protocol as p
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.tier import PosixTier
from ucm.store.tiers.tier import TierNamespace

ROOT = Path(__file__).parents[3]
# A bound for what takes well under a second on an idle machine. Tests run beside each other.
SOON_S = 40.0
PAGE_BYTES = 60_001
FINGERPRINT = hashlib.sha256(b"the namespace of these tests").digest()
T = TypeVar("T")


def make_keys(name: str, num_keys: int) -> list[Key]:
    return [Key(hashlib.sha256(f"{name} {i}".encode()).digest()) for i in range(num_keys)]


def content(key: Key) -> bytes:
    """The page of `key`: every test and every process makes the same one."""
    return hashlib.shake_128(key).digest(PAGE_BYTES)


def wait_until(condition: Callable[[], T], what: str, *, within_s: float = SOON_S) -> T:
    """Returns the first true result."""
    deadline_s = time.monotonic() + within_s
    while not (result := condition()):
        assert time.monotonic() < deadline_s, f"not within {within_s} s: {what}"
        time.sleep(0.01)
    return result


def client_of(link: NodeLink) -> NodeClient:
    """The connection of a link, once there is one."""

    def client() -> NodeClient | None:
        link.poll()
        return link.client

    connected = wait_until(client, "the link is connected")
    assert connected is not None
    return connected


class Place:
    """A directory with a store, and room for sockets: their paths have to be short."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = directory / "store"
        self.store.mkdir()

    def settings(self, socket: str = "a", **changes: Any) -> StoreSettings:
        fields: dict[str, Any] = {
            "storage_backends": (str(self.store),),
            "cache_capacity_bytes": 32 << 20,
            "idle_exit_s": 60.0,
            "min_free_gb": 0.0,  # the disk that tests run on may be nearly full
            "socket_path": str(self.directory / "sockets" / f"{socket}.sock"),
        }
        return StoreSettings(**{**fields, **changes})

    def block(self, key: Key) -> Path:
        return Path(paths.block_path(str(self.store), FINGERPRINT, key))

    def blocks(self) -> set[Path]:
        """All files under the name of a block."""
        return {
            path
            for path in self.store.rglob("*")
            if tree.block_of(str(path.relative_to(self.store)))
        }

    def blocks_at_once(self) -> set[Path]:
        """Those of `blocks` that were there together, when the listing ended: meanwhile some go,
        and others come."""
        return {path for path in self.blocks() if path.exists()}

    def in_quarantine(self) -> list[Path]:
        return [path for path in (self.store / paths.QUARANTINE).rglob("*") if path.is_file()]

    def write(self, keys: Sequence[Key]) -> None:
        """Files as another node would have left them."""
        tier = PosixTier([str(self.store)])
        namespace = TierNamespace(FINGERPRINT, PAGE_BYTES, b"{}")
        tier.open_namespace(namespace)
        page = memoryview(mmap.mmap(-1, padded_bytes(PAGE_BYTES)))
        for key in keys:
            page[:PAGE_BYTES] = content(key)
            staged = tier.stage(namespace, key, page, num_tokens=128)
            assert staged is not None
            tier.publish(staged)

    def stray_files(self) -> list[Path]:
        return list(self.store.rglob("*.tmp"))

    def block_with_flipped_bit(self, key: Key) -> bytes:
        """Damages the file of `key`. Returns what it holds now."""
        data = bytearray(self.block(key).read_bytes())
        data[HEADER_BYTES + 1234] ^= 16
        self.block(key).write_bytes(data)
        return bytes(data)

    def pids(self) -> list[int]:
        """Processes that were started with this directory on their command line."""
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._is(pid)]

    def _is(self, pid: int) -> bool:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return os.fsencode(self.directory) in command and alive(pid) and pid != os.getpid()

    def close(self) -> None:
        def all_gone() -> bool:
            for pid in self.pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not self.pids()

        wait_until(all_gone, "every process of this test is gone")
        shutil.rmtree(self.directory)


class Engine:
    """One connection to a node cache, as an engine's scheduler side has it, and the memory."""

    def __init__(
        self, settings: StoreSettings, session: str = "engine/0", role: str = "scheduler"
    ) -> None:
        self.client: NodeClient = connect_or_start(
            settings, session=session, role=role, timeout_s=SOON_S
        )
        self.pid = self.client.welcome.pid
        self.memory = mmap.mmap(self.client.memory_fd, self.client.welcome.capacity_bytes)
        self._ids = count(1)
        self._inbox: list[p.NodeMessage] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.client.close()
        self.memory.close()

    def open_namespace(self, page_bytes: int = PAGE_BYTES) -> p.NamespaceOpened:
        self.client.send(
            p.OpenNamespace(
                ns=1,
                fingerprint=FINGERPRINT,
                page_bytes=page_bytes,
                block_tokens=128,
                manifest=b"{}",
            )
        )
        return self.answer(p.NamespaceOpened)

    def answer(self, kind: type[T], request_id: int | None = None) -> T:
        """The next message of this kind, to this request; others are kept."""

        def arrived() -> list[T]:
            self._inbox += self.client.poll(0.05)
            found = [
                message
                for message in self._inbox
                if isinstance(message, kind) and request_id in (None, getattr(message, "id", None))
            ]
            for message in found[:1]:
                self._inbox.remove(message)
            return found[:1]

        return wait_until(arrived, f"an answer: {kind.__name__}")[0]

    def status(self) -> p.Status:
        request_id = next(self._ids)
        self.client.send(p.GetStatus(id=request_id, check=True))
        return self.answer(p.Status, request_id)

    def ask(
        self,
        keys: Sequence[Key],
        *,
        timeout_ms: int = 10_000,
        load: bool = True,
        promised: int = 0,
    ) -> int:
        """Sends a lookup of all keys and returns its id."""
        lookup_id = next(self._ids)
        self.client.send(
            p.Lookup(
                id=lookup_id,
                ns=1,
                keys=list(keys),
                read_from=0,
                load=load,
                timeout_ms=timeout_ms,
                promised=promised,
            )
        )
        return lookup_id

    def look_up(self, keys: Sequence[Key], *, timeout_ms: int = 10_000) -> p.LookupReply:
        return self.answer(p.LookupReply, self.ask(keys, timeout_ms=timeout_ms))

    def load(self, keys: Sequence[Key]) -> tuple[int, int]:
        """Looks up, checks the pages, releases. Returns hits and how many came from files."""
        reply = self.look_up(keys)
        for key, offset in zip(keys, reply.offsets, strict=False):
            assert self.memory[offset : offset + PAGE_BYTES] == content(key)
        self.client.send(p.Release(lookups=[reply.id]))
        return len(reply.offsets), reply.from_files

    def reserve(self, keys: Sequence[Key]) -> list[int]:
        request_id = next(self._ids)
        parents = [b"", *keys[:-1]]
        self.client.send(p.Reserve(id=request_id, ns=1, keys=list(keys), parents=parents))
        return self.answer(p.ReserveReply, request_id).offsets

    def fill(self, keys: Sequence[Key], offsets: Sequence[int]) -> None:
        for key, offset in zip(keys, offsets, strict=True):
            if offset >= 0:
                self.memory[offset : offset + PAGE_BYTES] = content(key)

    def commit(self, keys: Sequence[Key]) -> None:
        self.client.send(p.Commit(ns=1, keys=list(keys), parents=[b"", *keys[:-1]]))

    def dump(self, keys: Sequence[Key]) -> list[int]:
        """Dumps one prompt. Returns what was answered for its blocks."""
        offsets = self.reserve(keys)
        self.fill(keys, offsets)
        self.commit(keys)
        return offsets

    def wait_written(self) -> p.Status:
        """Until nothing waits for storage any more."""

        def idle() -> p.Status | None:
            status = self.status()
            return None if any(status.queues.values()) else status

        return wait_until(idle, "all I/O of the node cache has ended")


def engine(settings: StoreSettings, session: str = "engine/0") -> Engine:
    """A connection that has opened the namespace."""
    made = Engine(settings, session)
    assert not made.open_namespace().refused
    return made


def kill(pid: int) -> None:
    """kill -9 of a process that is not a child of this one, until it is gone."""
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid), f"{pid} is gone")


def alive(pid: int) -> bool:
    """A process whose first thread is a zombie still has its files open until the others end."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        num_threads = len(os.listdir(f"/proc/{pid}/task"))
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z" or num_threads > 1


def log_of(settings: StoreSettings) -> str:
    return Path(log_path(settings)).read_text()


@contextmanager
def child(what: str, settings: StoreSettings, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A function of children.py in a process of its own, after it has said that it is ready."""
    command = [sys.executable, "-m", "tests.store.node.children", what]
    command.append(msgspec.json.encode(settings).decode())
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()
