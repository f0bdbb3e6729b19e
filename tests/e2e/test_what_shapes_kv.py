"""Adapters, drafts, pauses, and another connector beside ours: what shares, and what must not."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from examples.cluster.client import Answer, Client, total
from examples.cluster.processes import MIB
from tests.e2e.checks import check_answer, check_loaded, counted, make_prompt, wait_until
from tests.e2e.deployment import MAX_TOKENS, Deployment, Fleets, Oracle
from tests.e2e.node import Node
from tests.e2e.odd_models import write_adapter

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

# One adapter on the device, and none beside it: vLLM reads each anew after the other.
ONE_ADAPTER = ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "1", "--max-cpu-loras", "1"]
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 4,
    "prompt_lookup_min": 2,
}
RUNTIME = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1"}


def beside_another(ours: dict[str, Any], folder: Path) -> dict[str, Any]:
    """docs/pd.md's example of MultiConnector, with the settings and the folder of here."""
    text = (Path(__file__).parents[2] / "docs" / "pd.md").read_text()
    examples = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]
    (both,) = [made for made in examples if made.get("kv_connector") == "MultiConnector"]
    own, other = both["kv_connector_extra_config"]["connectors"]
    assert own.keys() == ours.keys()
    own["kv_connector_extra_config"] = ours["kv_connector_extra_config"]
    other["kv_connector_extra_config"]["shared_storage_path"] = str(folder)
    return both


@pytest.fixture
def pair(fleets: Fleets, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    """`plain` takes adapters at run time and keeps its epoch when it is paused; `drafting` guesses
    from the prompt, and has another connector beside ours."""

    def start() -> Deployment:
        made = Deployment(tmp_path_factory.mktemp("kinds"), tiny_model)
        node = Node("kinds")
        small = {"kv_cache_bytes": 64 * MIB}
        made.start("plain", node, args=ONE_ADAPTER, env=RUNTIME, reset_epoch="keep", **small)
        made.start(
            "drafting",
            node,
            # ExampleConnector stores what the first chunk of a prompt computes as if it were all.
            chunk=4096,
            args=["--speculative-config", json.dumps(NGRAM)],
            wrap=lambda ours: beside_another(ours, made.folder / "example"),
            **small,
        )
        return made

    return fleets.use("kinds", start)


def load_adapter(client: Client, name: str, folder: Path) -> None:
    body = {"lora_name": name, "lora_path": str(folder)}
    status, text = client.post("/v1/load_lora_adapter", body)
    assert status == 200, text


def ask(client: Client, prompt: tuple[int, ...], adapter: str, **more: Any) -> tuple[Answer, int]:
    """The answer, and how many tokens were loaded."""
    before = client.counters()
    answer = client.complete(prompt, max_tokens=MAX_TOKENS, model=adapter, **more)
    return answer, counted(client, before, len(prompt)).external_hits


def test_an_engine_that_guesses_from_the_prompt_shares_with_one_that_does_not(
    pair: Deployment, oracle: Oracle
) -> None:
    """Both ways, and with another connector at its side, whose statistics and ours are shown."""
    for storing, loading in (("plain", "drafting"), ("drafting", "plain")):
        prompt = make_prompt(1500, f"stored by {storing}")
        expected = oracle.answer(prompt)
        check_answer(pair[storing], prompt, expected)
        pair.store.wait_stored(prompt)
        check_loaded(pair[loading], prompt, expected)
    client = pair["drafting"].client
    wait_until(lambda: total(client.metrics(), "ucm_hit_tokens_total") >= 1408, "ours are shown")


def test_an_engine_that_was_paused_goes_on_with_what_is_stored(
    pair: Deployment, oracle: Oracle
) -> None:
    engine = pair["plain"]
    prompt = make_prompt(1500, "before a pause")
    expected = oracle.answer(prompt)
    check_answer(engine, prompt, expected)
    pair.store.wait_stored(prompt)
    for call in ("/pause", "/resume", "/reset_prefix_cache?reset_external=true"):
        status, text = engine.client.post(call, {})
        assert status == 200, text
    check_loaded(engine, prompt, expected)
    # And what it stores, others have.
    later = make_prompt(1500, "after a pause")
    check_answer(engine, later, oracle.answer(later))
    pair.store.wait_stored(later)
    check_loaded(pair["drafting"], later, oracle.answer(later))


def test_an_adapter_is_shared_by_its_content_and_never_with_what_is_written_over_it(
    pair: Deployment, tmp_path: Path
) -> None:
    """Overwritten in place, thrown out of vLLM's memory by another one, and read again."""
    client = pair["plain"].client
    prompt = make_prompt(1500, "adapted")
    old = write_adapter(tmp_path / "mine", seed=1)
    copy = shutil.copytree(old, tmp_path / "copy")
    new = write_adapter(tmp_path / "new", seed=2)
    for name, folder in (("mine", old), ("copy", copy), ("new", new)):
        load_adapter(client, name, folder)

    first, loaded = ask(client, prompt, "mine")
    assert loaded == 0
    pair["plain"].node.wait_quiet()
    again, loaded = ask(client, prompt, "copy")
    assert (again.token_ids, loaded) == (first.token_ids, pair["plain"].full_hit_tokens(prompt))
    other, loaded = ask(client, prompt, "new")
    assert loaded == 0 and other.token_ids != first.token_ids

    write_adapter(old, seed=2)
    # "mine" was thrown out by the others: vLLM reads what is there now.
    rewritten, loaded = ask(client, prompt, "mine")
    assert (rewritten.token_ids, loaded) == (other.token_ids, 0)
    # Nor did it store anything under the name of what was there before.
    pair["plain"].node.wait_quiet()
    assert ask(client, prompt, "copy")[0].token_ids == first.token_ids
    # Under a new id it is what it is.
    load_adapter(client, "mine again", old)
    anew, loaded = ask(client, prompt, "mine again")
    assert (anew.token_ids, loaded) == (other.token_ids, pair["plain"].full_hit_tokens(prompt))
