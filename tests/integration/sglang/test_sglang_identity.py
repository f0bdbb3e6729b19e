"""What names the pages of a rank of SGLang, and what has no name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.integration.sglang.instances import CLASS
from tests.integration.sglang.recorded import (
    DeviceOf,
    DeviceTensor,
    Dtype,
    HostKVCache,
    MHATokenToKVPoolHost,
    MLATokenToKVPoolHost,
    StorageConfig,
)
from ucm.config.settings import Settings
from ucm.errors import ConfigError, UnsupportedEngine
from ucm.integration.sglang.extra_config import settings_of
from ucm.integration.sglang.identity import LAYOUTS, host_page
from ucm.integration.sglang.served_model import ServedModel
from ucm.store.blocks.namespace import Manifest, fingerprint, from_json, to_json

CONNECTOR = {
    "ucm_connector_name": "UcmPipelineStore",
    "ucm_connector_config": {"store_pipeline": "Cache"},
}
CONFIG = StorageConfig(tp_rank=1, tp_size=2)
FP8 = Dtype("uint8", 1)


def settings(**changes: Any) -> Settings:
    return settings_of({**CLASS, "ucm_connectors": [CONNECTOR], **changes})


def manifest(
    pool: HostKVCache | None = None,
    config: StorageConfig = CONFIG,
    *,
    served: ServedModel | None = None,
    **changes: Any,
) -> Manifest:
    changes = changes if served is not None else {"model_id": "tiny", **changes}
    pool = pool or MHATokenToKVPoolHost()
    return host_page(config, pool, settings(**changes), served=served, epoch=0).manifest()


@pytest.fixture
def served(tmp_path: Path) -> ServedModel:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, "torch_dtype": "bfloat16"}))
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    weights = len(header).to_bytes(8, "little") + header + bytes(range(16))
    (folder / "model.safetensors").write_bytes(weights)
    return ServedModel(
        path=str(folder),
        revision=None,
        load_format="auto",
        dtype="auto",
        kv_cache_dtype="auto",
        quantization=None,
        quantization_param_path=None,
        json_overrides="{}",
        context_length=None,
        other_weights=(),
        adapters=(),
    )


def changed(pool: HostKVCache, **attributes: Any) -> HostKVCache:
    for name, value in attributes.items():
        setattr(pool, name, value)
    return pool


ASCEND = (DeviceTensor((1024, 2, 8), DeviceOf("npu")),)
OTHERS: dict[str, Callable[[], Manifest]] = {
    "tp_rank": lambda: manifest(config=replace(CONFIG, tp_rank=0)),
    "tp_size": lambda: manifest(config=replace(CONFIG, tp_size=4)),
    "pp": lambda: manifest(config=replace(CONFIG, pp_size=2)),
    "cp": lambda: manifest(config=replace(CONFIG, attn_cp_rank=1, attn_cp_size=2)),
    "mla": lambda: manifest(MLATokenToKVPoolHost(), replace(CONFIG, is_mla_model=True)),
    "layers": lambda: manifest(MHATokenToKVPoolHost(layer_num=4)),
    "stage": lambda: manifest(changed(MHATokenToKVPoolHost(), start_layer=3, end_layer=6)),
    "heads": lambda: manifest(MHATokenToKVPoolHost(head_num=1, head_dim=16)),
    "page_size": lambda: manifest(MHATokenToKVPoolHost(page_size=32)),
    "dtype": lambda: manifest(changed(MHATokenToKVPoolHost(), dtype=Dtype("float16", 2))),
    "layout": lambda: manifest(MHATokenToKVPoolHost("page_first_direct")),
    "tag": lambda: manifest(changed(MHATokenToKVPoolHost(), storage_format_tag="other")),
    "device": lambda: manifest(changed(MHATokenToKVPoolHost(), device_k_buffers=ASCEND)),
    "rows": lambda: manifest(
        changed(MHATokenToKVPoolHost(), device_k_buffers=(DeviceTensor((64, 2, 1, 16, 8)),))
    ),
    "model_id": lambda: manifest(model_id="another"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_unlike_is_another_namespace(what: str) -> None:
    assert fingerprint(OTHERS[what]()) != fingerprint(manifest())


def test_what_does_not_shape_pages_is_in_no_name() -> None:
    same = replace(CONFIG, dp_rank=3, model_name="another name", enable_storage_metrics=True)
    assert fingerprint(manifest(MHATokenToKVPoolHost(num_pages=20), same)) == fingerprint(
        manifest()
    )


def test_of_mla_all_ranks_have_one_namespace() -> None:
    mla = StorageConfig(is_mla_model=True)
    ranks = [mla, replace(mla, tp_rank=1, tp_size=2), replace(mla, tp_rank=3, tp_size=4)]
    assert len({fingerprint(manifest(MLATokenToKVPoolHost(), each)) for each in ranks}) == 1


def test_a_manifest_can_be_read_back() -> None:
    made = manifest()
    assert from_json(to_json(made)) == made
    assert made.layout == "opaque:sglang:page_first"


def test_a_model_is_known_by_its_files_wherever_they_lie(
    served: ServedModel, tmp_path: Path
) -> None:
    first = manifest(served=served)
    assert first.weights.startswith("sha256:")
    moved = replace(served, path=str(Path(served.path).rename(tmp_path / "moved")))
    assert fingerprint(manifest(served=moved)) == fingerprint(first)

    weights = tmp_path / "moved" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert fingerprint(manifest(served=moved)) != fingerprint(first)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float16"},
        {"quantization": "fp8"},
        {"json_overrides": '{"rope_theta": 5}'},
    ],
    ids=repr,
)
def test_what_the_engine_makes_of_a_model_is_in_the_name(
    served: ServedModel, change: dict[str, Any]
) -> None:
    assert fingerprint(manifest(served=replace(served, **change))) != fingerprint(
        manifest(served=served)
    )


def test_an_adapter_is_known_by_its_files_for_sglang_goes_by_its_name(
    served: ServedModel, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    names = set()
    for content in (b"one", b"two"):
        (folder / "adapter_model.bin").write_bytes(content)
        adapted = replace(served, adapters=(("a", str(folder)),))
        names |= {fingerprint(manifest(served=adapted)), fingerprint(manifest(served=served))}
    assert len(names) == 3


def test_bytes_that_are_numbers_of_two_formats_are_told_apart(served: ServedModel) -> None:
    names = {
        manifest(
            changed(MHATokenToKVPoolHost(), dtype=FP8), served=replace(served, kv_cache_dtype=name)
        ).kv_dtype
        for name in ("fp8_e4m3", "fp8_e5m2")
    }
    assert names == {"uint8:fp8_e4m3", "uint8:fp8_e5m2"}


NAMELESS: dict[str, tuple[Callable[[], Manifest], str]] = {
    "heads split": (
        lambda: manifest(config=replace(CONFIG, should_split_heads=True)),
        "tp_lcm_size splits pages",
    ),
    "dcp": (lambda: manifest(config=replace(CONFIG, dcp_size=2)), "context parallelism"),
    "layout": (
        lambda: manifest(changed(MHATokenToKVPoolHost(), layout="page_unified")),
        "--hicache-mem-layout page_unified",
    ),
    "another pool": (
        lambda: manifest(changed(MHATokenToKVPoolHost(), target_layer_num=None)),
        "MHATokenToKVPoolHost doesn't say its target_layer_num",
    ),
    "another device": (
        lambda: manifest(changed(MHATokenToKVPoolHost(), device_k_buffers=None)),
        "how its device's tensors lie",
    ),
    "logical pool": (
        lambda: manifest(
            changed(MHATokenToKVPoolHost(), get_page_buffer_meta=lambda indices: None)
        ),
        "holds no KV itself",
    ),
    "eight bits": (
        lambda: manifest(changed(MHATokenToKVPoolHost(), dtype=FP8)),
        "what these bytes mean",
    ),
}


@pytest.mark.parametrize("what", NAMELESS)
def test_what_has_no_name_is_refused(what: str) -> None:
    make, words = NAMELESS[what]
    with pytest.raises(UnsupportedEngine, match=words):
        make()


def test_a_served_name_is_no_name_of_a_model() -> None:
    with pytest.raises(UnsupportedEngine, match="set model_id"):
        host_page(CONFIG, MHATokenToKVPoolHost(), settings(), served=None, epoch=0)


def test_a_draft_in_the_pages_needs_a_name(served: ServedModel) -> None:
    with pytest.raises(UnsupportedEngine, match="layers of a draft model"):
        manifest(changed(MHATokenToKVPoolHost(), target_layer_num=2), served=served)
    manifest(changed(MHATokenToKVPoolHost(), target_layer_num=2), model_id="both")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"load_format": "dummy"}, "--load-format dummy"),
        ({"load_format": "remote_instance"}, "--load-format remote_instance"),
        ({"other_weights": ("--kt-weight-path",)}, "--kt-weight-path: the weights"),
    ],
    ids=repr,
)
def test_weights_that_are_not_the_models_files_need_a_name(
    served: ServedModel, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(UnsupportedEngine, match=words):
        manifest(served=replace(served, **change))
    named = manifest(served=replace(served, **change), model_id="as it is loaded")
    assert named.weights == "model_id:as it is loaded"


def test_a_base_models_file_in_mistrals_format_is_not_what_a_fine_tune_is_known_by(
    served: ServedModel,
) -> None:
    """SGLang loads it where it is told to, and vLLM wherever it is there."""
    tuned = Path(served.path) / "model.safetensors"
    (Path(served.path) / "consolidated.safetensors").write_bytes(tuned.read_bytes())
    mistral = replace(served, load_format="mistral")
    before, base = manifest(served=served), manifest(served=mistral)
    tuned.write_bytes(tuned.read_bytes()[:-1] + b"!")
    assert fingerprint(manifest(served=served)) != fingerprint(before)
    assert fingerprint(manifest(served=mistral)) == fingerprint(base)


def test_scales_from_a_file_are_refused(served: ServedModel) -> None:
    scaled = replace(served, quantization_param_path="/scales.json")
    with pytest.raises(UnsupportedEngine, match="--quantization-param-path"):
        manifest(changed(MHATokenToKVPoolHost(), dtype=FP8), served=scaled)


@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_all_layouts_of_plain_attention_are_served(layout: str) -> None:
    page = host_page(
        CONFIG, MHATokenToKVPoolHost(layout), settings(model_id="x"), served=None, epoch=0
    )
    assert page.page_bytes == 2 * 3 * 16 * 2 * 8 * 2
    assert len(page.buffer_sizes) == (6 if layout == "layer_first" else 2)


def test_settings_say_what_is_wrong_with_them() -> None:
    with pytest.raises(ConfigError, match=r"interface_v1: missing.*add \"interface_v1\": 1"):
        settings_of({**CLASS, "interface_v1": 0, "ucm_connectors": [CONNECTOR]})
    with pytest.raises(ConfigError, match="extra-config: is empty"):
        settings_of(CLASS)
    with pytest.raises(ConfigError, match="ucm_conectors"):
        settings_of({**CLASS, "ucm_conectors": [CONNECTOR]})
    assert settings(prefetch_threshold=1, tp_lcm_size=2).store.pipeline == ("Cache",)
