"""Runs the tests in stages: one pytest after the other, each with the tests of one stage.

    python tests/stages.py short [ARGUMENTS FOR PYTEST]

Most of what the first stages do is to wait for processes and deadlines, so several tests run at
once there; how many servers of vLLM fit a machine is what its own stage goes by. Red in one stage
keeps the next from starting. With ARGUMENTS that name files one plain pytest runs these, in the
same order. Tests marked `alone` measure, or need the machine for themselves.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTHING_COLLECTED = 5
# Where conftest.py writes how many tests passed, failed, and so on.
COUNTS_VARIABLE = "UCM_TEST_COUNTS"
SELECTIONS = {"short": "not long", "long": "long and not models and not versions and not cluster"}
_TOLD = ("passed", "failed", "error", "skipped", "xfailed")
# With these pytest talks to whoever runs it.
_AT_A_TERMINAL = {"-s", "--pdb", "--trace", "--capture=no"}


@dataclass(frozen=True)
class Stage:
    """`spelled`: the marks one of which stands in each file that has tests of it; none: any file
    may have some. `at_once`: how many tests run side by side."""

    name: str
    marks: str
    at_once: int = 1
    spelled: tuple[str, ...] = ()


def stages(num_cores: int) -> list[Stage]:
    engineless = "not vllm and not gpu"
    return [
        Stage("unit", f"not process and not alone and {engineless}", num_cores),
        Stage("process", f"process and not alone and {engineless}", num_cores, ("process",)),
        Stage("alone", f"alone and {engineless}", 1, ("alone",)),
        Stage("vllm", "vllm or gpu", 1, ("vllm", "gpu")),
    ]


@dataclass
class Done:
    stage: Stage
    status: int
    seconds: float
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def is_red(self) -> bool:
        return self.status not in (0, NOTHING_COLLECTED)

    def __str__(self) -> str:
        counts = ", ".join(f"{self.counts[what]} {what}" for what in _TOLD if what in self.counts)
        verdict = "RED" if self.is_red else "green"
        minutes, seconds = divmod(round(self.seconds), 60)
        return f"{self.stage.name:8} {verdict:6} {minutes:3}:{seconds:02}  {counts or 'no tests'}"


def spells(file: Path, marks: Sequence[str]) -> bool:
    """All of a folder `gpu` is marked by its conftest."""
    text = file.read_text(encoding="utf-8")
    return any(f"mark.{mark}" in text or file.parent.name == mark for mark in marks)


def files_of(stage: Stage) -> list[str]:
    """To import no others: that costs each of several processes half a minute."""
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    if stage.spelled:
        found = [each for each in found if spells(each, stage.spelled)]
    return [str(file.relative_to(ROOT)) for file in found]


def run(command: Sequence[str], counts: Path) -> int:
    environment = {**os.environ, COUNTS_VARIABLE: str(counts)}
    # Hundreds of processes are started, which else compile their modules anew each time.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with subprocess.Popen(command, cwd=ROOT, env=environment) as child:
        # Ctrl-C reaches it as well; what ends us alone does not. It ends what it has started.
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        while child.returncode is None:
            with suppress(KeyboardInterrupt):
                child.wait()
        return child.returncode


def run_stage(stage: Stage, arguments: Sequence[str], only: str) -> Done:
    print(f"\n== stage {stage.name}: {stage.marks}; {only}", flush=True)
    command = [sys.executable, "-m", "pytest", "-m", f"({stage.marks}) and ({only})"]
    if stage.at_once > 1 and not _AT_A_TERMINAL.intersection(arguments):
        command += ["-n", str(stage.at_once), "--dist", "worksteal"]
    files = files_of(stage) if stage.spelled else []
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts"
        status = run([*command, *arguments, *files], counts)
        said = json.loads(counts.read_text()) if counts.exists() else {}
    return Done(stage, status, time.monotonic() - started_s, said)


def taken_out(arguments: Sequence[str], option: str) -> tuple[list[str], str]:
    """The others, and the option's last value."""
    others, value = list(arguments), ""
    while option in others[:-1]:
        place = others.index(option)
        value = others[place + 1]
        del others[place : place + 2]
    return others, value


def names_files(arguments: Sequence[str]) -> bool:
    return any(
        not each.startswith("-") and (ROOT / each.partition("::")[0]).exists() for each in arguments
    )


def main(selection: str, arguments: Sequence[str]) -> int:
    only = SELECTIONS[selection]
    if names_files(arguments):
        os.chdir(ROOT)
        command = [sys.executable, "-m", "pytest", "-m", only, *arguments]
        os.execv(sys.executable, command)
    others, wanted = taken_out(arguments, "-m")
    only = wanted or only
    done: list[Done] = []
    left = stages(os.cpu_count() or 1)
    while left and not (done and done[-1].is_red):
        done.append(run_stage(left.pop(0), others, only))
    print("\n== stages")
    for each in done:
        print(each)
    for stage in left:
        print(f"{stage.name:8} not started")
    if all(each.status == NOTHING_COLLECTED for each in done):
        return NOTHING_COLLECTED
    return done[-1].status if done[-1].is_red else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
