"""Whom a node cache and its clients believe: their own user, root, and a group that a person names.

Both ends of a connection ask the kernel who is at the other one, as it was when that one connected
or began to listen: user, group and further groups (SO_PEERCRED, SO_PEERGROUPS). Nothing is looked
up by a process's number, which may be another's by then, nor in a user database, which may say
something else than the kernel. Who can't be told is nobody's friend.

A member of the group is trusted with everything that a node cache has: docs/security.md.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ucm.config.settings import StoreSettings
from ucm.errors import ConfigError
from ucm.store.tiers.posix.rights import gid_of

# Python has no name for it. Of as many groups as Python asks for; who has more has to have the
# group as the first one.
_SO_PEERGROUPS: Final = 59
_MAX_BYTES: Final = 1024
_OVERFLOW_GID: Final = Path("/proc/sys/kernel/overflowgid")


@dataclass(frozen=True)
class PeerCredentials:
    """Who is at the other end of a Unix socket, by the kernel's word. `pid` is 0 for a process that
    can't be seen from here."""

    pid: int
    uid: int
    gids: frozenset[int]


@dataclass(frozen=True)
class Trust:
    """`gid`: of the group whose members are trusted like this user; None: nobody's."""

    gid: int | None = None

    def user(self, uid: int) -> bool:
        return uid in (0, os.getuid())

    def peer(self, peer: PeerCredentials) -> bool:
        return self.user(peer.uid) or (self.gid is not None and self.gid in peer.gids)

    def owner(self, info: os.stat_result) -> bool:
        """Of a file. Nobody can give a group something without being in it."""
        return self.user(info.st_uid) or (self.gid is not None and info.st_gid == self.gid)

    def __str__(self) -> str:
        group = "" if self.gid is None else f" and group {self.gid}"
        return f"uid {os.getuid()}, root{group}"


OWN_USER: Final = Trust()


def trust_of(settings: StoreSettings) -> Trust:
    """Raises ConfigError for a group that this machine doesn't know, that stands for any, or that
    this process is not in."""
    if settings.group is None:
        return OWN_USER
    gid = gid_of("node_cache_group", settings.group)
    if gid == _overflow_gid():
        raise ConfigError(
            f"node_cache_group: {settings.group} is what the kernel calls every group that it can't"
            f" name in here: take another one"
        )
    if os.geteuid() != 0 and gid not in {os.getegid(), *os.getgroups()}:
        raise ConfigError(
            f"node_cache_group: uid {os.getuid()} is not in group {settings.group}: put it in, or "
            f"leave out node_cache_group and give this user a node_cache_socket of its own"
        )
    return Trust(gid)


def peer_of(sock: socket.socket) -> PeerCredentials:
    found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("iII", found)
    further: tuple[int, ...] = ()
    # Kernels before 4.13 don't say, and there may be more of them than fit.
    with suppress(OSError):
        groups = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MAX_BYTES)
        further = struct.unpack(f"{len(groups) // 4}I", groups)
    return PeerCredentials(pid, uid, frozenset((gid, *further)))


def _overflow_gid() -> int:
    try:
        return int(_OVERFLOW_GID.read_text())
    except (OSError, ValueError):
        return 65534
