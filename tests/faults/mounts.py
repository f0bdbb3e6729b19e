"""Real filesystems with real faults, mounted for one test.

A test marked `own_mounts` runs in a thread with a mount namespace of its own: its mounts are seen
by nobody else and vanish with the thread, however the test ends. Needs root (CAP_SYS_ADMIN);
skipped otherwise.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

import pytest

P = ParamSpec("P")

_libc = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNS = 0x00020000
_MNT_DETACH = 2
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18


def own_mounts(test: Callable[P, None]) -> Callable[P, None]:
    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        def body() -> None:
            _unshare_mounts()
            test(*args, **kwargs)

        in_thread(body)

    return run


def in_thread(body: Callable[[], None]) -> None:
    """Runs `body` in a thread, whose kernel attributes may be changed without harm to others."""
    raised: list[BaseException] = []

    def guarded() -> None:
        try:
            body()
        except BaseException as error:  # noqa: BLE001 (raised again in the caller's thread)
            raised.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def mount_tmpfs(path: Path, *, size_bytes: int, max_inodes: int = 0) -> None:
    """A disk that is full after `size_bytes`, or after `max_inodes` files (0: any number)."""
    path.mkdir(exist_ok=True)
    _mount("tmpfs", path, kind="tmpfs", data=f"size={size_bytes},nr_inodes={max_inodes}")


def mount_ramfs(path: Path) -> None:
    """A filesystem that refuses O_DIRECT."""
    path.mkdir(exist_ok=True)
    _mount("ramfs", path, kind="ramfs")


def mount_read_only(source: Path, path: Path) -> None:
    """`source`, mounted a second time without the right to write."""
    path.mkdir(exist_ok=True)
    _mount(str(source), path, flags=_MS_BIND)
    _mount("none", path, flags=_MS_BIND | _MS_REMOUNT | _MS_RDONLY)


def mount_again(source: Path, path: Path) -> None:
    """`source`, seen at `path` as well."""
    path.mkdir(exist_ok=True)
    _mount(str(source), path, flags=_MS_BIND)


def unmount(path: Path) -> None:
    """Leaves the directory below, as it was."""
    if _libc.umount2(os.fsencode(path), 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))


def take_away(path: Path) -> None:
    """As `unmount`, also while it is used: what is open stays, what comes meets what lies below."""
    if _libc.umount2(os.fsencode(path), _MNT_DETACH) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))


def without_privileges(body: Callable[[], None]) -> None:
    """Runs `body` with the file access of a user that owns nothing. Only root can become one."""

    def run() -> None:
        if os.geteuid() == 0:
            # Of this thread alone, and with it go the capabilities that overrule permissions.
            _libc.setfsuid(65534)
            _libc.setfsgid(65534)
        body()

    in_thread(run)


def _unshare_mounts() -> None:
    if _libc.unshare(_CLONE_NEWNS) != 0:
        pytest.skip(f"no mount namespace without root: {os.strerror(ctypes.get_errno())}")
    _mount("none", Path("/"), flags=_MS_REC | _MS_PRIVATE)


def _mount(source: str, path: Path, *, kind: str = "", flags: int = 0, data: str = "") -> None:
    result = _libc.mount(
        source.encode(),
        os.fsencode(path),
        kind.encode() or None,
        ctypes.c_ulong(flags),
        data.encode() or None,
    )
    if result != 0:
        pytest.skip(f"can't mount {kind or source} here: {os.strerror(ctypes.get_errno())}")
