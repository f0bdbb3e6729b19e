"""Models that can't be served correctly stop vLLM's start, with a sentence that says what helps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.cluster.processes import VllmServer
from tests.e2e.checks import check_refused
from tests.e2e.deployment import Deployment, Fleets
from tests.e2e.hybrid_models import MODELS, HybridModel, make_hybrid
from tests.e2e.node import Node

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(600)]

# All of its layers have states.
MAMBA = HybridModel(
    name="mamba2",
    config="Mamba2Config",
    fields={
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "state_size": 64,
        "num_heads": 8,
        "head_dim": 32,
        "n_groups": 1,
        "tie_word_embeddings": False,
    },
    flags=("--max-num-batched-tokens", "256"),
    block_size=256,
)
GUESSES = ("--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}')
CASES = {
    "states alone": (
        MAMBA,
        ("--enable-prefix-caching",),
        (
            "no layer of this model attends to the whole prompt (state: 2 layers), and UCM needs "
            "one beside chunks or states: run it without UCM"
        ),
    ),
    "states without prefix caching": (
        MODELS["granite4"],
        ("--no-enable-prefix-caching",),
        "whose states vLLM keeps only with prefix caching: set --enable-prefix-caching",
    ),
    "states with guesses": (
        MODELS["qwen3-next"],
        ("--enable-prefix-caching", *GUESSES),
        "and UCM can't tell them apart yet: leave out --speculative-config",
    ),
    "states and other blocks": (
        MODELS["granite4"],
        ("--enable-prefix-caching", "--block-size", "512"),
        (
            "keeps the states of its linear-attention or Mamba layers every 512 tokens: set "
            "block_tokens to 512 on all instances"
        ),
    ),
}


@pytest.fixture(scope="module")
def refused_models(
    fleets: Fleets, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, VllmServer]]:
    fleets.end()
    folder: Path = tmp_path_factory.mktemp("refused")
    made: dict[str, Deployment] = {}
    try:
        for case, (model, flags, _) in CASES.items():
            deployment = Deployment(folder, make_hybrid(folder, model))
            made[case] = deployment
            deployment.start(
                case.replace(" ", "-"),
                Node(f"refused {case}"),
                block_size=model.block_size,
                block_tokens=model.block_size,
                dtype=model.dtype,
                prefix_caching=True,
                args=[*model.flags, *flags],
            )
        yield {case: next(iter(each.engines.values())).server for case, each in made.items()}
    finally:
        for deployment in made.values():
            deployment.kill()


@pytest.mark.parametrize("case", CASES)
def test_an_engine_of_such_a_model_ends_with_one_sentence(
    refused_models: dict[str, VllmServer], case: str
) -> None:
    check_refused(refused_models[case], CASES[case][2], timeout_s=240.0)
