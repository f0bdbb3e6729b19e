"""The first ten minutes on a machine with one GPU: does what copies rely on hold there?

    python benchmarks/gpu_first_look.py [--only NAME ...] [--stand-in] [--list]

Needs torch, numpy and this folder, no vLLM. Each probe is a process of its own with a time limit,
so that a driver that hangs or dies costs one probe. Prints a table and a verdict per probe:

    good      as the copy code expects
    look      it works, and a number or a refusal deserves a person's eyes
    BAD       wrong bytes, an error, or no end within the limit: exit status 1
    skipped   could not be asked here, and why

Without an accelerator the probes of bytes and speed run the copies of a CPU engine; `--stand-in`
runs what can be run on the simulated device of the tests. Neither says anything about a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.first_look import beside, capture, copies
from benchmarks.first_look.place import BAD, PLACES, SKIPPED, Finding, Place

_ROOT = Path(__file__).resolve().parent.parent
_ANSWER = "first look: "


@dataclass(frozen=True)
class Probe:
    """A question; `limit_s` is for its whole process."""

    name: str
    run: Callable[[Place], Finding]
    limit_s: float

    @property
    def question(self) -> str:
        return (self.run.__doc__ or "").strip().splitlines()[0]


PROBES = (
    Probe("identity", copies.identity, 100),
    Probe("order", copies.order, 45),
    Probe("capture-registration", capture.plain_registration, 25),
    Probe("capture-relaxed", capture.relaxed_registration, 25),
    Probe("capture-query", capture.event_query, 25),
    Probe("capture-pinned", capture.pinned_allocation, 25),
    Probe("capture-copy", capture.copy_on_another_thread, 25),
    Probe("uploads", beside.uploads, 30),
    Probe("pinning", beside.pinning, 60),
    Probe("bandwidth", copies.bandwidth, 100),
    Probe("neighbours", beside.neighbours, 60),
    Probe("memory", copies.memory, 40),
    Probe("launches", copies.launches, 30),
)
# Questions that this script can't ask, and what asks them.
ELSEWHERE = {
    "attention in a head-major layout": "needs vLLM: `vllm bench latency` with engine_layout keep "
    "and head_major, at the block size that is served",
    "graphs on and a warm node cache, MTP, sleep and wake under load": "need vLLM servers: "
    "`make demo`, and the tests of tests/e2e on that machine",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[p.name for p in PROBES], default=[])
    parser.add_argument("--stand-in", action="store_true", help="the tests' simulated device")
    parser.add_argument("--list", action="store_true", help="the probes and their limits")
    parser.add_argument("--one", nargs=2, metavar=("PROBE", "PLACE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        answer(*args.one)
        return
    probes = [probe for probe in PROBES if not args.only or probe.name in args.only]
    if args.list:
        for probe in probes:
            print(f"{probe.name:22} {probe.limit_s:4.0f} s   {probe.question}")
        return
    place = "stand-in" if args.stand_in else find_place()
    introduce(place)
    findings = {probe.name: ask(probe, place) for probe in probes}
    conclude(findings, place)
    sys.exit(any(finding.verdict == BAD for finding in findings.values()))


def find_place() -> str:
    return "accelerator" if torch.accelerator.is_available() else "cpu"


def introduce(place: str) -> None:
    what = {
        "accelerator": "an accelerator",
        "stand-in": "NO accelerator: the simulated device of the tests",
        "cpu": "NO accelerator: the copies of a CPU engine",
    }[place]
    if place == "accelerator" and torch.cuda.is_available():
        what = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    print(f"torch {torch.__version__}, {what}\n", flush=True)


def answer(name: str, place_name: str) -> None:
    """In the process of one probe: the finding as its last line."""
    assert place_name in PLACES
    (probe,) = (p for p in PROBES if p.name == name)
    with closing(Place(place_name)) as place:
        finding = probe.run(place)
    print(_ANSWER + json.dumps(asdict(finding)), flush=True)


def ask(probe: Probe, place: str) -> Finding:
    """Runs a probe in a process of its own, prints and returns what it says."""
    started_s = time.monotonic()
    command = [sys.executable, str(Path(__file__).resolve()), "--one", probe.name, place]
    with subprocess.Popen(
        command,
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=probe.limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            finding = Finding(BAD, f"has not ended within {probe.limit_s:.0f} s")
        else:
            finding = read_finding(output, process.returncode)
    show(probe, finding, time.monotonic() - started_s)
    if finding.verdict == BAD:
        print("".join(f"      | {line}\n" for line in output.splitlines()[-15:]), flush=True)
    return finding


def read_finding(output: str, returncode: int) -> Finding:
    for line in reversed(output.splitlines()):
        if line.startswith(_ANSWER):
            told = json.loads(line.removeprefix(_ANSWER))
            rows = [(str(name), str(value)) for name, value in told["rows"]]
            return Finding(told["verdict"], told["says"], rows)
    return Finding(BAD, f"ended without an answer (exit status {returncode})")


def show(probe: Probe, finding: Finding, took_s: float) -> None:
    print(f"{probe.name:22} {finding.verdict:8} {took_s:5.1f} s   {finding.says}")
    for name, value in finding.rows:
        print(f"      {name:46} {value}")
    sys.stdout.flush()


def conclude(findings: dict[str, Finding], place: str) -> None:
    print()
    for verdict in sorted({finding.verdict for finding in findings.values()}):
        names = [name for name, finding in findings.items() if finding.verdict == verdict]
        print(f"{verdict}: {', '.join(names)}")
    if place != "accelerator":
        print("NOTHING of this was measured on an accelerator.")
    elif any(finding.verdict == SKIPPED for finding in findings.values()):
        print("What was skipped above says why.")
    for question, who in ELSEWHERE.items():
        print(f"not asked here: {question}: {who}")


if __name__ == "__main__":
    main()
