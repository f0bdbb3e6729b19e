"""`ucm explain` of what real engines with several strands, or with windows, have stored."""

from __future__ import annotations

import http
import json
from pathlib import Path

import msgspec
import pytest
import yaml

pytest.importorskip("vllm")

from examples.cluster.client import Client
from examples.cluster.processes import VllmServer, ucm_connector
from tests.cli.parts import ucm
from tests.e2e.checks import counted, make_prompt, wait_until
from tests.e2e.hybrid_models import MODELS, HybridModel, make_hybrid
from tests.e2e.node import Node
from ucm.store.inspect.explain import Explanation

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(600)]

# Shares its first 1100 tokens with what is stored.
STORED = make_prompt(1500, "stored")
ASKED = STORED[:1100] + make_prompt(300, "asked")


def flags(model: HybridModel) -> list[str]:
    size = str(model.engine_block_size)
    fixed = ["--dtype", model.dtype, "--block-size", size, "--max-model-len", "4096"]
    return [*fixed, "--enable-prefix-caching", *model.flags]


def explained(config: Path, folder: Path, model: HybridModel, prompt: Path) -> Explanation:
    args = ["--model", folder, "--prompt-file", prompt, "--json", "--", *flags(model)]
    done = ucm("explain", config, *args)
    assert done.returncode == 0, done.stderr
    return msgspec.json.decode(done.stdout, type=Explanation)


def loaded(client: Client, prompt: tuple[int, ...]) -> int:
    """Tokens that the engine has had from the store."""
    status, text = client.post("/reset_prefix_cache", {})
    assert status == http.HTTPStatus.OK, text
    before = client.counters()
    client.complete(list(prompt), max_tokens=1)
    return counted(client, before, len(prompt)).external_hits


@pytest.mark.parametrize("name", ["gemma3-w129", "mistral-w129", "qwen3-next"])
def test_a_hit_ends_where_it_is_said_to_end(tmp_path: Path, name: str) -> None:
    model = MODELS[name]
    folder = make_hybrid(tmp_path, model)
    node = Node(f"explain-{name}")
    settings = {"storage_backends": str(tmp_path / "store"), **node.settings()}
    connector = {"ucm_connector_name": "UcmPipelineStore", "ucm_connector_config": settings}
    config = tmp_path / "ucm.yaml"
    sizes = {"block_tokens": model.block_size, "window_interval": 512}
    config.write_text(yaml.safe_dump({"ucm_connectors": [connector], **sizes}))
    files = {}
    for what, tokens in (("stored", STORED), ("asked", ASKED)):
        files[what] = tmp_path / f"{what}.json"
        files[what].write_text(json.dumps(list(tokens)))
    with VllmServer(
        folder,
        log=tmp_path / "log",
        kv_transfer=ucm_connector(str(config)),
        dtype=model.dtype,
        block_size=model.engine_block_size,
        args=["--enable-prefix-caching", *model.flags],
        env={"VLLM_SERVER_DEV_MODE": "1"},
    ) as server:
        server.wait_ready()
        server.client.complete(list(STORED), max_tokens=1)
        num_blocks = len(STORED) // model.block_size

        def whole() -> Explanation:
            return explained(config, folder, model, files["stored"])

        wait_until(lambda: whole().num_loadable_tokens > 0, "what is stored is there")
        found = whole()
        assert found.is_known and len(found.blocks) == num_blocks
        for what, tokens in (("stored", STORED), ("asked", ASKED)):
            told = explained(config, folder, model, files[what])
            assert told.num_loadable_tokens == loaded(server.client, tokens), what
