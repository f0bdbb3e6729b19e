"""Engines that can't go on from KV they have not just computed: they get no hits, and serve."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.cluster.processes import MIB
from tests.e2e.checks import counted, make_prompt
from tests.e2e.deployment import MAX_TOKENS, Deployment, Engine
from tests.e2e.node import Node
from tests.e2e.odd_models import make_mla_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

NO_HITS = "nothing is loaded from the store into this engine"


def pooling(kind: str) -> list[str]:
    config = json.dumps({"pooling_type": kind})
    return ["--runner", "pooling", "--convert", "embed", "--pooler-config", config]


@pytest.fixture(scope="module")
def odd_fleet(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two models that get no hits, each with a store and a node of its own."""
    folder = tmp_path_factory.mktemp("odd")
    mla = Deployment(folder / "mla", make_mla_model(folder))
    made = Deployment(folder / "pooling", tiny_model)
    # Where the machine has AMX, vLLM would take a backend that does go on from others' KV.
    args = ["--attention-backend", "CPU_MLA"]
    mla.folder.mkdir(exist_ok=True)
    with mla, made:
        engine = mla.start("mla", Node("mla"), kv_cache_bytes=64 * MIB, block_size=16, args=args)
        made.start("MEAN", Node("pooled"), kv_cache_bytes=64 * MIB, args=pooling("MEAN"))
        mla.wait_ready()
        made.wait_ready()
        made.engines["mla"] = engine
        yield made


def embed(engine: Engine, prompt: tuple[int, ...]) -> tuple[list[float], int]:
    """The embedding, and how many tokens were loaded for it."""
    before = engine.client.counters()
    status, body = engine.client.post("/v1/embeddings", {"input": list(prompt)})
    assert status == 200, body
    gained = counted(engine.client, before, len(prompt))
    return json.loads(body)["data"][0]["embedding"], gained.external_hits


def check_embeddings(made: Deployment, kind: str, *, hits: bool) -> None:
    engine = made[kind]
    prompt = make_prompt(1500, f"embedded by {kind}")
    cold, loaded = embed(engine, prompt)
    assert loaded == 0
    made.store.wait_stored(prompt)
    again, loaded = embed(engine, prompt)
    assert again == pytest.approx(cold, abs=1e-4)
    assert loaded == (engine.full_hit_tokens(prompt) if hits else 0)
    assert (NO_HITS in engine.server.log_text()) is not hits


def test_an_embedding_that_needs_the_whole_prompt_is_computed_of_all_of_it(
    odd_fleet: Deployment,
) -> None:
    check_embeddings(odd_fleet, "MEAN", hits=False)


@pytest.mark.long
def test_an_embedding_of_the_last_token_keeps_its_hits_and_one_of_the_first_gets_none(
    tiny_model: Path, tmp_path: Path
) -> None:
    kinds, node = {"CLS": False, "LAST": True}, Node("pooled")
    with Deployment(tmp_path, tiny_model) as made:
        for kind in kinds:
            made.start(kind, node, kv_cache_bytes=64 * MIB, args=pooling(kind))
        made.wait_ready()
        for kind, hits in kinds.items():
            check_embeddings(made, kind, hits=hits)


def test_mla_on_a_cpu_answers_a_stored_prompt_like_a_cold_one(odd_fleet: Deployment) -> None:
    """Its prefill and its decode compute a little unlike each other there: a hit would show."""
    engine = odd_fleet["mla"]
    for length in (257, 700, 1500):
        prompt = make_prompt(length, "mla")
        cold = engine.client.complete(prompt, max_tokens=MAX_TOKENS)
        engine.node.wait_quiet()
        before = engine.client.counters()
        again = engine.client.complete(prompt, max_tokens=MAX_TOKENS)
        assert again.token_ids == cold.token_ids
        assert counted(engine.client, before, length).external_hits == 0
    assert NO_HITS in engine.server.log_text()
