"""Models whose layers need unlike parts of a prompt: windows, chunks, states and full attention.

What one engine stores another loads, and answers with the tokens and the logprobs of a vLLM that
has no UCM and computes all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.checks import (
    Prompt,
    at_once,
    handed_over,
    handed_over_since,
    make_prompt,
    metric,
    missed_blocks,
)
from tests.e2e.deployment import Deployment, Fleets
from tests.e2e.hybrid_fleet import (
    ROUNDED_LOGPROBS,
    HybridFleet,
    ask,
    ask_counted,
    longest_end,
    strands,
    wait_kept,
)
from tests.e2e.hybrid_models import MODELS, HybridModel, make_hybrid
from tests.e2e.node import Node
from tests.e2e.store import cut_short, flip_bit
from ucm.handoff import Wanted, params

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

LENGTHS = (40, 128, 1500, 3400)
STATE_LENGTHS = (40, 255, 256, 257, 512, 1500, 3400)
MANY_TOKENS = 24
PREEMPTED = "vllm:num_preemptions_total"


# Of the engine's memory, in blocks of its groups: about two prompts' of the test's that uses it. Of
# those with states hardly more than vLLM starts with, which wants room for the longest prompt.
CRAMPED_BLOCKS = {
    **dict.fromkeys(MODELS, 90),
    "mistral-w129": 12,
    "mistral-w256": 12,
    "gemma4": 150,
    "qwen3-next": 28,
    "granite4": 28,
    "falcon-h1": 20,
    "nemotron-h": 25,
}


# A window of a block and a token, chunks, windows alone, and states: the others are of these kinds.
STAND_FOR_OTHERS = ("gemma3-w129", "mistral-w129", "qwen3-next")
EACH = [
    pytest.param(name, marks=() if name in STAND_FOR_OTHERS else pytest.mark.models)
    for name in MODELS
]


@pytest.fixture(scope="module", params=EACH)
def model(request: pytest.FixtureRequest) -> HybridModel:
    """All tests of one model come after each other."""
    return MODELS[request.param]


@pytest.fixture
def fleet(
    model: HybridModel, fleets: Fleets, tmp_path_factory: pytest.TempPathFactory
) -> HybridFleet:
    """`prefill` and `decode` on nodes of their own, and `cramped`, on decode's node, with blocks
    for two prompts. The last two have prefix caches."""

    def start() -> HybridFleet:
        made = HybridFleet(tmp_path_factory.mktemp(model.name), model)
        one, two = Node(f"{model.name}-one"), Node(f"{model.name}-two")
        made.start("prefill", one, chunk=512)
        made.start("decode", two, prefix_caching=True)
        cramped = ["--num-gpu-blocks-override", str(CRAMPED_BLOCKS[model.name])]
        made.start("cramped", two, chunk=512, prefix_caching=True, args=cramped)
        return made

    made = fleets.use(f"hybrid {model.name}", start)
    assert isinstance(made, HybridFleet)
    return made


@pytest.mark.parametrize(
    "name", ["gemma3-w129", pytest.param("mistral-w129", marks=pytest.mark.long)]
)
def test_from_the_store_a_model_with_windows_answers_as_it_did_when_it_computed_all(
    name: str, fleets: Fleets, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One engine, which has no prefix cache. With a window of a block and a token more, a hit on a
    whole prompt would leave its last token without the first of its window."""
    model = MODELS[name]

    def start() -> Deployment:
        folder = tmp_path_factory.mktemp("windows")
        made = Deployment(folder, make_hybrid(folder, model))
        made.start("both", Node(f"{name} windows"), chunk=512)
        return made

    made = fleets.use(f"{name} windows", start)
    engine, store = made["both"], made.store
    for length in (model.block_size, 1500):
        prompt = make_prompt(length, "cold, then loaded")
        cold, _, hits = ask_counted(engine, prompt)
        assert hits == 0
        wait_kept(store, model, prompt)
        loaded, _, hits = ask_counted(engine, prompt)
        assert hits == model.hit_tokens(length)
        assert loaded.is_like(cold), f"{length} tokens: {loaded} after {cold}"
    # The control: what of the windows is loaded is what the answer depends on.
    window = strands(store)[-1]
    keys = [window.key(prompt, block) for block in window.needed(model.hit_tokens(len(prompt)))]
    with engine.node.pages(window.namespace, keys) as pages:
        for page in pages:
            page[:] = bytes(len(page))
        assert not ask(engine.client, prompt).is_like(cold)


@pytest.mark.long
def test_decode_answers_as_plain_vllm_does_from_what_prefill_has_stored(
    fleet: HybridFleet,
) -> None:
    prefill, decode = fleet["prefill"], fleet["decode"]
    window = fleet.model.window
    around = {*LENGTHS, window - 1, window, window + 1}
    for length in STATE_LENGTHS if fleet.model.has_states else sorted(around):
        prompt = make_prompt(length, "identity")
        expected = fleet.expected(prompt)
        assert ask(prefill.client, prompt).is_like(expected), f"prefill, {length} tokens"
        fleet.wait_kept(prompt)
        said, local, hits = ask_counted(decode, prompt)
        assert (local, hits) == (0, fleet.hit_tokens(prompt)), f"{length} tokens"
        assert said.is_like(expected), f"decode, {length} tokens: {said}, {expected}"
    assert fleet.store.bad_files() == []


@pytest.mark.long
@pytest.mark.parametrize("num_local", [640, 1280])
def test_what_decode_has_itself_and_what_it_loads_meet_in_one_request(
    fleet: HybridFleet, num_local: int
) -> None:
    """Behind the second, less is loaded than a window. Of states it has the last one itself."""
    decode, block = fleet["decode"], fleet.model.block_size
    prompt = make_prompt(1600 if fleet.model.has_states else 1500, f"shared {num_local}")
    own = (*prompt[:num_local], 5)
    assert ask(decode.client, own).is_like(fleet.expected(own))
    assert ask(fleet["prefill"].client, prompt).is_like(fleet.expected(prompt))
    fleet.wait_kept(prompt)
    said, local, hits = ask_counted(decode, prompt)
    has = num_local // block * block
    assert (local, hits) == (has, fleet.hit_tokens(prompt) - has)
    assert said.is_like(fleet.expected(prompt))


@pytest.mark.long
def test_the_identity_test_fails_when_the_pages_of_any_strand_are_zeros_after_verification(
    fleet: HybridFleet,
) -> None:
    decode = fleet["decode"]
    # What is in a prefix cache is not loaded again, so each strand has a prompt of its own.
    for number in range(len(strands(fleet.store))):
        prompt = make_prompt(1500, f"control {number}")
        ask(fleet["prefill"].client, prompt)
        fleet.wait_kept(prompt)
        strand = strands(fleet.store)[number]
        keys = [strand.key(prompt, block) for block in strand.needed(fleet.hit_tokens(prompt))]
        with decode.node.pages(strand.namespace, keys) as pages:
            for page in pages:
                page[:] = bytes(len(page))
            said, local, hits = ask_counted(decode, prompt)
        assert (local, hits) == (0, fleet.hit_tokens(prompt))
        assert not said.is_like(fleet.expected(prompt)), strand.reach
        if not fleet.model.is_exact:
            assert fleet.distance(prompt, said) > ROUNDED_LOGPROBS, strand.reach


@pytest.mark.long
@pytest.mark.parametrize("damage", [Path.unlink, flip_bit, cut_short])
def test_without_a_page_of_a_side_strand_a_prompt_is_loaded_to_an_earlier_boundary_or_not_at_all(
    fleet: HybridFleet, damage: Callable[[Path], None]
) -> None:
    prefill, decode = fleet["prefill"], fleet["decode"]
    reason = "never_stored" if damage is Path.unlink else "corrupt"
    for length in (1500, max(LENGTHS)):
        prompt = make_prompt(length, f"damage {damage.__name__}")
        # Of a prompt one state is kept: an earlier one is that of a shorter prompt. It is found one
        # block before the last.
        shorter: Prompt = ()
        if fleet.model.has_states and length == max(LENGTHS):
            shorter = prompt[: fleet.hit_tokens(prompt) - fleet.model.block_size + 1]
            ask(prefill.client, shorter)
            fleet.wait_kept(shorter)
        ask(prefill.client, prompt)
        fleet.wait_kept(prompt)
        *_, side = fleet.kept_files(prompt).values()
        file = side[max(side)]
        earlier = longest_end(fleet.store, fleet.model, prompt, without=file)
        earlier = max(earlier, fleet.hit_tokens(shorter) if shorter else 0)
        damage(file)
        before = missed_blocks(decode.client)
        said, local, hits = ask_counted(decode, prompt)
        assert said.is_like(fleet.expected(prompt))
        assert (local, hits) == (0, earlier), f"{length} tokens"
        num_missed = (fleet.hit_tokens(prompt) - earlier) // fleet.model.block_size
        assert missed_blocks(decode.client) - before == {reason: num_missed}
        # Decode has computed it, and stores what was not there.
        fleet.wait_kept(prompt)
        decode.node.wait_quiet()
        assert fleet.store.bad_files() == []


def cramped_prompts(model: HybridModel) -> list[Prompt]:
    """What is said behind each goes on into another block. Those of windows differ more in length:
    each of them holds less."""
    if model.has_states:
        lengths = [512 + model.block_size * (i % 3) for i in range(8)]
    else:
        lengths = [640 + model.block_size * i for i in range(8)]
    return [make_prompt(length - 10, f"cramped {i}") for i, length in enumerate(lengths)]


@pytest.mark.long
def test_what_a_damaged_page_of_a_side_strand_costs_of_a_promise_counts_as_corrupt_and_not_as_late(
    fleet: HybridFleet,
) -> None:
    """Behind it nothing is waited for that prefill has never kept."""
    prefill, decode = fleet["prefill"], fleet["decode"]
    prompt = make_prompt(1500, "damaged promise")
    receipt = prefill.client.prefill(prompt, params=params(Wanted()))
    fleet.wait_kept(prompt)
    *_, side = fleet.kept_files(prompt).values()
    cut_short(side[max(side)])
    promised = fleet.hit_tokens(prompt) if fleet.model.has_states else len(prompt) - 1
    before = handed_over(decode.client)
    said = ask(decode.client, prompt, kv_transfer_params=receipt)
    assert said.is_like(fleet.expected(prompt))
    gained = handed_over_since(decode.client, before, promised)
    assert gained.promised == promised
    assert gained.recomputed == {"corrupt": promised - gained.loaded}


@pytest.mark.long
def test_preempted_requests_are_answered_as_plain_vllm_does(fleet: HybridFleet) -> None:
    """Half of the prompts are in the store; what is stored of the others is loaded afterwards.
    Where a step is a block, an engine that decodes has room for what lies behind a hit and for no
    more: there all are in the store."""
    if fleet.model.name == "mistral-w129":
        pytest.skip("of its windows alone so little is held that none are preempted")
    engine = fleet["cramped"]
    prompts = cramped_prompts(fleet.model)
    for prompt in prompts if fleet.model.steps_are_blocks else prompts[::2]:
        ask(fleet["prefill"].client, prompt)
        fleet.wait_kept(prompt)
    expected = [fleet.expected(prompt, max_tokens=MANY_TOKENS) for prompt in prompts]
    num_preempted = [metric(engine.client, PREEMPTED)]
    for _ in range(3):
        asking = (partial(ask, engine.client, each, max_tokens=MANY_TOKENS) for each in prompts)
        answers = zip(prompts, at_once(asking), expected, strict=True)
        others = [(prompt, said) for prompt, said, right in answers if not said.is_like(right)]
        num_preempted.append(metric(engine.client, PREEMPTED))
        # In bfloat16 what a preempted request had said is rounded otherwise when it goes on.
        rounded = 0 if fleet.model.is_exact else num_preempted[-1] - num_preempted[-2]
        assert len(others) <= rounded, others
        for prompt, said in others:
            assert fleet.distance(prompt, said) < ROUNDED_LOGPROBS
    assert num_preempted[-1] > num_preempted[0], "the test must be harder"
    engine.node.wait_quiet()
    assert fleet.store.bad_files() == []
    for prompt, right in zip(prompts, expected, strict=True):
        assert ask(fleet["decode"].client, prompt, max_tokens=MANY_TOKENS).is_like(right)
