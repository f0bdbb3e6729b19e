"""Models whose layers need unlike parts of a prompt: windows and chunks beside full attention.

What one engine stores another loads, and answers with the tokens and the logprobs of a vLLM that
has no UCM and computes all of it.
"""

from __future__ import annotations

import pytest

from tests.e2e.checks import make_prompt
from tests.e2e.deployment import Deployment, Fleets
from tests.e2e.hybrid_fleet import (
    HybridFleet,
    ask,
    ask_counted,
    hit_tokens,
    strands,
    wait_kept,
)
from tests.e2e.hybrid_models import MODELS, make_hybrid
from tests.e2e.node import Node
from tests.e2e.store import BLOCK_TOKENS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

LENGTHS = (40, 128, 1500, 3400)
INTERVAL = 2048


@pytest.fixture(params=MODELS)
def fleet(
    request: pytest.FixtureRequest, fleets: Fleets, tmp_path_factory: pytest.TempPathFactory
) -> HybridFleet:
    """`prefill` and `decode` on nodes of their own, and `cramped`, on decode's node, with blocks
    for two prompts. The last two have prefix caches."""
    model = MODELS[request.param]

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


# In as many groups as vLLM makes of a model's layers.
CRAMPED_BLOCKS = dict.fromkeys(MODELS, 90)


def test_from_the_store_a_model_with_windows_answers_as_it_did_when_it_computed_all(
    fleets: Fleets, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One engine, which has no prefix cache. With a window of a block and a token more, a hit on a
    whole prompt would leave its last token without the first of its window."""
    model = MODELS["gemma3-w129"]

    def start() -> Deployment:
        folder = tmp_path_factory.mktemp("windows")
        made = Deployment(folder, make_hybrid(folder, model))
        made.start("both", Node("windows"), chunk=512)
        return made

    made = fleets.use("windows", start)
    engine, store = made["both"], made.store
    for length in (BLOCK_TOKENS, 1500):
        prompt = make_prompt(length, "cold, then loaded")
        cold, _, hits = ask_counted(engine, prompt)
        assert hits == 0
        wait_kept(store, prompt)
        loaded, _, hits = ask_counted(engine, prompt)
        assert hits == hit_tokens(prompt)
        assert loaded.is_like(cold), f"{length} tokens: {loaded} after {cold}"
    # The control: what of the windows is loaded is what the answer depends on.
    window = strands(store)[1]
    keys = [window.key(prompt, block) for block in window.needed(hit_tokens(prompt))]
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
    for length in sorted({*LENGTHS, window - 1, window, window + 1}):
        prompt = make_prompt(length, "identity")
        expected = fleet.expected(prompt)
        assert ask(prefill.client, prompt).is_like(expected), f"prefill, {length} tokens"
        wait_kept(fleet.store, prompt)
        said, local, hits = ask_counted(decode, prompt)
        assert (local, hits) == (0, hit_tokens(prompt)), f"{length} tokens"
        assert said.is_like(expected), f"decode, {length} tokens: {said}, {expected}"
    assert fleet.store.bad_files() == []
