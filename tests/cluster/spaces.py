"""Servers and nodes of a filesystem on this machine, in a network of their own: ports and addresses
are nobody else's, and what runs there is known by it.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.cluster.nodes import Mounted, Node
from tests.cluster.sshfs import agent


@dataclass
class Space:
    """`server` is the node that servers are started on; `folder` everybody's."""

    folder: str
    server: Node
    _inside: Sequence[str]
    _stack: ExitStack

    def mounted(self, name: str, mount: str) -> Mounted:
        """A node. In `mount`, {path} is where it mounts and {name} which node it is."""
        node = self._stack.enter_context(agent(name, tuple(self._inside)))
        path = f"{self.folder}/{name}"
        os.mkdir(path)
        unmount = partial(node.run, f"umount -l {path}")
        command = mount.format(path=path, name=name)
        mounted = Mounted(node, path, partial(node.run, command), unmount, self.folder)
        mounted.mount()
        self._stack.callback(unmount)
        return mounted

    def until(self, holds: str, timeout_s: int = 30) -> None:
        """Waits until this command of the server's succeeds."""
        tries = f"for i in $(seq {timeout_s}); do {holds} && exit; sleep 1; done; exit 1"
        self.server.run(tries, timeout_s=3.0 * timeout_s)


@contextmanager
def space(address: str, states: Sequence[str] = ()) -> Iterator[Space]:
    """`states` are folders of this machine that servers keep theirs in: they get empty ones."""
    with ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="ucm-cluster-", ignore_cleanup_errors=True)
        )
        server = stack.enter_context(agent("server", ("unshare", "--net")))
        for state in states:
            server.run(f"mkdir -p {state} && mount -t tmpfs tmpfs {state}")
        server.run(f"ip link set lo up && ip addr add {address}/32 dev lo")
        stack.callback(_end, server)
        inside = ("nsenter", f"--net=/proc/{server.run('echo $PPID').strip()}/ns/net")
        yield Space(folder, server, inside, stack)


def _end(server: Node) -> None:
    """What has been started has this network, and nothing else has."""
    own = server.run("readlink /proc/self/ns/net").strip()
    agent_pid = int(server.run("echo $PPID"))
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.readlink(path / "ns" / "net") == own and int(path.name) != agent_pid:
                os.kill(int(path.name), signal.SIGKILL)
