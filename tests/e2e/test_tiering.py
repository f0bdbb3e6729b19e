"""vLLM's own offloading with our tier below it: what one engine stores another loads."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from examples.cluster.models import make_model
from examples.cluster.processes import HttpServer
from tests.e2e.checks import Prompt, at_once, counted, make_prompt
from tests.e2e.deployment import Deployment, Fleets
from tests.e2e.hybrid_fleet import ask, ask_counted
from tests.e2e.hybrid_models import MODELS, HybridModel, make_hybrid
from tests.e2e.node import Node
from tests.e2e.proxies import ONE_TO_ONE, proxy
from tests.e2e.store import flip_bit
from tests.e2e.tiering_fleet import ROW_TOKENS, TieringFleet, middle_row, promises
from ucm.store.blocks.keys import Key

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

PLACES = {"p1": "prefill", "d1": "decode"}
NUM_CLIENTS = 4
LENGTHS = (40, 128, 129, 1500, 3400)
RACING = [make_prompt(1500, f"tiering race {i}") for i in range(20)]
GEMMA = MODELS["gemma3-w256"]


def start_fleet(folder: Path, model: Path, name: str, *flags: str) -> Deployment:
    """Two engines that share a store and nothing else. Neither has a prefix cache: what is cached
    is cached by vLLM's offloading."""
    made = TieringFleet(folder, model)
    patient = ("--shutdown-timeout", "20")
    made.with_tiers("prefill", Node(f"{name}-one"), chunk=512, args=(*patient, *flags))
    made.with_tiers("decode", Node(f"{name}-two"), args=flags)
    return made


@pytest.fixture
def fleet(fleets: Fleets, tmp_path_factory: pytest.TempPathFactory) -> TieringFleet:
    def start() -> Deployment:
        folder = tmp_path_factory.mktemp("tiering")
        return start_fleet(folder, make_model(folder / "model", "tiny"), "tiering")

    made = fleets.use("tiering", start)
    assert isinstance(made, TieringFleet)
    return made


@pytest.fixture
def gemma(fleets: Fleets, tmp_path_factory: pytest.TempPathFactory) -> TieringFleet:
    """With vLLM's hybrid memory manager on: layers with windows have groups of their own."""

    def start() -> Deployment:
        folder = tmp_path_factory.mktemp("tiering-gemma")
        model = make_hybrid(folder, GEMMA)
        return start_fleet(folder, model, "tiering-gemma", *GEMMA.flags)

    made = fleets.use("tiering gemma", start)
    assert isinstance(made, TieringFleet)
    return made


def hit_tokens(prompt: Prompt, model: HybridModel | None = None) -> int:
    """What vLLM's offloading loads of a prompt of which every row is there. Of a model with windows
    it leaves the last token, and does without a hit of less than a row."""
    whole = len(prompt) // ROW_TOKENS * ROW_TOKENS
    if model is None:
        return whole
    most = min(whole, len(prompt) - 1)
    return most if most >= ROW_TOKENS else 0


def check_identity(fleet: TieringFleet, model: HybridModel | None = None) -> None:
    prefill, decode = fleet["prefill"], fleet["decode"]
    for length in LENGTHS:
        prompt = make_prompt(length, "tiering identity")
        computed, _, hits = ask_counted(prefill, prompt)
        assert hits == 0, "this prompt is new"
        fleet.wait_stored_by("prefill")
        said, _, hits = ask_counted(decode, prompt)
        assert hits == hit_tokens(prompt, model), f"{length} tokens"
        assert said.is_like(computed), f"{length} tokens"
    assert fleet.store.bad_files() == []


def test_what_one_engine_has_offloaded_another_on_another_node_answers_from(
    fleet: TieringFleet,
) -> None:
    check_identity(fleet)


def check_control(fleet: TieringFleet, model: HybridModel | None = None) -> None:
    prompt = make_prompt(1500, "tiering control")
    before = set(fleet.store.blocks())
    computed = ask(fleet["prefill"].client, prompt)
    fleet.wait_stored_by("prefill")
    keys = [Key(bytes.fromhex(path.stem)) for path in set(fleet.store.blocks()) - before]
    decode = fleet["decode"]
    with decode.node.pages(fleet.store.namespace("opaque"), keys) as pages:
        for page in pages:
            page[:] = bytes(len(page))
        said, _, hits = ask_counted(decode, prompt)
    assert hits == hit_tokens(prompt, model)
    assert not said.is_like(computed)


@pytest.mark.long
def test_rows_that_are_zeros_after_verification_change_answers(fleet: TieringFleet) -> None:
    check_control(fleet)


def test_a_flipped_bit_is_computed_anew_and_not_served(fleet: TieringFleet) -> None:
    prompt = make_prompt(1500, "tiering flipped bit")
    computed = ask(fleet["prefill"].client, prompt)
    before = set(fleet.store.quarantined())
    fleet.wait_stored_by("prefill")
    flip_bit(middle_row(fleet.store, num_rows=11))

    said, _, hits = ask_counted(fleet["decode"], prompt)
    assert 0 < hits < hit_tokens(prompt) and hits % ROW_TOKENS == 0
    assert said.is_like(computed)
    assert len(set(fleet.store.quarantined()) - before) == 1
    # The engine that has computed it has stored it again.
    fleet.wait_stored_by("decode")
    assert fleet.store.bad_files() == []


def test_two_engines_that_compute_one_prompt_at_once_leave_one_sound_file_of_each_row(
    fleet: TieringFleet,
) -> None:
    before = len(fleet.store.blocks())
    prompt = make_prompt(1500, "tiering two writers")
    one, other = at_once(partial(ask, fleet[name].client, prompt) for name in PLACES.values())
    assert one.is_like(other)
    for name in PLACES.values():
        fleet.wait_stored_by(name)
    assert len(fleet.store.blocks()) == before + 11
    assert fleet.store.bad_files() == []


def race(fleet: TieringFleet, handoff: str, model: HybridModel | None = None) -> None:
    prefill, decode = fleet["prefill"], fleet["decode"]
    vllm_before, before = decode.client.counters(), promises(decode)
    said: dict[Prompt, object] = {}

    def client(server: HttpServer, mine: list[Prompt]) -> None:
        for prompt in mine:
            said[prompt] = ask(server.client, prompt, cache_salt=handoff)

    with proxy(fleet, f"{ONE_TO_ONE} --handoff {handoff}", PLACES) as server:
        at_once(partial(client, server, RACING[i::NUM_CLIENTS]) for i in range(NUM_CLIENTS))
    gained = counted(decode.client, vllm_before, sum(map(len, RACING)))
    assert gained.external_hits == sum(hit_tokens(prompt, model) for prompt in RACING)
    assert promises(decode) - before == {"kept": len(RACING)}
    for prompt in RACING:
        assert ask(prefill.client, prompt, cache_salt=handoff).is_like(said[prompt])  # type: ignore[arg-type]


@pytest.mark.long
def test_a_prefill_that_is_told_to_end_and_given_time_hands_on_first_what_it_has_computed(
    fleet: TieringFleet,
) -> None:
    """Until it is told its node cache stands still, and takes nothing."""
    prefill = fleet["prefill"]
    ask(prefill.client, make_prompt(130, "tiering warm up"))
    prompt = make_prompt(1500, "tiering drain")
    pid = prefill.node.status().pid

    def go_on() -> None:
        time.sleep(1.0)
        os.kill(pid, signal.SIGCONT)

    os.kill(pid, signal.SIGSTOP)
    try:
        computed = ask(prefill.client, prompt)
    except BaseException:
        go_on()
        raise
    at_once([prefill.server.stop, go_on])
    fleet.start_again("prefill")
    fleet.wait_ready()
    said, _, hits = ask_counted(fleet["decode"], prompt)
    assert hits == hit_tokens(prompt)
    assert said.is_like(computed)


@pytest.mark.parametrize("handoff", ["chain", pytest.param("overlap", marks=pytest.mark.long)])
def test_decode_asked_at_once_loads_every_row_of_20_prompts_of_20(
    fleet: TieringFleet, handoff: str
) -> None:
    """Where vLLM's fs tier loses most of them: docs/tiering.md."""
    race(fleet, handoff)


@pytest.mark.long
def test_a_model_with_windows_is_handed_over_with_the_hybrid_memory_manager_on(
    gemma: TieringFleet,
) -> None:
    check_identity(gemma, GEMMA)


@pytest.mark.long
def test_rows_of_a_model_with_windows_as_well(gemma: TieringFleet) -> None:
    check_control(gemma, GEMMA)


@pytest.mark.long
@pytest.mark.parametrize("handoff", ["chain", "overlap"])
def test_of_a_model_with_windows_as_well(gemma: TieringFleet, handoff: str) -> None:
    race(gemma, handoff, GEMMA)
