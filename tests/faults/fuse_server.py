"""The server of a FUSE mount: hands a folder on, as slowly as told. Run by tests/faults/fuse.py.

`python -m tests.faults.fuse_server SETTINGS` (JSON) mounts itself, writes a line about it and then
obeys the lines of its standard input, whose end is its own. It speaks the kernel's protocol over
/dev/fuse, so no libfuse is needed.

Requests are served by as many threads as there are requests: a hung one holds up no other.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys
import threading
import time
from collections import Counter
from typing import NoReturn

from tests.faults.fuse_client import Client
from tests.faults.fuse_folder import MAX_WRITE, Passthrough, libc, opens_past_the_page_cache

# By the kernel's numbers. Others are answered with ENOSYS, and the kernel does without them.
OPERATIONS = {
    1: "lookup",
    2: "forget",
    3: "getattr",
    4: "setattr",
    9: "mkdir",
    10: "unlink",
    11: "rmdir",
    12: "rename",
    13: "link",
    14: "open",
    15: "read",
    16: "write",
    17: "statfs",
    18: "release",
    20: "fsync",
    25: "flush",
    26: "init",
    27: "opendir",
    28: "readdir",
    29: "releasedir",
    35: "create",
    36: "interrupt",
    38: "destroy",
    42: "batch_forget",
    45: "rename2",
}
_NO_ANSWER = ("forget", "batch_forget", "interrupt")
# What a caller of ours thinks of as one operation.
_COUNTED_AS = {"batch_forget": "forget", "rename2": "rename"}

_IN_HEADER = struct.Struct("<IIQQIIIHH")
_OUT_HEADER = struct.Struct("<IiQ")
# The beginning of a read's or write's body: handle, offset, size.
_IO = struct.Struct("<QQI")
_BUFFER_BYTES = MAX_WRITE + 4096
_MNT_DETACH, _UMOUNT_NOFOLLOW, _PR_SET_PDEATHSIG = 2, 8, 1


def mount(path: str) -> int:
    """Mounts a filesystem that the returned descriptor of /dev/fuse serves. Raises OSError."""
    device = os.open("/dev/fuse", os.O_RDWR)
    data = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
    if libc.mount(b"ucm-test", os.fsencode(path), b"fuse", ctypes.c_ulong(0), data.encode()) != 0:
        os.close(device)
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return device


def unmount(path: str) -> None:
    """Now, whoever uses it. Harmless where nothing is mounted."""
    libc.umount2(os.fsencode(path), _MNT_DETACH | _UMOUNT_NOFOLLOW)


class Faults:
    """Who has to wait how long, and who has come."""

    def __init__(self, delays_s: dict[str, float], hang: list[str]) -> None:
        self._delays_s = delays_s
        self._hung = set(hang)
        self._hung_files: set[tuple[str, int]] = set()
        self._failing: dict[str, list[int]] = {}
        self._num_corrupt = 0
        self._slow_s: dict[str, float] = {}
        self._cut: set[str] = set()
        self._calls: Counter[str] = Counter()
        self._changed = threading.Condition()

    def pass_through(self, operation: str, file: int) -> None:
        """Returns when `operation`, about the inode `file`, may happen. It is counted when it
        comes, not when it goes."""
        with self._changed:
            self._calls[operation] += 1
        time.sleep(self._delays_s.get(operation, 0.0) + self._slow_s.get(operation, 0.0))
        with self._changed:
            self._changed.wait_for(
                lambda: operation not in self._hung and (operation, file) not in self._hung_files
            )
            if self._failing.get(operation):
                error = self._failing[operation].pop()
                raise OSError(error, os.strerror(error))

    def count(self, what: str) -> None:
        with self._changed:
            self._calls[what] += 1

    def as_asked(self, operation: str, body: memoryview) -> memoryview:
        """The request that is carried out: of a read or write that is cut, the first half."""
        kind = {"read": "short_reads", "write": "short_writes"}.get(operation)
        with self._changed:
            cuts = kind in self._cut or (operation == "write" and "lost_ends" in self._cut)
        if not cuts:
            return body
        fd, offset, size = _IO.unpack_from(body)
        return memoryview(_IO.pack(fd, offset, max(1, size // 2)) + bytes(body[_IO.size :]))

    def as_answered(self, operation: str, body: memoryview, answer: bytes) -> bytes:
        """What the kernel gets to know of it."""
        if operation == "read":
            return self._as_read(answer)
        with self._changed:
            if operation == "write" and "lost_ends" in self._cut:
                return struct.pack("<II", _IO.unpack_from(body)[2], 0)
        return answer

    def _as_read(self, body: bytes) -> bytes:
        with self._changed:
            if not body or self._num_corrupt == 0:
                return body
            self._num_corrupt -= 1
        middle = len(body) // 2
        return body[:middle] + bytes([body[middle] ^ 16]) + body[middle + 1 :]

    def obey(self, command: str, *words: str) -> dict[str, int]:
        with self._changed:
            if command == "hang" and len(words) == 2:
                self._hung_files.add((words[0], int(words[1])))
            elif command == "hang":
                self._hung.add(words[0])
            elif command == "fail":
                self._failing[words[0]] = [int(words[1])] * int(words[2])
            elif command == "corrupt":
                self._num_corrupt = int(words[0])
            elif command == "slow":
                self._slow_s[words[0]] = float(words[1])
            elif command == "cut":
                self._cut.add(words[0])
            elif command == "release":
                self._num_corrupt = 0
                self._slow_s.clear()
                self._cut.clear()
                self._failing.clear()
                self._hung.clear()
                self._hung_files.clear()
                self._changed.notify_all()
            return dict(self._calls)


class Connection:
    """Reads requests of the kernel and answers them, each in a thread of its own."""

    def __init__(self, device: int, folder: Passthrough, faults: Faults) -> None:
        self._device = device
        self._folder = folder
        self._faults = faults
        self._lock = threading.Lock()
        self._num_waiting = 0

    def start(self) -> None:
        """One thread more that waits for a request."""
        with self._lock:
            self._num_waiting += 1
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                request = os.read(self._device, _BUFFER_BYTES)
            except OSError as error:
                # A request that was taken back; everything else is the end of the mount.
                if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                    continue
                return
            with self._lock:
                self._num_waiting -= 1
                is_last = self._num_waiting == 0
            if is_last:
                self.start()
            self._answer(memoryview(request))
            with self._lock:
                self._num_waiting += 1

    def _answer(self, request: memoryview) -> None:
        _, opcode, unique, node, *_ = _IN_HEADER.unpack_from(request)
        name = OPERATIONS.get(opcode, "")
        body, error = b"", errno.ENOSYS
        if name:
            try:
                counted_as = _COUNTED_AS.get(name, name)
                if name == "open" and opens_past_the_page_cache(request[_IN_HEADER.size :]):
                    self._faults.count("open_direct")
                self._faults.pass_through(counted_as, self._folder.inode(node))
                asked = request[_IN_HEADER.size :]
                act = getattr(self._folder, name)
                body, error = act(node, self._faults.as_asked(name, asked)), 0
                body = self._faults.as_answered(name, asked, body)
            except OSError as failed:
                error = failed.errno or errno.EIO
        if name in _NO_ANSWER:
            return
        header = _OUT_HEADER.pack(_OUT_HEADER.size + len(body), -error, unique)
        try:
            os.writev(self._device, [header, body])
        except OSError as failed:
            # ENOENT: nobody waits for it any more. ENODEV: the mount has gone.
            if failed.errno not in (errno.ENOENT, errno.ENODEV):
                raise


def _end(path: str) -> NoReturn:
    unmount(path)
    # Not by returning: threads may hang for good. The kernel fails what they have not answered.
    os._exit(0)


def _end_with_starter(path: str) -> None:
    """Waits for the signal instead of handling it: a handler in Python runs only once a system call
    that began in the same instant is over, which the next line of input may never be."""
    signal.sigwait({signal.SIGTERM})
    _end(path)


def _die(failed: threading.ExceptHookArgs) -> None:
    """A defect here fails the test, which would else wait for an answer."""
    threading.__excepthook__(failed)
    os._exit(1)


def main(settings: str) -> None:
    wanted = json.loads(settings)
    # Ends with its starter, killed or not: by the signal that the kernel sends then, or by the end
    # of its input, which does not come while a thread of the starter is stuck in this very mount.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != wanted["starter"]:
        return
    threading.excepthook = _die
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    os.umask(0)  # the kernel has applied the caller's
    folder = Passthrough(
        wanted["source"],
        negative_timeout_s=wanted["negative_timeout_s"],
        entry_timeout_s=wanted["entry_timeout_s"],
        client=Client(
            listing_timeout_s=wanted["listing_timeout_s"],
            believes_until_changed=wanted["believes_until_changed"],
        ),
    )
    faults = Faults(wanted["delays_s"], wanted["hang"])
    try:
        device = mount(wanted["path"])
    except OSError as error:
        print(json.dumps({"refused": error.strerror}), flush=True)
        return
    threading.Thread(target=_end_with_starter, args=[wanted["path"]], daemon=True).start()
    Connection(device, folder, faults).start()
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        print(json.dumps(faults.obey(*line.split())), flush=True)
    _end(wanted["path"])


if __name__ == "__main__":
    main(sys.argv[1])
