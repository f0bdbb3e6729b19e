"""Clients that get killed: `python -m tests.store.node.children WHAT SETTINGS_JSON`."""

from __future__ import annotations

import os
import socket
import sys

import msgspec

from tests.store.node.support import Engine, engine, make_keys
from ucm.config import StoreSettings
from ucm.store.node import protocol as p


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


def wait() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    what = {"hold": hold, "copy": copy, "intrude": intrude}[sys.argv[1]]
    what(msgspec.json.decode(sys.argv[2], type=StoreSettings))
