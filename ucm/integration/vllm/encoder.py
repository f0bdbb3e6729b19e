"""What an engine's encoder makes of an item, as far as neither its tensors nor the weights say it.

That is the configuration of the tower and of what joins it to the language model; which tokens of a
video are thrown away; and with what pictures are normalised where that is done on the device: the
tensors are raw pixels then, and a processor's mean and deviation are not in them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ucm.errors import UnsupportedEngine
from ucm.integration.engine.model_files import model_place
from ucm.store.blocks.canonical_json import canonical_json

_PROCESSOR_FILES: Final = (
    *("preprocessor_config.json", "processor_config.json"),
    "video_preprocessor_config.json",
)
# Of a configuration, as every model has it.
_NOT_OF_ENCODERS: Final = frozenset(
    {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"}
)
_NORMALIZING: Final = frozenset(
    {"do_normalize", "do_rescale", "rescale_factor", "image_mean", "image_std"}
)


def encoder_rules(vllm_config: Any) -> str:
    """Empty for models that are given nothing but tokens."""
    model = vllm_config.model_config
    multimodal = getattr(model, "multimodal_config", None)
    if multimodal is None:
        return ""
    rules: dict[str, object] = {"config": _config_of(model)}
    # Older versions of vLLM don't have all of these.
    if pruned := getattr(multimodal, "video_pruning_rate", None):
        rules["pruning"] = [pruned, str(getattr(multimodal, "video_pruning_method", "evs"))]
    if getattr(multimodal, "mm_device_do_normalize", None):
        rules["normalizing"] = _normalizing(model)
    if scales := getattr(multimodal, "mm_encoder_fp8_scale_path", None):
        rules["scales"] = hashlib.sha256(Path(scales).read_bytes()).hexdigest()
    return canonical_json(rules).decode()


def _config_of(model: Any) -> dict[str, object]:
    """As the model's file has it, with what the engine was told instead: releases of transformers
    add defaults to what they read, and rename it."""
    overrides = getattr(model, "hf_overrides", None) or {}
    written = _written(model)
    if not written or not isinstance(overrides, Mapping):
        return _told(model.hf_config, model.hf_text_config)
    language = {
        name for name in written if getattr(model.hf_config, name, None) is model.hf_text_config
    }
    told = _overlaid(written, overrides)
    return {
        name: _plain(value)
        for name, value in told.items()
        if name not in _NOT_OF_ENCODERS | language and value is not None
    }


def _written(model: Any) -> dict[str, Any]:
    """Empty where there is no such file: a model_id stands for it, or another format."""
    try:
        named = getattr(model, "hf_config_path", None) or model.model
        text = (model_place(named, model.revision) / "config.json").read_text(encoding="utf-8")
        written = json.loads(text)
    except (UnsupportedEngine, OSError, ValueError):
        return {}
    return written if isinstance(written, dict) else {}


def _overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(below)
    for name, value in above.items():
        inner = found.get(name)
        both = isinstance(value, Mapping) and isinstance(inner, Mapping)
        found[name] = _overlaid(inner, value) if both else value  # type: ignore[arg-type]
    return found


def _told(config: Any, text_config: Any) -> dict[str, object]:
    """All of a configuration but its language model's part, which the namespace has, and but what
    transformers has in every configuration, which differs by its version."""
    from transformers import PretrainedConfig

    everywhere = PretrainedConfig().to_dict().keys()
    found: dict[str, object] = {}
    for name, value in config.to_dict().items():
        part = getattr(config, name, None)
        if name in everywhere or part is text_config or value is None:
            continue
        found[name] = _told(part, text_config) if hasattr(part, "to_dict") else _plain(value)
    return found


def _normalizing(model: Any) -> dict[str, object]:
    try:
        place = model_place(model.model, model.revision)
    except UnsupportedEngine:  # a model_id stands for files that are not here
        return {}
    found: dict[str, object] = {}
    for name in _PROCESSOR_FILES:
        if (place / name).is_file():
            found[name] = _picked(json.loads((place / name).read_text(encoding="utf-8")))
    return found


def _picked(value: Any) -> dict[str, object]:
    """What normalises, wherever in the file it stands."""
    found: dict[str, object] = {}
    for name, part in value.items():
        if name in _NORMALIZING:
            found[name] = _plain(part)
        elif isinstance(part, dict) and (inner := _picked(part)):
            found[name] = inner
    return found


def _plain(value: object) -> object:
    """As JSON that doesn't depend on whether somebody wrote 1 or 1.0."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items() if each is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return value
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
