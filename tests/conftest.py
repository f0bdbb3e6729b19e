"""Order and stages: cheap tests first, and red in one stage keeps the next from starting."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.stages import COUNTS_VARIABLE, spells

try:
    from hypothesis import settings
except ImportError:  # `make test-gpu` with an interpreter of the user's
    pass
else:
    # What is red is red for the change at hand, and red again when it is run again. New examples
    # are looked for with --hypothesis-profile=search. No test is about how long an example takes.
    settings.register_profile("same", derandomize=True, deadline=None)
    settings.register_profile("search", derandomize=False, deadline=None)
    settings.load_profile("same")

# A stage is as slow as its slowest test: milliseconds, seconds, minutes.
_STAGES = ("process", "gpu", "vllm")
# What stages.py looks for in files, not to import others.
_SPELLED = ("process", "alone", "vllm")
# From this time on (seconds since 1970) no long test begins: who has to be done by some time runs
# as many as the machine allows.
_LONG_UNTIL = "UCM_LONG_TESTS_UNTIL_S"


def _stage(item: pytest.Item) -> int:
    marks = [_STAGES.index(mark.name) + 1 for mark in item.iter_markers() if mark.name in _STAGES]
    return max(marks, default=0)


@cache
def _is_spelled(file: Path, mark: str) -> bool:
    return spells(file, [mark])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in {mark.name for mark in item.iter_markers()}.intersection(_SPELLED):
            if not _is_spelled(item.path, mark):
                raise pytest.UsageError(
                    f"{item.nodeid} is marked `{mark}` by another file: write pytest.mark.{mark} "
                    f"into {item.path.name}, or tests/stages.py does not find it"
                )
    items.sort(key=_stage)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    until_s = float(os.environ.get(_LONG_UNTIL, "inf"))
    if time.time() > until_s and {"long", "models"} & {mark.name for mark in item.iter_markers()}:
        pytest.skip(f"the time for long tests is over, by {_LONG_UNTIL}")


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    session = item.session
    if nextitem is not None and _stage(item) < _stage(nextitem) and session.testsfailed:
        session.shouldfail = "red in this stage: the slower tests were not started"


def pytest_sessionstart() -> None:
    # As Ctrl-C does: fixtures are torn down, servers stopped.
    signal.signal(signal.SIGTERM, lambda *_: _interrupt())
    # A shell that starts us in the background has us ignore Ctrl-C, and so would all that we start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if COUNTS_VARIABLE in os.environ:
        counts = {what: len(found) for what, found in terminalreporter.stats.items()}
        Path(os.environ[COUNTS_VARIABLE]).write_text(json.dumps(counts), encoding="utf-8")


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, object, object]:
    """What workers of pytest-xdist report has to be text. Some tests print what is none."""
    return _as_text((yield))


def _as_text(report: object) -> object:
    if isinstance(report, str):
        return report.encode("utf-8", "backslashreplace").decode()
    if isinstance(report, dict):
        return {name: _as_text(value) for name, value in report.items()}
    if isinstance(report, list | tuple):
        return type(report)(map(_as_text, report))
    return report


def _interrupt() -> None:
    raise KeyboardInterrupt("SIGTERM")


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_running() -> Iterator[None]:
    """Servers that tests have started through examples.cluster, and their node caches, end here."""
    yield
    processes = sys.modules.get("examples.cluster.processes")
    if processes is not None:
        processes.end_run()
