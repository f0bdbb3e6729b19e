"""Clients that get killed: `python -m tests.store.node.children WHAT SETTINGS_JSON`."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

import msgspec
import pytest

from tests.store.node.support import PAGE_BYTES, Engine, engine, make_keys
from ucm.config import StoreSettings
from ucm.errors import ConfigError
from ucm.store.node import protocol as p
from ucm.store.node.link import MemoryTaker, NodeLink, RankLink

CROWD = 100


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
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    wait()
    for role in ("scheduler", "worker"):
        with pytest.raises(ConfigError) as refused:
            Engine(settings, "x/0", role)
        print(refused.value, flush=True)


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


def report(who: str, generation: int, pid: int) -> None:
    os.write(1, f"{who} {generation} {pid}\n".encode())


def wait() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    what = {each.__name__: each for each in (hold, copy, fill, knock, intrude, crowd)}[sys.argv[1]]
    what(msgspec.json.decode(sys.argv[2], type=StoreSettings))
