"""A mount with the faults of shared storage: names remembered as missing, slow and hung operations.

    with mount_fuse(source, path, negative_timeout_s=30.0) as mount:
        ...
        mount.hang("write")

`path` shows `source` through FUSE, to every process of the machine. What is done in `source` itself
is what another node does: the kernel learns nothing of it. Needs root and /dev/fuse; skipped
otherwise.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.fuse_server import OPERATIONS, unmount

_ROOT = Path(__file__).parents[2]


@functools.cache
def _why_no_fuse() -> str:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"can't open /dev/fuse: {error.strerror}"
    return "" if os.geteuid() == 0 else "can't mount without root"


# So that a test does not start its servers first. A mount that is refused all the same (a container
# without CAP_SYS_ADMIN) skips the test in mount_fuse.
needs_fuse = pytest.mark.skipif(bool(_why_no_fuse()), reason=_why_no_fuse() or "has FUSE")


class FuseMount:
    """What the server of a mount has been asked, and what it shall not answer for now.

    Operations are named as in `fuse_server.OPERATIONS`, batch_forget counted as forget and rename2
    as rename. Thread-safe. What waits for the server can't be interrupted, not by SIGKILL either,
    as with a hard NFS mount. The kernel lets callers hold a folder's lock while the server renames,
    creates, links or unlinks in it: others wait then for any new name of that folder.
    """

    def __init__(self, source: Path, path: Path, process: subprocess.Popen[str]) -> None:
        self.source = source
        self.path = path
        self._process = process
        self._lock = threading.Lock()

    @property
    def calls(self) -> Counter[str]:
        """By operation, counted when they come: a hung one is in it. What the kernel answers by
        itself is not. `open_direct` are those of the opens that bypass the page cache."""
        return Counter(self._ask("calls"))

    def hang(self, operation: str, *, file: Path | None = None) -> None:
        """From now on such operations wait for `release`, and happen only then.

        With `file`, those about that very file: not those about what gets its name later.
        """
        assert operation in OPERATIONS.values(), operation
        self._ask("hang", operation, *([] if file is None else [str(file.stat().st_ino)]))

    def freeze(self) -> None:
        """Until the end no operation is answered, and who waits for one can be killed, as with an
        NFS server that is gone. Nothing else can be asked of this mount from now on."""
        self._process.send_signal(signal.SIGSTOP)
        # Only what no thread of the server has taken yet can still be taken back by a kill.
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)

    def fail(self, operation: str, error: int, *, times: int = 10_000) -> None:
        """The next `times` such operations don't happen, and give this errno."""
        assert operation in OPERATIONS.values(), operation
        self._ask("fail", operation, str(error), str(times))

    def corrupt_reads(self, *, times: int = 10_000) -> None:
        """The next `times` reads give a flipped bit in their middle; the file below is good."""
        self._ask("corrupt", str(times))

    def slow(self, operation: str, delay_s: float) -> None:
        """Such operations take so much longer."""
        assert operation in OPERATIONS.values(), operation
        self._ask("slow", operation, str(delay_s))

    def short_reads(self) -> None:
        """Reads bring the first half of what was asked for."""
        self._ask("cut", "short_reads")

    def short_writes(self) -> None:
        """Writes take the first half, and say so."""
        self._ask("cut", "short_writes")

    def lost_ends(self) -> None:
        """Writes take the first half, and say that it was all: what is written is cut short."""
        self._ask("cut", "lost_ends")

    def release(self) -> None:
        """Ends every fault that was asked for here, of those that wait and of those to come."""
        self._ask("release")

    def kill_server(self) -> None:
        """The storage is gone: who waits for it gets an error, and every later use is one."""
        self._process.kill()
        self._process.wait()

    def _ask(self, *words: str) -> dict[str, int]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        with self._lock:
            stdin.write(" ".join(words) + "\n")
            stdin.flush()
            answer: dict[str, int] = json.loads(stdout.readline())
        return answer


@contextmanager
def mount_fuse(
    source: Path,
    path: Path,
    *,
    negative_timeout_s: float = 0.0,
    entry_timeout_s: float = 0.0,
    listing_timeout_s: float = 0.0,
    believes_until_changed: bool = False,
    delays_s: Mapping[str, float] | None = None,
    hang: Collection[str] = (),
) -> Iterator[FuseMount]:
    """Mounts `source` at `path`, both made if need be, while the context lasts.

    `negative_timeout_s`: how long the kernel remembers that a name is missing. `entry_timeout_s`:
    how long it trusts a name that is there (attributes are asked for each time).
    `listing_timeout_s`, `believes_until_changed`: as in `fuse_client.py`. `delays_s`: how
    much longer each operation of a name takes. `hang`: operations that wait for `release`.

    Leave it in the thread that entered it: the server goes when that thread does.
    """
    delays_s = delays_s or {}
    assert {*delays_s, *hang} <= set(OPERATIONS.values()), (delays_s, hang)
    source.mkdir(exist_ok=True)
    path.mkdir(exist_ok=True)
    mounted_at = str(path.resolve())
    settings = {
        "source": str(source.resolve()),
        "path": mounted_at,
        "negative_timeout_s": negative_timeout_s,
        "entry_timeout_s": entry_timeout_s,
        "listing_timeout_s": listing_timeout_s,
        "believes_until_changed": believes_until_changed,
        "delays_s": dict(delays_s),
        "hang": list(hang),
        "starter": os.getpid(),
    }
    with subprocess.Popen(
        [sys.executable, "-m", "tests.faults.fuse_server", json.dumps(settings)],
        cwd=_ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Ctrl-C is for the test, which then ends this. A session of its own would also get its
        # share of the cores apart, and next to busy servers too late.
        process_group=0,
    ) as process:
        try:
            yield _mounted(FuseMount(source, path, process))
        finally:
            # First: what hangs in the server, if it does not answer, fails with it.
            unmount(mounted_at)
            process.kill()


def _mounted(mount: FuseMount) -> FuseMount:
    stdout = mount._process.stdout
    assert stdout is not None
    line = stdout.readline()
    assert line, f"the FUSE server ended with {mount._process.wait()}"
    refused = json.loads(line).get("refused")
    if refused:
        pytest.skip(f"can't mount FUSE here: {refused}")
    return mount
