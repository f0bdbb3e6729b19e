"""A folder as the FUSE kernel protocol sees it: what tests/faults/fuse_server.py hands on.

The layout of requests and answers is the kernel's (include/uapi/linux/fuse.h).

Every file and folder that the kernel knows is held open here (O_PATH) from the first lookup to the
forget, and named by that descriptor: a rename, by this mount or behind its back, changes nothing.
Nobody's permissions are checked, and what is made belongs to root.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import threading
import time
from collections import Counter

from tests.faults.fuse_client import Client

_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
_ENTRY = struct.Struct("<QQQQII")
_SETATTR = struct.Struct("<IIQQQQQQIIIIIIII")
_DIRENT = struct.Struct("<QQII")
_INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")

MAX_WRITE = 1 << 20
# ASYNC_READ, BIG_WRITES, AUTO_INVAL_DATA, ASYNC_DIO, PARALLEL_DIROPS (a hung lookup holds up no
# other in its folder), MAX_PAGES. Not READDIRPLUS: a listing must not repair remembered names.
_FLAGS = 1 << 0 | 1 << 5 | 1 << 12 | 1 << 15 | 1 << 18 | 1 << 22
_SET_MODE, _SET_UID, _SET_GID, _SET_SIZE, _SET_ATIME, _SET_MTIME = (1 << i for i in range(6))
_SET_ATIME_NOW, _SET_MTIME_NOW = 1 << 7, 1 << 8
# What the kernel has done with a name, or does to the data: the descriptors here are buffered.
_NOT_FOR_OPEN = os.O_NOFOLLOW | os.O_DIRECT | os.O_APPEND | os.O_NOCTTY

libc = ctypes.CDLL(None, use_errno=True)


def opens_past_the_page_cache(body: memoryview) -> bool:
    """Of the body of an open."""
    (flags,) = struct.unpack_from("<I", body)
    return bool(flags & os.O_DIRECT)


class Nodes:
    """Files and folders that the kernel knows by number, each with a descriptor that holds it."""

    def __init__(self, source: str) -> None:
        self._lock = threading.Lock()
        self._fds = {1: os.open(source, os.O_PATH)}
        self._num_lookups: Counter[int] = Counter()
        self._ids: dict[tuple[int, int], int] = {}
        self._last = 1

    def fd(self, node: int) -> int:
        try:
            return self._fds[node]
        except KeyError:
            raise OSError(errno.ESTALE, "forgotten") from None

    def add(self, fd: int) -> tuple[int, os.stat_result]:
        """Takes over `fd`; a node that is known already counts one lookup more."""
        status = os.fstat(fd)
        identity = (status.st_dev, status.st_ino)
        with self._lock:
            node = self._ids.get(identity)
            if node is None:
                node = self._last = self._last + 1
                self._ids[identity], self._fds[node] = node, fd
            else:
                os.close(fd)
            self._num_lookups[node] += 1
        return node, status

    def forget(self, node: int, num_lookups: int) -> None:
        with self._lock:
            self._num_lookups[node] -= num_lookups
            if node == 1 or self._num_lookups[node] > 0:
                return
            fd = self._fds.pop(node)
            status = os.fstat(fd)
            del self._num_lookups[node], self._ids[(status.st_dev, status.st_ino)]
            os.close(fd)


class Passthrough:
    """The operations: each takes the node it is about and the request's body, returns the answer's
    body, and raises OSError."""

    def __init__(
        self,
        source: str,
        *,
        negative_timeout_s: float,
        entry_timeout_s: float,
        client: Client,
    ) -> None:
        self._nodes = Nodes(source)
        self._client = client
        self._negative_timeout_s = negative_timeout_s
        self._entry_timeout_s = entry_timeout_s
        # The descriptor of an open folder is its handle; the listing is made when it is first read.
        self._listings: dict[int, list[tuple[int, int, bytes]]] = {}

    def inode(self, node: int) -> int:
        """0 for what is about no file."""
        return os.fstat(self._nodes.fd(node)).st_ino if node else 0

    def init(self, node: int, body: memoryview) -> bytes:
        _, minor, readahead, flags = struct.unpack_from("<IIII", body)
        most_pages = MAX_WRITE // 4096
        return _INIT_OUT.pack(
            7, min(minor, 38), readahead, flags & _FLAGS, 64, 64, MAX_WRITE, 1, most_pages, 0, 0
        )

    def destroy(self, node: int, body: memoryview) -> bytes:
        return b""

    # -- names -----------------------------------------------------------------------------

    def lookup(self, node: int, body: memoryview) -> bytes:
        name, folder = _names(body)[0], self._nodes.fd(node)
        try:
            if self._client.believes_absent(node, name, os.fstat(folder)):
                raise FileNotFoundError(errno.ENOENT, "as it was")
            return self._entry(name, folder)
        except FileNotFoundError:
            self._client.found_absent(node, name, os.fstat(folder))
            if not self._negative_timeout_s:
                raise
            # Node 0: there is none, and that can be remembered.
            return _ENTRY.pack(0, 0, *_valid(self._negative_timeout_s, 0.0)) + bytes(_ATTR.size)

    def forget(self, node: int, body: memoryview) -> bytes:
        self._nodes.forget(node, *struct.unpack_from("<Q", body))
        return b""

    def batch_forget(self, _: int, body: memoryview) -> bytes:
        (count,) = struct.unpack_from("<I4x", body)
        for i in range(count):
            self._nodes.forget(*struct.unpack_from("<QQ", body, 8 + 16 * i))
        return b""

    def interrupt(self, node: int, body: memoryview) -> bytes:
        """Ignored, as a storage server would: who waits for an answer waits on."""
        return b""

    def mkdir(self, node: int, body: memoryview) -> bytes:
        (mode,) = struct.unpack_from("<I", body)
        (name,) = _names(body[8:])
        os.mkdir(name, mode & 0o7777, dir_fd=self._nodes.fd(node))
        return self._entry(name, self._nodes.fd(node))

    def unlink(self, node: int, body: memoryview) -> bytes:
        os.unlink(_names(body)[0], dir_fd=self._nodes.fd(node))
        return b""

    def rmdir(self, node: int, body: memoryview) -> bytes:
        os.rmdir(_names(body)[0], dir_fd=self._nodes.fd(node))
        return b""

    def rename(self, node: int, body: memoryview) -> bytes:
        (parent,) = struct.unpack_from("<Q", body)
        return self._rename(node, parent, 0, *_names(body[8:]))

    def rename2(self, node: int, body: memoryview) -> bytes:
        parent, flags = struct.unpack_from("<QI", body)
        return self._rename(node, parent, flags, *_names(body[16:]))

    def _rename(self, node: int, parent: int, flags: int, old: bytes, new: bytes) -> bytes:
        fds = self._nodes.fd(node), self._nodes.fd(parent)
        if libc.renameat2(fds[0], old, fds[1], new, ctypes.c_uint(flags)) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return b""

    def link(self, node: int, body: memoryview) -> bytes:
        (old,) = struct.unpack_from("<Q", body)
        (name,) = _names(body[8:])
        os.link(_by_fd(self._nodes.fd(old)), name, dst_dir_fd=self._nodes.fd(node))
        return self._entry(name, self._nodes.fd(node))

    def _entry(self, name: bytes, parent_fd: int) -> bytes:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=parent_fd)
        node, status = self._nodes.add(fd)
        # Attributes are never remembered: a size that changed elsewhere is another fault.
        return _ENTRY.pack(node, 0, *_valid(self._entry_timeout_s, 0.0)) + _attributes(status)

    # -- attributes ------------------------------------------------------------------------

    def getattr(self, node: int, body: memoryview) -> bytes:
        return bytes(16) + _attributes(os.fstat(self._nodes.fd(node)))

    def setattr(self, node: int, body: memoryview) -> bytes:
        (valid, _, _, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _) = (
            _SETATTR.unpack_from(body)
        )
        path = _by_fd(self._nodes.fd(node))
        status = os.stat(path)
        if valid & _SET_MODE:
            os.chmod(path, stat.S_IMODE(mode))
        if valid & (_SET_UID | _SET_GID):
            os.chown(path, uid if valid & _SET_UID else -1, gid if valid & _SET_GID else -1)
        if valid & _SET_SIZE:
            os.truncate(path, size)
        if valid & (_SET_ATIME | _SET_MTIME):
            now = time.time_ns()
            times = [status.st_atime_ns, status.st_mtime_ns]
            if valid & _SET_ATIME:
                times[0] = now if valid & _SET_ATIME_NOW else atime * 10**9 + atime_ns
            if valid & _SET_MTIME:
                times[1] = now if valid & _SET_MTIME_NOW else mtime * 10**9 + mtime_ns
            os.utime(path, ns=(times[0], times[1]))
        return self.getattr(node, body)

    def statfs(self, node: int, body: memoryview) -> bytes:
        of = os.statvfs(self._nodes.fd(1))
        numbers = of.f_blocks, of.f_bfree, of.f_bavail, of.f_files, of.f_ffree
        return struct.pack("<5Q4I24x", *numbers, of.f_bsize, of.f_namemax, of.f_frsize, 0)

    # -- open files ------------------------------------------------------------------------

    def open(self, node: int, body: memoryview) -> bytes:
        (flags,) = struct.unpack_from("<I", body)
        fd = os.open(_by_fd(self._nodes.fd(node)), flags & ~_NOT_FOR_OPEN)
        return struct.pack("<QII", fd, 0, 0)

    def create(self, node: int, body: memoryview) -> bytes:
        flags, mode = struct.unpack_from("<II", body)
        (name,) = _names(body[16:])
        flags = flags & ~_NOT_FOR_OPEN | os.O_CREAT
        fd = os.open(name, flags, mode & 0o7777, dir_fd=self._nodes.fd(node))
        # Of the file and not of the name, which somebody else may have taken meanwhile.
        child, status = self._nodes.add(os.open(_by_fd(fd), os.O_PATH))
        entry = _ENTRY.pack(child, 0, *_valid(self._entry_timeout_s, 0.0)) + _attributes(status)
        return entry + struct.pack("<QII", fd, 0, 0)

    def read(self, node: int, body: memoryview) -> bytes:
        fd, offset, size = struct.unpack_from("<QQI", body)
        return os.pread(fd, size, offset)

    def write(self, node: int, body: memoryview) -> bytes:
        fd, offset, size = struct.unpack_from("<QQI", body)
        return struct.pack("<II", os.pwrite(fd, body[40 : 40 + size], offset), 0)

    def flush(self, node: int, body: memoryview) -> bytes:
        return b""

    def fsync(self, node: int, body: memoryview) -> bytes:
        fd, only_data = struct.unpack_from("<QI", body)
        os.fdatasync(fd) if only_data & 1 else os.fsync(fd)
        return b""

    def release(self, node: int, body: memoryview) -> bytes:
        os.close(*struct.unpack_from("<Q", body))
        return b""

    def opendir(self, node: int, body: memoryview) -> bytes:
        fd = os.open(_by_fd(self._nodes.fd(node)), os.O_RDONLY | os.O_DIRECTORY)
        return struct.pack("<QII", fd, 0, 0)

    def readdir(self, node: int, body: memoryview) -> bytes:
        fd, offset, size = struct.unpack_from("<QQI", body)
        if offset == 0:
            self._listings[fd] = self._client.listing(node, lambda: _listing(fd))
        answer = b""
        for i, (ino, kind, name) in enumerate(self._listings[fd][offset:], start=offset + 1):
            record = _DIRENT.pack(ino, i, len(name), kind) + name
            record += bytes(-len(record) % 8)
            if len(answer) + len(record) > size:
                break
            answer += record
        return answer

    def releasedir(self, node: int, body: memoryview) -> bytes:
        (fd,) = struct.unpack_from("<Q", body)
        self._listings.pop(fd, None)
        os.close(fd)
        return b""


def _names(body: memoryview) -> list[bytes]:
    return bytes(body).split(b"\0")[:-1]


def _by_fd(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def _valid(entry_s: float, attributes_s: float) -> tuple[int, int, int, int]:
    return int(entry_s), int(attributes_s), int(entry_s % 1 * 1e9), int(attributes_s % 1 * 1e9)


def _attributes(of: os.stat_result) -> bytes:
    times = of.st_atime_ns, of.st_mtime_ns, of.st_ctime_ns
    seconds, nanoseconds = [t // 10**9 for t in times], [t % 10**9 for t in times]
    owner = of.st_mode, of.st_nlink, of.st_uid, of.st_gid, 0, of.st_blksize, 0
    return _ATTR.pack(of.st_ino, of.st_size, of.st_blocks, *seconds, *nanoseconds, *owner)


def _listing(fd: int) -> list[tuple[int, int, bytes]]:
    kinds = {True: stat.S_IFDIR >> 12, False: stat.S_IFREG >> 12}
    with os.scandir(fd) as entries:
        return [
            (entry.inode(), kinds[entry.is_dir(follow_symlinks=False)], os.fsencode(entry.name))
            for entry in entries
        ]
