"""Real vLLM on two nodes of a shared filesystem: one prefills, the other decodes, and there is
nothing between them but that filesystem and a proxy."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from examples.cluster.models import make_model
from examples.cluster.processes import HttpServer, python_launcher
from examples.cluster.serve_vllm import FORK_VARIABLE
from tests.cluster.nodes import Cluster
from tests.e2e.checks import (
    Prompt,
    counted,
    handed_over,
    handed_over_since,
    make_prompt,
    wait_until,
)
from tests.e2e.deployment import Deployment, Engine, Oracle
from tests.e2e.node import Node
from tests.e2e.proxies import ONE_TO_ONE, proxy
from tests.e2e.races import race
from tests.e2e.store import Store

if TYPE_CHECKING:
    from typing_extensions import Self

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.cluster, pytest.mark.timeout(600)]

# Those whose nodes are namespaces of this machine, with room in them for an engine; and what
# happens to them. A killed server is started again by its client.
OUTAGES = {"glusterfs": ("brick", "both bricks"), "sshfs": ("killed", "server")}
# With these there is no storage at all.
WHOLE = ("both bricks", "server")
PLACES = {"p1": "prefill", "d1": "decode"}
NUM_HANDOFFS = 20
NUM_ANSWERED = 4
LENGTHS = (129, 1500, 3500)
NUM_CLIENTS = 2
# Twice the default: where four servers and the storage share few cores, the first pages of a new
# store take five seconds.
HANDOFF_TIMEOUT_MS = 10_000
# How long a lookup waits, and what was promised; the rest is to compute a prompt twice, beside
# others on few cores.
DEADLINE_S = 2.0 + HANDOFF_TIMEOUT_MS / 1000 + 15.0
BACK_S = 45.0


@dataclass(frozen=True)
class Pair:
    cluster: Cluster
    fleet: Deployment
    oracle: Oracle

    @property
    def decode(self) -> Engine:
        return self.fleet["decode"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """And servers that start in half the time."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(FORK_VARIABLE, "1")
        yield make_model(tmp_path_factory.mktemp("model"), "tiny")


@pytest.fixture(scope="module")
def oracle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    oracle = Oracle(model, tmp_path_factory.mktemp("oracle"))
    yield oracle
    oracle.server.kill()


@pytest.fixture(scope="module")
def pair(
    cluster: Cluster, model: Path, oracle: Oracle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """Prefill on node A and decode on node B, each with a node cache, and neither sees the mount of
    the other one."""
    name = cluster.new_store()
    with Deployment(tmp_path_factory.mktemp(name), model) as fleet:
        for mounted, engine in ((cluster.a, "prefill"), (cluster.b, "decode")):
            pid = int(mounted.node.run("echo $PPID"))
            store = Path(mounted.path) / name
            fleet.store = Store(Path(f"/proc/{pid}/root{store}"), "float32")
            fleet.start(
                engine,
                Node(f"{name}-{engine}", mounted_at=store, posix_recheck_s=1),
                role="kv_producer" if engine == "prefill" else "kv_consumer",
                chunk=512,
                layerwise=engine == "prefill",
                handoff_timeout_ms=HANDOFF_TIMEOUT_MS,
                launcher=("nsenter", f"--mount=/proc/{pid}/ns/mnt", *python_launcher()),
            )
        fleet.wait_ready()
        oracle.server.wait_ready()
        yield Pair(cluster, fleet, oracle)


@pytest.mark.parametrize("cluster", OUTAGES, indirect=True, scope="session")
@pytest.mark.parametrize("handoff", ["chain", "overlap"])
def test_decode_on_another_node_loads_all_that_prefill_has_promised(
    pair: Pair, handoff: str
) -> None:
    race(pair.fleet, pair.oracle, PLACES, handoff, num_prompts=NUM_HANDOFFS, salt=handoff)


@dataclass(frozen=True)
class Asked:
    """With its salt it is new to the store."""

    prompt: Prompt
    salt: str
    expected: tuple[int, ...]

    def ask(self, server: HttpServer) -> float:
        """How long that took. The tokens must be right."""
        answer = server.client.complete(
            self.prompt, max_tokens=len(self.expected), cache_salt=self.salt
        )
        assert answer.token_ids == self.expected, f"{len(self.prompt)} tokens, {self.salt}"
        return answer.total_s


class Clients:
    """Each asks the proxy for one prompt after the other, lengths in turn, until the end."""

    def __init__(self, server: HttpServer, oracle: Oracle, name: str) -> None:
        self._server = server
        self._name = name
        self._prompts = [make_prompt(length, "outages") for length in LENGTHS]
        self._expected = oracle.answers(self._prompts, max_tokens=NUM_ANSWERED)
        self._stop = threading.Event()
        self._wrong: list[BaseException] = []
        self.answered: list[Asked] = []
        self.slowest_s = 0.0

    def __enter__(self) -> Self:
        self._threads = [threading.Thread(target=self._run, args=[i]) for i in range(NUM_CLIENTS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, client: int) -> None:
        try:
            for i, prompt in enumerate(itertools.cycle(self._prompts)):
                if self._stop.is_set():
                    return
                asked = Asked(prompt, f"{self._name} {client} {i}", self._expected[prompt])
                self.slowest_s = max(self.slowest_s, asked.ask(self._server))
                self.answered.append(asked)
        except BaseException as error:  # noqa: BLE001 - raised in the test's thread
            self._wrong.append(error)

    def wait_answered(self, more: int) -> None:
        wanted = len(self.answered) + more
        wait_until(
            lambda: bool(self._wrong) or len(self.answered) >= wanted,
            f"{more} more answers",
            timeout_s=more * DEADLINE_S,
        )
        self.check()

    def check(self) -> None:
        assert not self._wrong, self._wrong[0]
        assert self.slowest_s < DEADLINE_S


def wait_handed_over(pair: Pair, server: HttpServer, name: str) -> None:
    """Until decode loads again all that prefill promises."""
    prompt = make_prompt(1500, "outages")
    expected = pair.oracle.answer(prompt, max_tokens=NUM_ANSWERED)
    deadline_s = time.monotonic() + BACK_S
    for i in itertools.count():
        before = handed_over(pair.decode.client)
        Asked(prompt, f"{name} probe {i}", expected).ask(server)
        if handed_over_since(pair.decode.client, before, 1499).loaded == 1499:
            return
        assert time.monotonic() < deadline_s, "decode does not load again"


def check_hits_from_files(pair: Pair, stored: list[Asked]) -> None:
    """With a node cache on B that has nothing in memory."""
    decode = pair.decode
    decode.node.kill()
    deadline_s = time.monotonic() + BACK_S
    for asked in stored:
        while not hits(decode, asked):
            assert time.monotonic() < deadline_s, f"{len(asked.prompt)} tokens are not loaded again"
            time.sleep(0.2)


def hits(engine: Engine, asked: Asked) -> bool:
    """Whether all of its full blocks were loaded."""
    before = engine.client.counters()
    asked.ask(engine.server)
    gained = counted(engine.client, before, len(asked.prompt))
    return gained.external_hits == engine.full_hit_tokens(asked.prompt)


@pytest.mark.parametrize(
    ("cluster", "outage"),
    [(name, outage) for name, outages in OUTAGES.items() for outage in outages],
    indirect=["cluster"],
    scope="session",
)
def test_an_outage_under_load_costs_hits_but_no_token_and_no_request_its_deadline(
    pair: Pair, outage: str
) -> None:
    fault = pair.cluster.faults[outage]
    with proxy(pair.fleet, ONE_TO_ONE, PLACES) as server:
        with Clients(server, pair.oracle, outage) as clients:
            clients.wait_answered(6)
            stored = clients.answered[: len(LENGTHS)]
            before = handed_over(pair.decode.client)
            fault.begin()
            try:
                clients.wait_answered(6)
            finally:
                fault.end()
            during = handed_over(pair.decode.client) - before
            clients.wait_answered(6)
        clients.check()
        print(f"{outage}: slowest of {len(clients.answered)} {clients.slowest_s:.1f} s, {during}")
        assert sum(during.recomputed.values()) or outage not in WHOLE
        wait_handed_over(pair, server, outage)
    check_hits_from_files(pair, stored)
    race(pair.fleet, pair.oracle, PLACES, "chain", num_prompts=NUM_HANDOFFS, salt=outage)
