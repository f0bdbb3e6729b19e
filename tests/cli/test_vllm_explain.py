"""`ucm explain` of what a real engine has stored."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("vllm")

from examples.cluster.models import make_model
from examples.cluster.processes import VllmServer, ucm_connector
from tests.cli.parts import flip_bit, ucm
from tests.e2e.node import Node
from tests.integration.engine.naming_parts import make_adapter
from ucm.store.inspect.explain import Explanation
from ucm.store.inspect.page_report import files_of

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(600)]

TEXT = "A page that one machine has computed need not be computed by another machine again. "
# As the server is started.
FLAGS = ("--", "--dtype", "float32", "--max-model-len", "4096")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("explain")


@pytest.fixture(scope="module")
def model(place: Path) -> Path:
    return make_model(place, "tiny")


@pytest.fixture(scope="module")
def prompt_file(place: Path) -> Path:
    file = place / "prompt.txt"
    file.write_text(TEXT * 40)
    return file


@pytest.fixture(scope="module")
def store(place: Path, model: Path, prompt_file: Path) -> Iterator[Path]:
    """What an engine has stored of the prompt, once without a salt and once with one."""
    import yaml

    folder = place / "store"
    node = Node("explain")
    settings = {"storage_backends": str(folder), **node.settings()}
    connector = {"ucm_connector_name": "UcmPipelineStore", "ucm_connector_config": settings}
    config = place / "ucm.yaml"
    config.write_text(yaml.safe_dump({"ucm_connectors": [connector]}))
    with VllmServer(model, log=place / "log", kv_transfer=ucm_connector(str(config))) as server:
        server.wait_ready()
        server.client.complete(prompt_file.read_text(), max_tokens=1, cache_salt="tenant")
        deadline_s = time.monotonic() + 60
        while len(list(folder.glob("*/??/??/*.kv"))) < 5:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        yield folder


def explained(store: Path, model: Path, *args: object, status: int = 0) -> Explanation:
    done = ucm("explain", store, "--model", model, "--json", *args)
    assert done.returncode == status, done.stderr
    return msgspec.json.decode(done.stdout, type=Explanation)


def test_the_engines_pages_are_found_by_its_flags_alone(
    store: Path, model: Path, prompt_file: Path
) -> None:
    found = explained(store, model, "--prompt-file", prompt_file, "--cache-salt", "tenant", *FLAGS)
    assert found.is_known and found.num_loadable == len(found.blocks) == 5
    for block in found.blocks:
        assert files_of([str(store)], block.key) == [block.where]


def test_another_salt_and_another_dtype_are_told(
    store: Path, model: Path, prompt_file: Path
) -> None:
    prompt = ("--prompt-file", prompt_file, "--try-salt", "tenant")
    found = explained(store, model, *prompt, *FLAGS)
    assert {block.state for block in found.blocks} == {"other_salt"}

    bfloat16 = (*FLAGS[:2], "bfloat16", *FLAGS[3:])
    found = explained(store, model, *prompt, *bfloat16)
    assert {block.state for block in found.blocks} == {"other_dtype"}
    # On a CPU with AMX the layout as well.
    fields = {line.partition(":")[0] for line in found.differences}
    assert not found.is_known and {"kv_dtype", "model_dtype"} <= fields


def test_another_adapter_is_told(
    store: Path, model: Path, prompt_file: Path, tmp_path: Path
) -> None:
    prompt = ("--prompt-file", prompt_file, "--cache-salt", "tenant")
    adapter = make_adapter(tmp_path / "adapter")
    found = explained(store, model, *prompt, "--adapter", adapter, *FLAGS)
    assert {block.state for block in found.blocks} == {"other_adapter"}
    assert found.blocks[0].why.startswith("stored with no adapter, asked for with the adapter ")


def test_never_stored_corrupt_and_reclaimed_are_told_apart(
    store: Path, model: Path, prompt_file: Path, tmp_path: Path
) -> None:
    prompt = ("--prompt-file", prompt_file, "--cache-salt", "tenant", *FLAGS)
    never = tmp_path / "never.txt"
    never.write_text("Nobody has asked that. " + TEXT * 40)
    found = explained(store, model, "--prompt-file", never, *FLAGS)
    assert found.tail is not None
    assert {block.state for block in [*found.blocks, found.tail]} == {"not_stored"}

    found = explained(store, model, *prompt)
    flip_bit(Path(found.blocks[2].where))
    found = explained(store, model, *prompt, status=3)
    assert [block.state for block in found.blocks] == [
        *("stored", "stored", "corrupt", "stored", "stored")
    ]

    # More than there is.
    assert ucm("reclaim", store, "--free-gb", 1, "--grace-s", 0).returncode == 3
    found = explained(store, model, *prompt)
    assert {block.state for block in found.blocks} == {"reclaimed"}


def test_a_prompt_file_that_is_missing_is_told_before_vllm_is_asked(
    store: Path, tmp_path: Path
) -> None:
    """Which would say no to this model."""
    missing = tmp_path / "none.txt"
    done = ucm("explain", store, "--model", store / "none", "--prompt-file", missing)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"ucm explain: {missing}: can't be read: No such file or directory\n"


def test_a_model_that_is_not_there_is_told_in_our_words(store: Path, prompt_file: Path) -> None:
    """Not in Hugging Face's, which are about names of repositories."""
    model = store / "none"
    done = ucm("explain", store, "--model", model, "--prompt-file", prompt_file)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"ucm explain: --model {model}: is not there: name the model as ")


def test_what_vllm_says_no_to_is_one_line(store: Path, prompt_file: Path) -> None:
    for model, hint in ((store, ""), ("none", ", which is no folder here, and so a name on Hug")):
        done = ucm("explain", store, "--model", model, "--prompt-file", prompt_file)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        begins = f"ucm explain: vLLM could not be asked about {model}{hint or ': '}"
        assert done.stderr.startswith(begins), done.stderr
