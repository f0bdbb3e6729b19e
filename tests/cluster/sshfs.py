"""sshfs, mounted twice on this machine. Each node has a mount namespace of its own, and its client
speaks to an SFTP server directly, in place of ssh: no daemon, no key, no port.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from tests.cluster.nodes import Cluster, Fault, Mounted, Node

ROOT = Path(__file__).parents[2]
FAULTS = ("server", "killed")
# pytest makes absolute links, which newer versions refuse.
_LINKS = "$(sshfs -h 2>&1 | grep -q no_contain_symlinks && echo ,no_contain_symlinks)"
_SERVER = "/usr/lib/openssh/sftp-server"


@contextmanager
def agent(name: str, prefix: tuple[str, ...] = ()) -> Iterator[Node]:
    """A node on this machine, in a mount namespace of its own."""
    command = [*prefix, "unshare", "--mount", "--propagation", "private"]
    command += [sys.executable, "-m", "tests.cluster.agent"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        node = Node(name, process.stdin.fileno(), process.stdout.fileno())
        try:
            node.wait_ready()
            yield node
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ucm-cluster-")))
        exported, disk = folder / "exported", folder / "server"
        exported.mkdir()
        disk.write_text(f'#!/bin/sh\necho $$ >> "{folder}/pids"\nexec {_SERVER}\n')
        disk.chmod(0o755)
        mounted = []
        for name in ("A", "B"):
            node = stack.enter_context(agent(name))
            path = folder / name
            path.mkdir()
            mount = f"sshfs -o reconnect,ssh_command={disk}{_LINKS} anyhost:{exported} {path}"
            unmount = partial(node.run, f"umount -l {path}")
            mounted.append(Mounted(node, str(path), partial(node.run, mount), unmount, str(folder)))
            mounted[-1].mount()
            stack.callback(unmount)
        yield Cluster("sshfs", *mounted, {"server": _stopped(folder), "killed": _killed(folder)})


def _servers(folder: Path, number: signal.Signals) -> None:
    for line in (folder / "pids").read_text().split():
        # A number may be another process's by now.
        with suppress(FileNotFoundError, ProcessLookupError):
            if _SERVER in Path(f"/proc/{line}/cmdline").read_text():
                os.kill(int(line), number)


def _stopped(folder: Path) -> Fault:
    return Fault(
        partial(_servers, folder, signal.SIGSTOP), partial(_servers, folder, signal.SIGCONT)
    )


def _killed(folder: Path) -> Fault:
    """The client starts another one."""
    return Fault(partial(_servers, folder, signal.SIGKILL), lambda: None)
