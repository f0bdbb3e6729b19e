"""A store that is swept, with what writers have left in it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event

from tests.store.tiers.tier_contract import dump, make_key, make_namespace, make_page
from ucm.store.processes import Process, is_running, this_process
from ucm.store.tiers.posix import paths, writers
from ucm.store.tiers.posix.sweep import Sweep, Swept
from ucm.store.tiers.posix.tier import PosixTier

HOUR_S = 3600.0
SMALL = make_namespace("model", page_bytes=4096)
HERE = this_process()
ELSEWHERE = Process("node2", "f" * 16, 1, 1)
SETTLE_S = 0.01


def temp_name(target: str, writer: Process) -> str:
    word = writers.writer_name(writer, now_s=1_700_000_000, random=random.randbytes(8).hex())
    directory, name = os.path.split(target)
    return f"{directory}/.{name}.{word}.tmp"


def dead_writer() -> Process:
    """One that has run here, and ended."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        began = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])
        writer = Process(HERE.host, HERE.world, process.pid, began)
        assert is_running(writer.pid, writer.began) is True
        process.communicate(b"\n")
    return writer


class Told(Event):
    """Is told of what a sweep waits for, in place of waiting."""

    def __init__(self, waits: Callable[[float], object]) -> None:
        super().__init__()
        self._waits = waits

    def wait(self, timeout: float | None = None) -> bool:
        self._waits(timeout or 0.0)
        return False


class Store:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tier = PosixTier([str(directory)])
        dump(self.tier, SMALL, make_key(1), make_page(SMALL, "a"))
        self.good = self.files()

    def files(self) -> set[str]:
        """Links and all."""
        return {
            os.path.join(directory, name)
            for directory, _, names in os.walk(self.directory)
            for name in names
        }

    def targets(self) -> list[str]:
        """Of every kind of file that is written and then renamed."""
        return [
            paths.backend_id_path(str(self.directory)),
            paths.manifest_path(str(self.directory), SMALL.fingerprint),
            paths.block_path(str(self.directory), SMALL.fingerprint, make_key(1)),
            paths.block_path(str(self.directory), SMALL.fingerprint, make_key(2)),
        ]

    def leave(self, writer: Process, *, age_s: float = 0.0) -> set[str]:
        """One file for each target."""
        left = set()
        for target in self.targets():
            name = temp_name(target, writer)
            os.makedirs(os.path.dirname(name), exist_ok=True)
            Path(name).write_bytes(b"x" * 100)
            now_s = os.stat(name).st_mtime
            os.utime(name, (now_s - age_s, now_s - age_s))
            left.add(name)
        return left


def swept(store: Store, **changes: object) -> Swept:
    done = Sweep(**made(store, **changes)).run()  # type: ignore[arg-type]
    assert done is not None
    return done


def made(store: Store, **changes: object) -> dict[str, object]:
    wanted: dict[str, object] = {
        "path": str(store.directory),
        "stale_s": HOUR_S,
        "dirs_per_s": 1e6,
        "stop": Event(),
        "settle_s": SETTLE_S,
    }
    return wanted | changes
