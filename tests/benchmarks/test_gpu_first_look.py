"""The probes for a machine with a GPU, on machines without: that they work, not what they find."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import gpu_first_look
from benchmarks.first_look.place import BAD, GOOD, LOOK, SKIPPED, Finding, Place
from benchmarks.gpu_first_look import PROBES, Probe, ask, read_finding

SCRIPT = Path(gpu_first_look.__file__)
# What only a real device can be asked.
ONLY_REAL = {"capture-relaxed", "neighbours"}
# With CUDA's rules, what these do in a capture is refused.
REFUSED = {"capture-registration", "capture-query", "capture-pinned"}
ON_THE_CPU = {"identity", "bandwidth"}


@pytest.fixture(params=["stand-in", "cpu"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    made = Place(request.param)
    yield made
    made.close()


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
def test_every_probe_says_what_it_found_or_why_it_was_skipped(place: Place, probe: Probe) -> None:
    finding = probe.run(place)
    if place.name == "cpu":
        expected = GOOD if probe.name in ON_THE_CPU else SKIPPED
    else:
        expected = SKIPPED if probe.name in ONLY_REAL else LOOK if probe.name in REFUSED else GOOD
    assert (expected, True) == (finding.verdict, bool(finding.says)), finding


def test_all_probes_together_end_within_ten_minutes() -> None:
    """However many of them hang."""
    assert sum(probe.limit_s for probe in PROBES) <= 600
    assert len({probe.name for probe in PROBES}) == len(PROBES)


def test_the_script_says_that_nothing_was_measured_where_there_is_no_accelerator() -> None:
    command = [sys.executable, str(SCRIPT), "--only", "order", "launches"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NO accelerator" in done.stdout
    assert "NOTHING of this was measured on an accelerator." in done.stdout
    assert "skipped: order, launches" in done.stdout


def test_a_probe_that_hangs_is_ended_and_one_that_dies_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    hangs = Probe("identity", gpu_first_look.copies.identity, 0.05)
    assert BAD == ask(hangs, "stand-in").verdict
    assert "has not ended within" in capsys.readouterr().out
    assert Finding(BAD, "ended without an answer (exit status -11)") == read_finding("hm", -11)
