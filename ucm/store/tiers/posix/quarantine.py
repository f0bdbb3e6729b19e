"""Damaged files leave their place, and no node takes many of them away.

What one node reads is not what everybody reads: a bad cable, a bad page of memory or a bad mount
makes every file look damaged here, and good elsewhere. So a file is moved only when it was read
bad twice, the second time past the page cache, and only `per_minute` times a minute. A file that
stays is absent for this read, like one that was moved.
"""

from __future__ import annotations

import os

from ucm.errors import TierError
from ucm.store.blocks.blockfile import BlockId
from ucm.store.tiers.per_minute import PerMinute
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.backend import Backend


class Quarantine:
    """Thread-safe. One for all backends of a tier."""

    def __init__(self, per_minute: int) -> None:
        self._moves = PerMinute(per_minute)

    def move(self, seen: os.stat_result, path: str, backend: Backend, block: BlockId) -> str:
        """Moves what was `seen` at `path` aside, if that is allowed now. Returns what was done, for
        people."""
        if not self._moves.may():
            return (
                f"left in its place: {self._moves.most} files were moved aside within a minute, so "
                f"it may be this node that reads badly; look at its memory, network and mount"
            )
        return move_aside(seen, path, backend, block)


def forget_cached(fd: int) -> None:
    """The next read of the file asks storage, not this machine's page cache."""
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError:
        return  # a filesystem without it: the read goes as it goes


def move_aside(seen: os.stat_result, path: str, backend: Backend, block: BlockId) -> str:
    """Moves what was `seen` at `path`, damaged or no file at all, to quarantine. Returns what was
    done, for people.

    A writer may put a good file in its place between the comparison and the rename. That block is
    then lost, which costs one recomputation.
    """
    target = paths.quarantine_path(backend.path, block.fingerprint, block.key)
    try:
        if not os.path.samestat(seen, os.lstat(path)):
            return "already replaced"
        # Neither out of another tree nor into one.
        backend.check_dirs(os.path.dirname(path))
        backend.make_dirs(os.path.dirname(target))
        os.rename(path, target)
    except FileNotFoundError:
        backend.forget_dirs()
        return "already moved aside"
    except TierError as error:
        return f"can't be moved aside: {error}"
    except OSError as error:
        return f"can't be moved aside: {error.strerror}"
    return f"moved to {target}"
