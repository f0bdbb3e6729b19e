"""What decides how pictures become KV, beside their tensors and the weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from transformers import CLIPVisionConfig, LlavaConfig, Qwen2Config

from tests.integration.engine.naming_parts import picture, red
from ucm.integration.vllm.encoder import encoder_rules
from ucm.integration.vllm.items import VllmItems

MEAN = [0.5, 0.5, 0.5]


def rules(
    place: Path,
    *,
    language: dict[str, Any] | None = None,
    tower: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    overrides: dict[str, Any] | None = None,
    **more: Any,
) -> str:
    """Of a LLaVA in the folder `place`. `more` are fields of its configuration."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(num_hidden_layers=2, **(tower or {})),
        text_config=Qwen2Config(num_hidden_layers=2, **(language or {})),
        **more,
    )
    model = SimpleNamespace(
        model=str(place),
        revision=None,
        hf_config=config,
        hf_text_config=config.get_text_config(),
        multimodal_config=SimpleNamespace(**(settings or {})),
        hf_overrides=overrides or {},
    )
    return encoder_rules(SimpleNamespace(model_config=model))


def processor(place: Path, name: str = "preprocessor_config.json", **fields: Any) -> Path:
    place.mkdir(exist_ok=True)
    (place / name).write_text(json.dumps(fields))
    return place


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return processor(tmp_path / "model", image_mean=MEAN, size={"shortest_edge": 4})


def test_what_the_encoder_goes_by_is_told_apart(model: Path) -> None:
    found = [
        rules(model),
        rules(model, vision_feature_layer=-1),
        rules(model, vision_feature_select_strategy="full"),
        rules(model, projector_hidden_act="relu"),
        rules(model, tower={"hidden_act": "gelu"}),
        rules(model, tower={"layer_norm_eps": 1e-6}),
        rules(model, settings={"video_pruning_rate": 0.5}),
        rules(model, settings={"video_pruning_rate": 0.5, "video_pruning_method": "vidcom2"}),
        rules(model, settings={"video_pruning_rate": 0.75}),
        rules(
            model, settings={"mm_encoder_fp8_scale_path": str(model / "preprocessor_config.json")}
        ),
    ]
    assert len(set(found)) == len(found)
    names = {VllmItems(16, each).of([picture(red())]).items[0].identifier for each in found}
    assert len(names) == len(found)


def test_nothing_else_is(model: Path, tmp_path: Path) -> None:
    """The language model has its place in the namespace; where the model lies has none."""
    elsewhere = processor(tmp_path / "elsewhere", image_mean=[1, 1, 1])
    off = {
        "video_pruning_rate": None,
        "video_pruning_method": "evs",
        "mm_device_do_normalize": False,
    }
    same = {
        rules(model),
        rules(elsewhere),
        rules(elsewhere, settings=off),
        rules(model, language={"rope_theta": 5.0}),
        rules(model, dtype="float16", transformers_version="4.57", architectures=["Llava"]),
        rules(model, tower={"layer_norm_eps": 0.00001, "dtype": "bfloat16"}),
    }
    assert len(same) == 1


def test_where_the_device_normalises_it_is_told_with_what(model: Path, tmp_path: Path) -> None:
    """Tensors are raw pixels there, and a processor's settings are not in them."""

    def on_device(place: Path) -> str:
        return rules(place, settings={"mm_device_do_normalize": True})

    larger = {"shortest_edge": 8}  # which is in the tensors
    same = processor(tmp_path / "same", image_mean=MEAN, size=larger)
    other = processor(tmp_path / "other", image_mean=[0.5, 0.5, 0.25])
    inner = processor(tmp_path / "inner", "processor_config.json", image_processor={"image_std": 2})
    wider = processor(tmp_path / "wider", "processor_config.json", image_processor={"image_std": 3})
    assert on_device(model) == on_device(same)
    assert len({on_device(each) for each in (model, other, inner, wider)}) == 4
    assert rules(model) == rules(other)
    assert on_device(tmp_path / "named by its model_id")


def test_a_model_that_is_given_tokens_alone_has_no_such_rules() -> None:
    model = SimpleNamespace(multimodal_config=None)
    assert encoder_rules(SimpleNamespace(model_config=model)) == ""


def written(place: Path, **fields: Any) -> Path:
    place.mkdir(exist_ok=True)
    vision = {"hidden_size": 64, "model_type": "clip_vision_model"}
    said = {"model_type": "llava", "vision_config": vision, "text_config": {"hidden_size": 8}}
    (place / "config.json").write_text(json.dumps({**said, **fields}))
    return place


def test_a_file_of_the_model_tells_the_same_to_every_transformers(tmp_path: Path) -> None:
    """They differ in what they add to it: here by fields of the configuration that was read."""
    place = written(tmp_path / "model", vision_feature_layer=-2)
    copied = written(
        tmp_path / "copied", vision_feature_layer=-2, transformers_version="4.57", dtype="float16"
    )
    same = {
        rules(place),
        rules(copied),
        rules(place, projector_bias=False),
        rules(place, tower={"rope_parameters": {"rope_theta": 10000}}),
        rules(place, language={"rope_theta": 5.0}),
        rules(
            written(tmp_path / "larger", vision_feature_layer=-2, text_config={"hidden_size": 9})
        ),
    }
    assert len(same) == 1
    unlike = {
        rules(place),
        rules(place, overrides={"vision_feature_layer": -1}),
        rules(place, overrides={"vision_config": {"hidden_act": "gelu"}}),
        rules(written(tmp_path / "other", vision_feature_layer=-1, vision_config={})),
    }
    assert len(unlike) == 4
    assert rules(place, overrides={"text_config": {"rope_theta": 5}}) == rules(place)
