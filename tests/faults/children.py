"""Writer processes for the fault tests: `python -m tests.faults.children WHAT STORE ...`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from tests.store.tiers.tier_contract import LARGE, SMALL, dump, make_key, make_namespace, make_page
from ucm.store.tiers.posix.tier import PosixTier

NUM_KEYS = 12
HUGE = make_namespace("huge", page_bytes=32 << 20)
PAGE = make_page(SMALL, "a")


def die_at_every_step(directory: Path, *, direct_io: bool) -> None:
    """Dumps a block into one store after the other, as a process of its own each time, which is
    killed before its nth call into the operating system. Prints what each was about to call."""
    for step in range(1000):
        store = directory / str(step)
        store.mkdir()
        pid = os.fork()
        if pid == 0:
            _kill_before_call(step)
            dump(PosixTier([str(store)], direct_io=direct_io), SMALL, make_key(1), PAGE)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            print("finished", os.WEXITSTATUS(status), flush=True)
            return
    raise AssertionError("a dump does not take 1000 system calls")


def _kill_before_call(step: int) -> None:
    num_calls = 0

    def watch(frame: FrameType, event: str, function: object) -> None:
        nonlocal num_calls
        name = getattr(function, "__name__", "")
        module = getattr(function, "__module__", None)
        touches_files = module == "posix" or name in ("open", "write", "flush", "read")
        if event != "c_call" or not touches_files:
            return
        if num_calls == step:
            os.write(1, f"{name}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        num_calls += 1

    sys.setprofile(watch)


def dump_huge(store: Path) -> None:
    """One dump that takes long enough to be killed in the middle of its write."""
    tier = PosixTier([str(store)])
    page = make_page(HUGE, "a")
    print("ready", flush=True)
    dump(tier, HUGE, make_key(1), page)
    print("done", flush=True)


def dump_keys(store: Path, writer: int, start_s: float) -> None:
    """Dumps all keys with this writer's bytes, starting when other writers start."""
    tier = PosixTier([str(store)])
    page = make_page(LARGE, writer)
    time.sleep(max(0.0, start_s - time.time()))
    for i in range(NUM_KEYS):
        dump(tier, LARGE, make_key(i), page)


if __name__ == "__main__":
    what, store_dir, *rest = sys.argv[1:]
    if what == "die_at_every_step":
        die_at_every_step(Path(store_dir), direct_io=rest == ["direct"])
    elif what == "dump_huge":
        dump_huge(Path(store_dir))
    else:
        dump_keys(Path(store_dir), int(rest[0]), float(rest[1]))
