"""A real vLLM whose storage fails, fills, answers in part, or hangs for good: what that costs is
hits. `tests/matrix` goes through all faults without an engine."""

from __future__ import annotations

import errno
import itertools
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from examples.cluster.client import by_label
from tests.e2e.checks import Prompt, check_answer, make_prompt, wait_for_hit, wait_until
from tests.e2e.conftest import DeploymentMaker
from tests.e2e.deployment import Engine, Fleets, Oracle
from tests.e2e.node import Node
from tests.e2e.store import Store
from tests.faults.fuse import FuseMount, mount_fuse, needs_fuse
from ucm.handoff import Wanted, params

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(900), needs_fuse]

LOOKUP_TIMEOUT_MS = 1000
IO_TIMEOUT_MS = 500
# A request computes its prompt beside others on few cores, which takes seconds by itself.
ANSWERED_S = LOOKUP_TIMEOUT_MS / 1000 + 15.0
BACK_S = 10.0
LENGTH = 1500
# All that storage is asked for.
EVERYTHING = (
    *("lookup", "getattr", "setattr", "open", "read", "opendir", "readdir", "statfs"),
    *("mkdir", "create", "write", "rename", "unlink", "link"),
)


@dataclass(frozen=True)
class Faulty:
    engine: Engine
    mount: FuseMount
    store: Store


@pytest.fixture(scope="module")
def faulty(
    fleets: Fleets, deployment: DeploymentMaker, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Faulty]:
    made = deployment("faulty")
    path: Path = tmp_path_factory.mktemp("mounts") / "faulty"
    with mount_fuse(made.store.folder, path) as mount:
        node = Node(
            "faulty",
            mounted_at=path,
            posix_io_timeout_ms=IO_TIMEOUT_MS,
            posix_retry_ms=100,
            posix_recheck_s=1,
        )

        def start() -> object:
            made.start("faulty", node, lookup_timeout_ms=LOOKUP_TIMEOUT_MS)
            return made

        fleets.use("faulty", start)  # type: ignore[arg-type]
        try:
            yield Faulty(made["faulty"], mount, made.store)
        finally:
            mount.release()
            fleets.end()


def forget_memory(faulty: Faulty, stored: Prompt) -> None:
    """The next node cache has only files."""
    faulty.engine.node.kill()
    wait_for_hit(faulty.engine, stored)


def told(engine: Engine) -> dict[str, int]:
    """Why blocks were not found, and not written, so far."""
    samples = engine.client.metrics()
    missed = by_label(samples, "ucm_lookup_missed_blocks_total", "reason")
    unwritten = by_label(samples, "ucm_node_unwritten_pages", "reason")
    return dict(missed + unwritten)


def ask_in_time(engine: Engine, prompt: Prompt, expected: tuple[int, ...]) -> None:
    started_s = time.monotonic()
    check_answer(engine, prompt, expected)
    assert time.monotonic() - started_s < ANSWERED_S


CASES: dict[str, tuple[Callable[[FuseMount], None], str]] = {
    "looking up hangs": (lambda mount: mount.hang("lookup"), "timeout"),
    "reading fails": (lambda mount: mount.fail("read", errno.EIO), "io_error"),
    "writing finds it full": (lambda mount: mount.fail("create", errno.ENOSPC), "full"),
    "reading brings wrong bits": (lambda mount: mount.corrupt_reads(), "corrupt"),
    "reads are short": (lambda mount: mount.short_reads(), ""),
}


@pytest.mark.parametrize("case", CASES)
def test_while_storage_is_faulty_answers_are_right_and_ten_seconds_later_hits_are_back(
    faulty: Faulty, oracle: Oracle, case: str
) -> None:
    begin, reason = CASES[case]
    engine, mount, store = faulty.engine, faulty.mount, faulty.store
    known = make_prompt(LENGTH, f"known before {case}")
    stored = [make_prompt(LENGTH, f"stored before {case} {i}") for i in range(2)]
    fresh = [make_prompt(LENGTH, f"while {case} {i}") for i in range(2)]
    expected = oracle.answers([known, *stored, *fresh])
    for prompt in (known, *stored):
        check_answer(engine, prompt, expected[prompt])
        store.wait_stored(prompt)
    forget_memory(faulty, known)

    before = told(engine)
    begin(mount)
    try:
        for prompt in (stored[0], *fresh):
            ask_in_time(engine, prompt, expected[prompt])

        def is_told() -> bool:
            # An engine shows what was true when it last asked its node cache, at a step.
            engine.client.complete(known, max_tokens=1)
            return told(engine).get(reason, 0) > before.get(reason, 0)

        if reason:
            wait_until(is_told, f"{reason} is counted", timeout_s=20.0)
        else:
            wait_for_hit(engine, stored[1])
    finally:
        mount.release()
    wait_for_hit(engine, stored[1], timeout_s=BACK_S)
    for prompt in (stored[0], *fresh):
        check_answer(engine, prompt, expected[prompt])
        store.wait_stored(prompt, timeout_s=BACK_S)
    assert store.bad_files() == []
    forget_memory(faulty, known)
    for prompt in (*stored, *fresh):
        wait_for_hit(engine, prompt, timeout_s=BACK_S)
        check_answer(engine, prompt, expected[prompt])


def test_while_storage_is_full_no_prompt_is_promised_and_once_it_is_not_they_are_again(
    faulty: Faulty,
) -> None:
    """A promise that can't be kept would be waited for."""
    engine = faulty.engine
    numbers = itertools.count()

    def is_promised(num_tokens: int) -> bool:
        prompt = make_prompt(num_tokens, f"full {next(numbers)}")
        return bool(engine.client.prefill(prompt, params=params(Wanted())))

    assert is_promised(LENGTH)
    before = told(engine).get("full", 0)
    faulty.mount.fail("create", errno.ENOSPC)
    try:

        def is_full() -> bool:
            is_promised(LENGTH)
            return told(engine).get("full", 0) > before

        wait_until(is_full, "storage has refused a page", timeout_s=20.0)
        assert [is_promised(n) for n in (128, 129, 300, LENGTH) * 3] == [False] * 12
    finally:
        faulty.mount.release()
    wait_until(lambda: is_promised(LENGTH), "it is promised again", timeout_s=BACK_S)


class Load:
    """Decodes without an end beside requests that come, and the times between tokens."""

    def __init__(self, engine: Engine, oracle: Oracle) -> None:
        self._engine = engine
        self.gaps_s: list[float] = []
        self.ttft_s: list[float] = []
        self._lock = threading.Lock()
        self._decoded = [make_prompt(64, f"decoded {i}") for i in range(2)]
        self._expected = oracle.answers(self._decoded, max_tokens=256)

    def run(
        self, asked: list[Prompt], expected: dict[Prompt, tuple[int, ...]], *, pause_s: float = 0.0
    ) -> None:
        """Decodes go on until each of `asked` was answered, one after the other, each of them
        after a pause."""
        self.gaps_s, self.ttft_s = [], []
        stop = threading.Event()
        failed: list[BaseException] = []

        def guarded(act: Callable[[], None]) -> None:
            try:
                act()
            except BaseException as error:  # noqa: BLE001 - raised in the test's thread
                failed.append(error)

        decoding = [
            threading.Thread(target=guarded, args=[lambda p=prompt: self._decode(p, stop)])
            for prompt in self._decoded
        ]
        for thread in decoding:
            thread.start()
        try:
            for prompt in asked:
                time.sleep(pause_s)
                answer = self._engine.client.complete(prompt, max_tokens=len(expected[prompt]))
                assert answer.token_ids == expected[prompt]
                self.ttft_s.append(answer.ttft_s)
        finally:
            stop.set()
            for thread in decoding:
                thread.join()
        assert not failed, failed[0]

    def _decode(self, prompt: Prompt, stop: threading.Event) -> None:
        while not stop.is_set():
            answer = self._engine.client.complete(prompt, max_tokens=256)
            assert answer.token_ids == self._expected[prompt]
            gaps_s = [after - before for before, after in itertools.pairwise(answer.arrived_s)]
            with self._lock:
                self.gaps_s += gaps_s

    def said(self) -> str:
        cuts = statistics.quantiles(self.gaps_s, n=100)
        return (
            f"{len(self.gaps_s)} gaps, median {cuts[49] * 1000:.1f} ms, "
            f"99th {cuts[98] * 1000:.1f} ms, longest {max(self.gaps_s) * 1000:.0f} ms; "
            f"TTFT median {statistics.median(self.ttft_s):.2f} s, most {max(self.ttft_s):.2f} s"
        )


def test_a_mount_that_hangs_for_good_is_not_felt_by_decodes_and_a_kill_ends_the_engine_at_once(
    faulty: Faulty, oracle: Oracle
) -> None:
    """Last in this module: nothing is left of its engine."""
    engine, mount = faulty.engine, faulty.mount
    known = make_prompt(LENGTH, "known before the hang")
    stored = [make_prompt(LENGTH, f"stored before the hang {i}") for i in range(8)]
    missed = [make_prompt(LENGTH, f"missed before the hang {i}") for i in range(16)]
    fresh = [make_prompt(LENGTH, f"during the hang {i}") for i in range(8)]
    expected = oracle.answers([known, *stored, *missed, *fresh])
    for prompt in (known, *stored):
        check_answer(engine, prompt, expected[prompt])
        faulty.store.wait_stored(prompt)
    forget_memory(faulty, known)
    load = Load(engine, oracle)
    # As many that are computed as there will be while it hangs, and about as far apart.
    load.run(missed, expected, pause_s=0.2)
    print("before:", load.said())

    for operation in EVERYTHING:
        mount.hang(operation)
    load.run([*stored, *fresh], expected, pause_s=0.2)
    print("during:", load.said())
    assert max(load.ttft_s) < ANSWERED_S
    assert statistics.median(load.gaps_s) < LOOKUP_TIMEOUT_MS / 1000
    assert statistics.quantiles(load.gaps_s, n=100)[98] < LOOKUP_TIMEOUT_MS / 1000 + 1.0

    family = engine.server.processes()
    started_s = time.monotonic()
    engine.server.send_signal(signal.SIGTERM)
    gone, alive = psutil.wait_procs(family, timeout=15.0)
    print(f"ended {time.monotonic() - started_s:.1f} s after SIGTERM, {len(gone)} processes")
    assert not alive
