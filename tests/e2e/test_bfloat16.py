"""In bfloat16 the measure is vLLM's own prefix hit: a cold run is cut into other chunks, and
differs by itself now and then."""

from __future__ import annotations

import shutil

import pytest

from tests.e2e.checks import LENGTHS, check_loaded, counted, make_prompt
from tests.e2e.deployment import MAX_TOKENS, Deployment

# Canonical, or opaque where the processor has AMX, for which vLLM packs what is in bfloat16.
ANY = ""

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("producer", "consumer"),
    [("bfloat16-layerwise", "bfloat16"), ("bfloat16", "bfloat16-layerwise")],
)
def test_loaded_blocks_give_the_tokens_of_the_prefill_instances_own_prefix_hit(
    unlike_fleet: Deployment, producer: str, consumer: str
) -> None:
    prefill, decode = unlike_fleet[producer], unlike_fleet[consumer]
    store = unlike_fleet.store.of("bfloat16")
    for length in LENGTHS:
        prompt = make_prompt(length, f"bfloat16 {producer}")
        prefill.client.complete(prompt, max_tokens=1)
        store.wait_stored(prompt, ANY)
        before = prefill.client.counters()
        own = prefill.client.complete(prompt, max_tokens=MAX_TOKENS)
        gained = counted(prefill.client, before, length)
        # vLLM computes at least one token, and so all of a prompt that is just one block.
        assert gained.local_hits == (length - 1) // 128 * 128
        check_loaded(decode, prompt, own.token_ids)
    assert store.bad_files() == []


@pytest.mark.parametrize("name", ["bfloat16-layerwise", "bfloat16"])
def test_blocks_that_vllm_has_in_its_prefix_cache_and_the_store_has_lost_are_stored_again(
    unlike_fleet: Deployment, name: str
) -> None:
    engine, store = unlike_fleet[name], unlike_fleet.store.of("bfloat16")
    prompt = make_prompt(1500, f"lost {name}")
    engine.client.complete(prompt)
    store.wait_stored(prompt, ANY)
    files = store.files(prompt, ANY)
    engine.node.leave()
    shutil.rmtree(store.folder / store.namespace(ANY).fingerprint.hex())
    # The first request after the loss may go by without a node cache.
    for i in range(20):
        before = engine.client.counters()
        engine.client.complete((*prompt, 3 + i), max_tokens=1)
        gained = counted(engine.client, before, len(prompt) + 1)
        assert gained.local_hits == 11 * 128, "vLLM has them itself"
        engine.node.wait("there again", lambda status: bool(status.sessions))
        engine.node.wait_quiet()
        if files[0].exists():
            break
    store.wait_stored(prompt, ANY)
    assert store.bad_files() == []
