"""The identity of weights: what changes it, and what must not."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ucm.errors import UnsupportedEngine
from ucm.store.blocks.weights import lora_digest, weights_identity

SMALL = 512
BIG = 40_000


def write_safetensors(path: Path, tensors: dict[str, bytes]) -> None:
    header, position = {}, 0
    for name, data in tensors.items():
        offsets = [position, position + len(data)]
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": offsets}
        position += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(tensors.values()))


def make_model(folder: Path, *, seed: int = 0) -> Path:
    """Two shards: one of tensors smaller than a sample, one of a tensor that is larger."""
    folder.mkdir(parents=True)
    write_safetensors(
        folder / "model-00001-of-00002.safetensors",
        {"layers.0.q": bytes([seed]) * SMALL, "layers.0.k": bytes([seed, 1]) * (SMALL // 2)},
    )
    write_safetensors(folder / "model-00002-of-00002.safetensors", {"lm_head": bytes([seed]) * BIG})
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    return folder


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def test_a_copy_of_a_model_elsewhere_is_the_same_model(tmp_path: Path) -> None:
    """The path is where it is mounted, not what it is."""
    model = make_model(tmp_path / "models" / "qwen")
    expected = weights_identity(model)

    copy = shutil.copytree(model, tmp_path / "elsewhere" / "another-name")
    (tmp_path / "link").symlink_to(model)

    assert expected == weights_identity(copy)
    assert expected == weights_identity(tmp_path / "link")
    assert expected.startswith("sha256:")


def test_links_into_a_hub_cache_are_followed(tmp_path: Path) -> None:
    """Downloaded models are folders of links to blobs with other names."""
    model = make_model(tmp_path / "qwen")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        blob = shutil.copy(file, tmp_path / f"blob{number}")
        (snapshot / file.name).symlink_to(blob)

    assert weights_identity(model) == weights_identity(snapshot)


def test_two_fine_tunes_of_one_base_are_different(tmp_path: Path) -> None:
    """The same names, sizes, types and shapes, with other numbers."""
    base = make_model(tmp_path / "base", seed=0)
    tuned = make_model(tmp_path / "tuned", seed=1)

    assert weights_identity(base) != weights_identity(tuned)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_in_the_header_or_in_what_is_sampled_changes_it(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Every byte of a tensor that is smaller than a sample is sampled."""
    model = make_model(tmp_path_factory.mktemp("models") / "qwen")
    file = model / "model-00001-of-00002.safetensors"
    expected = weights_identity(model)

    flip(file, data.draw(st.integers(0, file.stat().st_size - 1)))

    assert expected != weights_identity(model)


def test_every_large_tensor_is_sampled_somewhere(tmp_path: Path) -> None:
    """Training moves a tensor nearly everywhere, so one sample of it tells."""
    model = make_model(tmp_path / "qwen")
    expected = weights_identity(model)

    file = model / "model-00002-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-BIG:] = bytes(byte ^ 1 for byte in data[-BIG:])
    file.write_bytes(data)

    assert expected != weights_identity(model)


def test_how_a_model_is_cut_into_files_is_not_who_it_is(tmp_path: Path) -> None:
    """One and the same checkpoint is published in shards and whole."""
    shards = make_model(tmp_path / "shards")
    whole = make_model(tmp_path / "whole")
    tensors = {
        "lm_head": bytes([0]) * BIG,
        "layers.0.k": bytes([0, 1]) * (SMALL // 2),
        "layers.0.q": bytes([0]) * SMALL,
    }
    for file in whole.glob("*.safetensors"):
        file.unlink()
    write_safetensors(whole / "model.safetensors", tensors)
    assert weights_identity(shards) == weights_identity(whole)

    write_safetensors(whole / "model.safetensors", {**tensors, "lm_head": bytes([0]) * (BIG - 1)})
    assert weights_identity(shards) != weights_identity(whole)
    del tensors["layers.0.k"]
    write_safetensors(whole / "model.safetensors", tensors)
    assert weights_identity(shards) != weights_identity(whole)


def test_the_name_and_size_of_other_files_are_the_models(tmp_path: Path) -> None:
    """Whatever the samples say."""
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(bytes(10_000))
    identities = {weights_identity(tmp_path)}
    file.write_bytes(bytes(10_001))
    identities.add(weights_identity(tmp_path))
    file.rename(tmp_path / "pytorch_model-1.bin")
    identities.add(weights_identity(tmp_path))

    assert len(identities) == 3


def write_index(model: Path, name: str = "model") -> None:
    weight_map = {file.name: file.name for file in model.glob(f"{name}*.safetensors")}
    (model / f"{name}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_what_vllm_would_not_load_beside_the_shards_does_not_matter(tmp_path: Path) -> None:
    """macOS leaves files that begin with "._" on shares, and an index says which shards count."""
    model = make_model(tmp_path / "qwen")
    expected = weights_identity(model)
    (model / "._model-00001-of-00002.safetensors").write_bytes(b"Mac OS X")
    assert weights_identity(model) == expected

    write_index(model)
    assert weights_identity(model) == expected
    (model / "model-of-before.safetensors").write_bytes(b"left behind")
    assert weights_identity(model) == expected
    (model / "consolidated.safetensors").write_bytes(b"the same in another format")
    assert weights_identity(model, load_format="safetensors") == expected


def test_a_consolidated_file_is_the_model_where_vllm_loads_it(tmp_path: Path) -> None:
    """vLLM prefers it unless told otherwise, and it need not be what the shards are."""
    model = make_model(tmp_path / "qwen")
    write_index(model)
    other = {"layers.0.q": bytes([7]) * SMALL}
    write_safetensors(model / "consolidated.safetensors", other)
    alone = tmp_path / "alone"
    alone.mkdir()
    write_safetensors(alone / "consolidated.safetensors", other)

    assert weights_identity(model) == weights_identity(alone)
    assert weights_identity(model, load_format="mistral") == weights_identity(alone)


def test_how_the_bytes_are_quantised_is_part_of_who_they_are(tmp_path: Path) -> None:
    """The same file read by another scheme is another model; the rest of config.json is the
    manifest's."""
    model = make_model(tmp_path / "qwen")
    plain = weights_identity(model)

    (model / "config.json").write_text('{"model_type": "other", "hidden_size": 1}')
    assert plain == weights_identity(model)

    (model / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    assert plain != weights_identity(model)


def test_files_that_are_not_weights_do_not_matter(tmp_path: Path) -> None:
    """Two nodes rarely have the same leftovers of downloads and training."""
    model = make_model(tmp_path / "qwen")
    expected = weights_identity(model)

    (model / "README.md").write_text("hello")
    (model / "training_args.bin").write_bytes(b"x")
    (model / "pytorch_model.bin").write_bytes(b"the engine prefers safetensors")
    (model / "original").mkdir()

    assert expected == weights_identity(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.gguf"])
def test_other_formats_are_sampled_at_both_ends_and_between(tmp_path: Path, name: str) -> None:
    """Where tensors can't be found, the file is sampled as it lies there."""
    file = tmp_path / name
    file.write_bytes(bytes(300_000))
    expected = weights_identity(tmp_path)

    for position in (0, 60_000, 299_999, 240_000):
        flip(file, position)
        assert expected != weights_identity(tmp_path)
        flip(file, position)
    assert expected == weights_identity(tmp_path)


def test_a_single_file_can_be_a_model(tmp_path: Path) -> None:
    """GGUF models are given to vLLM as a file."""
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(5000))

    assert weights_identity(file) == weights_identity(tmp_path)


@pytest.mark.parametrize(
    "junk",
    [b"", b"1234567", struct.pack("<Q", 1 << 60), struct.pack("<Q", 2) + b"{}", b"\0" * 100]
    + [
        struct.pack("<Q", len(text)) + text for text in (b"[1]", b'{"a": 1}', b'{"a": {}}', b"\xff")
    ],
)
def test_a_broken_safetensors_file_still_has_an_identity(tmp_path: Path, junk: bytes) -> None:
    """Whether it can be loaded is the engine's question."""
    (tmp_path / "model.safetensors").write_bytes(junk)

    assert weights_identity(tmp_path) == weights_identity(tmp_path)


def test_a_folder_without_weights_is_refused_and_says_what_to_do(tmp_path: Path) -> None:
    """A model that is loaded from elsewhere needs a name."""
    (tmp_path / "config.json").write_text("{}")

    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UnsupportedEngine, match="set model_id") as caught:
            weights_identity(folder)
        assert "\n" not in str(caught.value)


def test_many_tensors_are_sampled_across_all_files(tmp_path: Path) -> None:
    """The number of samples is bounded, and no file is left out."""
    for shard in range(4):
        tensors = {f"{shard}.expert{n}": bytes(8) for n in range(1500)}
        write_safetensors(tmp_path / f"model-{shard}.safetensors", tensors)
    expected = weights_identity(tmp_path)

    for shard in range(4):
        file = tmp_path / f"model-{shard}.safetensors"
        original = file.read_bytes()
        file.write_bytes(original[: -8 * 1500] + bytes([1]) * 8 * 1500)
        assert expected != weights_identity(tmp_path)
        file.write_bytes(original)


def make_adapter(folder: Path, *, seed: int = 0, config: dict[str, object] | None = None) -> Path:
    folder.mkdir(parents=True)
    write_safetensors(folder / "adapter_model.safetensors", {"lora_A": bytes([seed]) * 100})
    (folder / "adapter_config.json").write_text(
        json.dumps({"r": 8, "lora_alpha": 16} | (config or {}))
    )
    return folder


def test_an_adapter_is_its_weights_and_how_they_apply(tmp_path: Path) -> None:
    """The path and the base it was trained on are where it came from, not what it does."""
    adapter = lora_digest(make_adapter(tmp_path / "a"))
    moved = make_adapter(tmp_path / "x" / "b", config={"base_model_name_or_path": "elsewhere"})
    other_weights = make_adapter(tmp_path / "c", seed=1)
    other_scale = make_adapter(tmp_path / "d", config={"lora_alpha": 32})

    assert len(adapter) == 32
    assert adapter == lora_digest(moved)
    assert adapter != lora_digest(other_weights)
    assert adapter != lora_digest(other_scale)


def test_an_adapter_that_is_not_there_is_an_error_of_ours(tmp_path: Path) -> None:
    """Its requests bypass the store."""
    with pytest.raises(UnsupportedEngine, match="LoRA adapter"):
        lora_digest(tmp_path / "missing")
