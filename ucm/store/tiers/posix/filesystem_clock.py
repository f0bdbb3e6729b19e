"""The clock that files' times are by: that of the filesystem, which may be a server's."""

from __future__ import annotations

import os
import time
from collections import deque

from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.os_errors import unless_full

_MAX_READINGS = 16
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class FilesystemClock:
    """For one thread."""

    def __init__(self) -> None:
        # How far it is ahead of this process's monotonic clock, each rather too little.
        self._ahead_ns: deque[int] = deque(maxlen=_MAX_READINGS)

    @property
    def is_known(self) -> bool:
        """Else `now_ns` is by this machine's clock."""
        return bool(self._ahead_ns)

    def now_ns(self) -> int:
        """Never later than it is there, once it is known."""
        ahead_ns = max(self._ahead_ns, default=time.time_ns() - time.monotonic_ns())
        return ahead_ns + time.monotonic_ns()

    def read(self, changed_ns: int) -> None:
        """Something there has this time of change, and was changed just now."""
        self._ahead_ns.append(changed_ns - time.monotonic_ns())

    def ask(self, directory: int) -> None:
        """Makes an empty file in an open directory, and removes it. Raises OSError."""
        # A name that a sweep knows, should this process be killed here.
        name = os.path.basename(paths.temp_path(f"/{paths.RECLAIM_LEASE}"))
        with unless_full():
            fd = os.open(name, _NEW, 0o600, dir_fd=directory)
            try:
                self.read(os.fstat(fd).st_mtime_ns)
            finally:
                os.close(fd)
                os.unlink(name, dir_fd=directory)
            return
        # Needs no room.
        os.utime(directory)
        self.read(os.fstat(directory).st_ctime_ns)
