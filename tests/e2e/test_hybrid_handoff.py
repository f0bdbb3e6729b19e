"""A model with windows and one with states: hand-off through the proxy, and engines that cut their
KV differently."""

from __future__ import annotations

from functools import partial

import pytest

from examples.cluster.processes import HttpServer
from tests.e2e.checks import Prompt, at_once, counted, handed_over, handed_over_since, make_prompt
from tests.e2e.deployment import Fleets
from tests.e2e.hybrid_fleet import HybridFleet, ask, ask_counted
from tests.e2e.hybrid_models import MODELS, HybridModel
from tests.e2e.node import Node
from tests.e2e.proxies import ONE_TO_ONE, proxy

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(900)]

PLACES = {"p1": "prefill", "d1": "decode"}
NUM_CLIENTS = 4
# Some end with a whole block of either model, of which decode must compute a token itself.
RACING = [make_prompt(1536 if i % 4 == 3 else 1500, f"strands race {i}") for i in range(20)]
STATES = "granite4"
# A model of windows alone is run with those that stand for none.
WINDOWS_ONLY = pytest.param("mistral-w256", marks=pytest.mark.models)
WINDOWS = ("gemma3-w256", WINDOWS_ONLY)


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> HybridModel:
    """All tests of one model come after each other."""
    return MODELS[request.param]


@pytest.fixture
def fleet(
    model: HybridModel, fleets: Fleets, tmp_path_factory: pytest.TempPathFactory
) -> HybridFleet:
    """Two alike; one of two ranks, and one whose blocks are half as large and that has a prefix
    cache, where blocks may differ. Each has a node to itself."""

    def start() -> HybridFleet:
        made = HybridFleet(tmp_path_factory.mktemp(f"{model.name}-handoff"), model)
        made.start("prefill", Node(f"{model.name}-prefill"), chunk=512)
        made.start("decode", Node(f"{model.name}-decode"))
        two = ["--tensor-parallel-size", "2"]
        made.start("tp2", Node(f"{model.name}-tp2"), chunk=512, args=two)
        if not model.has_states:
            made.start("block64", Node(f"{model.name}-block64"), block_size=64, prefix_caching=True)
        return made

    made = fleets.use(f"{model.name} handoff", start)
    assert isinstance(made, HybridFleet)
    return made


@pytest.mark.parametrize("model", [*WINDOWS, STATES], indirect=True)
@pytest.mark.parametrize("handoff", ["chain", "overlap"])
def test_decode_asked_at_once_loads_every_promised_token_of_a_model_with_several_strands(
    fleet: HybridFleet, handoff: str
) -> None:
    decode = fleet["decode"]
    expected = {prompt: fleet.expected(prompt) for prompt in RACING}
    vllm_before, before = decode.client.counters(), handed_over(decode.client)

    def client(server: HttpServer, mine: list[Prompt]) -> None:
        for prompt in mine:
            # With a salt the keys are others, for tokens that are answered already.
            said = ask(server.client, prompt, cache_salt=handoff)
            assert said.is_like(expected[prompt])

    with proxy(fleet, f"{ONE_TO_ONE} --handoff {handoff}", PLACES) as server:
        at_once(partial(client, server, RACING[i::NUM_CLIENTS]) for i in range(NUM_CLIENTS))
    promised = sum(map(partial(handed_over_tokens, fleet), RACING))
    gained = handed_over_since(decode.client, before, promised)
    assert (gained.promised, gained.loaded, gained.recomputed) == (promised, promised, {})
    assert gained.receipts == ({"taken": len(RACING)} if handoff == "chain" else {})
    asked = sum(map(len, RACING))
    assert counted(decode.client, vllm_before, asked).external_hits == promised


def handed_over_tokens(fleet: HybridFleet, prompt: Prompt) -> int:
    """A window's tail is handed over as well; there is no state inside a block."""
    return fleet.hit_tokens(prompt) if fleet.model.has_states else len(prompt) - 1


@pytest.mark.parametrize("model", [*WINDOWS, STATES], indirect=True)
@pytest.mark.parametrize(("producer", "consumer"), [("tp2", "decode"), ("prefill", "tp2")])
def test_engines_of_other_tensor_parallelism_share_a_model_with_several_strands(
    fleet: HybridFleet, producer: str, consumer: str
) -> None:
    check_shared(fleet, producer, consumer)


@pytest.mark.parametrize("model", WINDOWS, indirect=True)
@pytest.mark.parametrize(("producer", "consumer"), [("block64", "decode"), ("prefill", "block64")])
def test_engines_of_other_block_sizes_share_a_model_with_windows(
    fleet: HybridFleet, producer: str, consumer: str
) -> None:
    check_shared(fleet, producer, consumer)


def check_shared(fleet: HybridFleet, producer: str, consumer: str) -> None:
    for length in (40, 128, 256, 1500, 3400):
        prompt = make_prompt(length, f"{producer} to {consumer}")
        expected = fleet.expected(prompt)
        assert ask(fleet[producer].client, prompt).is_like(expected)
        fleet.wait_kept(prompt)
        said, _, hits = ask_counted(fleet[consumer], prompt)
        assert hits == fleet.hit_tokens(prompt), f"{length} tokens"
        assert said.is_like(expected), f"{length} tokens"
    assert fleet.store.bad_files() == []


@pytest.mark.parametrize("model", WINDOWS, indirect=True)
@pytest.mark.parametrize("num_local", [192, 1216, 1344])
def test_a_local_hit_that_ends_inside_a_block_is_continued_with_what_the_window_needs(
    fleet: HybridFleet, num_local: int
) -> None:
    engine = fleet["block64"]
    prompt = make_prompt(1500, f"inside a block {num_local}")
    own = (*prompt[:num_local], 5)
    assert ask(engine.client, own).is_like(fleet.expected(own))
    assert ask(fleet["prefill"].client, prompt).is_like(fleet.expected(prompt))
    fleet.wait_kept(prompt)
    said, local, hits = ask_counted(engine, prompt)
    assert (local, hits) == (num_local, fleet.hit_tokens(prompt) - num_local)
    assert said.is_like(fleet.expected(prompt))
