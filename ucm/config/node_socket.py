"""Where a node cache is found when nobody says so, and what may be said about it."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from typing import Final

import msgspec

from ucm.config.convert import show
from ucm.errors import ConfigError

# What a node cache and its clients speak (ucm/store/node/protocol.py). Part of a node cache's
# default name, so that an upgrade doesn't meet one that it can't talk to.
NODE_PROTOCOL: Final = 7

# sun_path holds 108 bytes on Linux and 104 elsewhere, with a NUL at its end.
SOCKET_PATH_MAX_BYTES: Final = 103

_MAX_SQUATTED: Final = 8


def default_socket_path(pipeline: tuple[str, ...], places: tuple[str, ...]) -> str:
    """One node cache per user, pipeline and places where it stores. Engines of one node find it
    without being told, as long as they see the same directory for temporary files. Not in the
    directory of a login session, which a logout removes and the node cache survives."""
    identity = msgspec.json.encode([pipeline, places])
    name = hashlib.sha256(identity).hexdigest()[:16]
    directory = os.path.join(tempfile.gettempdir(), f"ucm-{os.getuid()}")
    # Anybody may have made it first. Everybody of this user steps around in the same way.
    others = (f"{directory}-{number}" for number in range(1, _MAX_SQUATTED + 1))
    own = next((each for each in (directory, *others) if _may_be_own(each)), directory)
    return os.path.join(own, f"{name}.v{NODE_PROTOCOL}.sock")


def _may_be_own(directory: str) -> bool:
    """Whether a directory is missing, or this user's alone."""
    try:
        info = os.lstat(directory)
    except OSError:
        return True
    is_private = not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and is_private


def check_socket_path(path: str, *, source: str, path_of_store: str) -> None:
    where = f"{source}: {path_of_store}.node_cache_socket"
    if not os.path.isabs(path) or "\0" in path:
        raise ConfigError(f"{where}: expected an absolute path, got {show(path)}")
    if not os.path.basename(path):
        raise ConfigError(f"{where}: expected a socket's path, not a directory's, got {show(path)}")
    num_bytes = len(os.fsencode(path))
    if num_bytes > SOCKET_PATH_MAX_BYTES:
        raise ConfigError(
            f"{where}: {show(path)} has {num_bytes} bytes, a socket's path at most"
            f" {SOCKET_PATH_MAX_BYTES}: set a shorter one"
        )
