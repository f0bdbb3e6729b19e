"""The demo as a user runs it: to its end, and interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"
PATIENCE_S = 120.0
END_TIMEOUT_S = 60.0

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(420)]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where the demo makes its temporary folder; pytest's own path is too long for Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="d") as name:
        yield Path(name)


def _command_lines(of_folder: Path) -> list[str]:
    """Processes that have anything to do with the folder in which the demo keeps its things."""
    lines = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        command = " ".join(process.info["cmdline"] or ())
        places = (command, (process.info["environ"] or {}).get("TMPDIR", ""))
        if any(str(of_folder) in place for place in places) and process.pid != os.getpid():
            lines.append(command)
    return lines


def test_the_demo_loads_from_the_store_and_leaves_nothing(folder: Path):
    done = subprocess.run(
        [sys.executable, str(DEMO)],
        env={**os.environ, "TMPDIR": str(folder), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=400,
    )

    assert 0 == done.returncode, done.stdout + done.stderr
    assert 2 == done.stdout.split().count("3500"), done.stdout
    assert [] == list(folder.glob("ucm-*"))
    assert [] == _command_lines(folder)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_demo_leaves_nothing_either(folder: Path, number):
    with subprocess.Popen(
        [sys.executable, str(DEMO)],
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as demo:
        # vLLM's engines rename themselves: that is how far all three servers have to be.
        _wait(lambda: _count_engines(demo.pid) == 3, PATIENCE_S)
        family = psutil.Process(demo.pid).children(recursive=True)
        memory = {path for process in family for path in _shared_memory(process)}

        demo.send_signal(number)
        demo.wait(END_TIMEOUT_S)

    gone_or_dead = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    _wait(
        lambda: not any(p.is_running() and p.status() not in gone_or_dead for p in family),
        END_TIMEOUT_S,
    )
    _wait(lambda: not list(folder.glob("ucm-*")), END_TIMEOUT_S)
    assert [] == _command_lines(folder)
    assert memory and not any(os.path.exists(path) for path in memory)


def _count_engines(pid: int) -> int:
    try:
        family = psutil.Process(pid).children(recursive=True)
        return sum("VLLM::EngineCore" in " ".join(p.cmdline()) for p in family)
    except psutil.NoSuchProcess:
        return 0


def _shared_memory(process: psutil.Process) -> list[str]:
    try:
        paths = [part.path for part in process.memory_maps()]
    except psutil.NoSuchProcess:
        return []
    return [path for path in paths if path.startswith("/dev/shm/")]


def _wait(is_so, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "still not so"
        time.sleep(0.1)
