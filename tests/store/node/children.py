"""Clients that get killed: `python -m tests.store.node.children WHAT SETTINGS_JSON`."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import sys
import time
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from tests.store.node.support import PAGE_BYTES, Engine, engine, make_keys
from ucm.config.settings import StoreSettings
from ucm.errors import ConfigError, NodeUnavailable
from ucm.store.client.link import NodeLink
from ucm.store.client.rank_link import MemoryTaker, RankLink
from ucm.store.node import protocol as p
from ucm.store.node import server
from ucm.store.node.lock import take_lock
from ucm.store.node.trusted_users import trust_of

CROWD = 100
BECOME = "UCM_TEST_BECOME"


def hold(settings: StoreSettings) -> None:
    """Pins what is there of prompt `held` and reserves slots for prompt `unfinished`."""
    client = engine(settings, "child/0")
    assert client.look_up(make_keys("held", 5)).reason == ""
    assert min(client.reserve(make_keys("unfinished", 5))) >= 0
    wait()
    client.close()


def copy(settings: StoreSettings) -> None:
    """A rank."""
    client = Engine(settings, "child/0", "worker")
    client.client.send(p.MemoryReady())
    wait()
    client.close()


def fill(settings: StoreSettings) -> None:
    """Maps the memory, and dumps more pages than it has room for."""
    with engine(settings, "child/0") as client:
        num_pages = client.client.welcome.capacity_bytes // PAGE_BYTES
        num_prompts = num_pages // 100 + 2
        for number in range(num_prompts):
            keys = make_keys(f"prompt {number}", 100)
            assert min(client.dump(keys)) >= 0
            client.wait_written()
        hits, _ = client.load(keys)
        status = client.status()
        assert status.invariant == ""
        print(client.pid, client.client.welcome.capacity_bytes, status.slots["evictions"], hits)


def intrude(settings: StoreSettings) -> None:
    """Another user, who got hold of the path."""
    os.setgroups([])
    os.setuid(65534)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(settings.socket_path)
        wait()
        try:
            sock.sendall(
                p.encode(p.Hello(version=p.VERSION, session="x/0", role="tool", pid=os.getpid()))
            )
            data, fds, _, _ = socket.recv_fds(sock, 1 << 16, 4)
        except (BrokenPipeError, ConnectionResetError):
            data, fds = b"", []
    print(len(data), len(fds), flush=True)


def knock(settings: StoreSettings) -> None:
    """Another user, whose configuration says the same."""
    if os.getuid() == 0:
        become("65534:65534:")
    wait()
    for role in ("scheduler", "worker"):
        with pytest.raises(ConfigError) as refused:
            Engine(settings, "x/0", role)
        print(refused.value, flush=True)


def serve(settings: StoreSettings) -> None:
    """A node cache that somebody starts by hand."""
    lock = take_lock(settings.socket_path, trust_of(settings))
    print("ready", flush=True)
    server.run(settings, lock)


def use(settings: StoreSettings) -> None:
    """Loads prompt `common` and dumps prompt `own`."""
    wait()
    with engine(settings, f"user {os.getuid()}/0") as client:
        loaded = client.load(make_keys("common", 3))
        dumped = client.dump(make_keys("own", 3))
        client.wait_written()
        print(client.pid, loaded, min(dumped) >= 0)


def pose(settings: StoreSettings) -> None:
    """Listens where a node cache is looked for, and hears what it is told."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(settings.socket_path)
        os.chmod(settings.socket_path, 0o666)
        sock.listen()
        print("ready", flush=True)
        while True:
            heard = sock.accept()[0].recv(1 << 16)
            print(len(heard), flush=True)


def become(who: str) -> None:
    """`uid:gid:further,groups`, for good."""
    uid, gid, further = who.split(":")
    os.setgroups([int(each) for each in further.split(",") if each])
    os.setgid(int(gid))
    os.setuid(int(uid))


class Reporter(MemoryTaker):
    """A rank that says which generations it has got to."""

    def memory_arrived(self, generation: int, memory_fd: int, welcome: p.Welcome) -> None:
        report(f"rank{os.getpid()}", generation, welcome.pid)

    def memory_in_use(self, generation: int, offset: int, nbytes: int) -> None:
        pass

    def is_used(self, generation: int) -> bool:
        return False


def crowd(settings: StoreSettings) -> None:
    """Many processes at once, each of which says when it is connected, and to which node cache. One
    in three is a rank. What they start is counted in a file, whatever becomes of it."""
    starts = Path(settings.socket_path).parent.parent / "starts"
    python = starts.with_name("python")
    python.write_text(f"""#!/bin/sh\necho $$ >>'{starts}'\nexec '{sys.executable}' "$@"\n""")
    python.chmod(0o755)
    sys.executable = str(python)
    wait()
    children = []
    for number in range(CROWD):
        child = os.fork()
        if not child:
            try:
                one_of_the_crowd(settings, number)
            finally:
                os._exit(0)
        children.append(child)
    sys.stdin.readline()
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def one_of_the_crowd(settings: StoreSettings, number: int) -> None:
    if number % 3 == 0:
        RankLink(settings, engine_id=f"engine{number + 1}", on_memory=Reporter()).start()
        time.sleep(600)
    link = NodeLink(settings, engine_id=f"engine{number}")
    reported = -1
    while True:
        link.poll(0.2)
        if link.client is not None and link.generation > reported:
            reported = link.generation
            report(f"engine{number}", reported, link.client.welcome.pid)
        elif link.client is None:
            time.sleep(0.2)


def write_and_read(settings: StoreSettings) -> None:
    """Goes on whatever becomes of its node caches: dumps prompts that others dump as well, many of
    them with a hole, and loads what is there. Says how many pages it has checked, and how many node
    caches it has lost; a wrong byte ends it."""
    rng = random.Random(os.getpid())
    totals = Counter[str]()
    wait()
    while not told_to_end():
        write_and_read_until_it_is_lost(settings, rng, totals)
    print(totals["checked"], totals["losses"], flush=True)


def write_and_read_until_it_is_lost(
    settings: StoreSettings, rng: random.Random, totals: Counter[str]
) -> None:
    try:
        with engine(settings, f"writer{os.getpid()}/0") as client:
            while not told_to_end():
                totals["checked"] += write_one_and_read_one(client, rng)
    except (NodeUnavailable, OSError):
        totals["losses"] += 1


def write_one_and_read_one(client: Engine, rng: random.Random) -> int:
    now = int(time.time())
    keys = make_keys(f"prompt {now} {rng.randrange(4)}", 5)
    offsets = client.reserve(keys)
    client.fill(keys, offsets)
    blocks = [
        (key, parent)
        for key, parent, offset in zip(keys, [b"", *keys[:-1]], offsets, strict=True)
        if offset >= 0
    ]
    # What follows a hole is written, and waits until it is filled.
    hole = rng.randrange(2)
    for some in (blocks[hole:], blocks[:hole]):
        if some:
            commit = p.Commit(ns=1, keys=[key for key, _ in some], parents=[at for _, at in some])
            client.client.send(commit)
        time.sleep(0.1)
        checked = client.load(make_keys(f"prompt {now - rng.randrange(30)} {rng.randrange(4)}", 5))
    return checked[0]


def told_to_end() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def report(who: str, generation: int, pid: int) -> None:
    os.write(1, f"{who} {generation} {pid}\n".encode())


def wait() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    roles = (hold, copy, fill, knock, intrude, crowd, serve, use, pose, write_and_read)
    what = {each.__name__: each for each in roles}[sys.argv[1]]
    if os.environ.get(BECOME):
        become(os.environ[BECOME])
    what(msgspec.json.decode(sys.argv[2], type=StoreSettings))
