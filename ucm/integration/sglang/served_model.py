"""Which model SGLang computes KV with, and how, as far as that shapes the bytes.

What SGLang hands to a storage backend names the model by --served-model-name, which is any text.
So this reads what the server was started with, where all of SGLang does; and `model_id` in the
settings is for those who know better.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ucm.config.settings import Settings
from ucm.errors import UnsupportedEngine
from ucm.integration.engine.model_files import model_place
from ucm.store.blocks.model_shape import model_shape
from ucm.store.blocks.weights import lora_digest, weights_identity

_WIDE_DTYPES = {"half": "float16", "float": "float32"}
# Those that load the files in the model's folder and nothing else.
_FORMATS_OF_FILES: Final = frozenset(
    {"auto", "safetensors", "pt", "npcache", "gguf", "bitsandbytes", "mistral", "layered"}
    | {"fastsafetensors", "instanttensor", "runai_streamer"}
)
# Settings of SGLang's that make weights of something beside these files, or in a way of their own.
_OTHER_WEIGHTS: Final = (
    *("modelopt_quant", "modelopt_checkpoint_restore_path", "rl_quant_profile"),
    "decrypted_config_file",
)


@dataclass(frozen=True)
class ServedModel:
    """As SGLang's server was told, in its words."""

    path: str
    revision: str | None
    load_format: str
    dtype: str
    kv_cache_dtype: str
    quantization: str | None
    quantization_param_path: str | None
    json_overrides: str
    context_length: int | None
    # Flags of settings that are set and make other weights than the model's files hold.
    other_weights: tuple[str, ...]
    # Names and paths of --lora-paths, of which SGLang makes what tells their pages apart. What is
    # loaded at run time is told apart by an id that no other server has.
    adapters: tuple[tuple[str, str], ...]


def read_served_model() -> ServedModel | None:
    """None where this is no process of an SGLang server of a version that keeps these there."""
    try:
        from sglang.srt.runtime_context import get_exec, get_lora, get_model

        model = get_model()
        others = {name: getattr(model, name) for name in _OTHER_WEIGHTS}
        others["kt_weight_path"] = get_exec().moe.kt_weight_path
        return ServedModel(
            path=str(model.model_path),
            revision=_text(model.revision),
            load_format=str(model.load_format),
            dtype=str(model.dtype),
            kv_cache_dtype=str(model.kv_cache_dtype),
            quantization=_text(model.quantization),
            quantization_param_path=_text(model.quantization_param_path),
            json_overrides=str(model.json_model_override_args or "{}"),
            context_length=model.context_length,
            other_weights=tuple(_flag(name) for name, value in others.items() if value is not None),
            adapters=tuple(
                (str(each.lora_name), str(each.lora_path)) for each in get_lora().lora_paths or ()
            ),
        )
    except Exception:  # noqa: BLE001 (what another version raises is not known)
        return None


def is_rocm() -> bool:
    """Its accelerators are called cuda, and its eight-bit numbers may be others."""
    try:
        from sglang.srt.utils import is_hip

        return bool(is_hip())
    except Exception:  # noqa: BLE001 (as above)
        return False


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


@dataclass(frozen=True)
class ModelIdentity:
    """What a manifest says of the model."""

    weights: str
    model_dtype: str
    kv_dtype: str
    kv_scales: str
    quantization: str
    shape: dict[str, object]


def model_identity(
    served: ServedModel | None, settings: Settings, *, pool_dtype: str, item_bytes: int
) -> ModelIdentity:
    """`pool_dtype` is what the pool's tensors say, which is no number format if they hold bytes.
    Raises UnsupportedEngine for what has no name."""
    kv_dtype, scales = _kv_format(served, pool_dtype, item_bytes)
    if served is None:
        if settings.model_id is None:
            raise UnsupportedEngine(
                "SGLang doesn't say which model it serves, except for a name that is any text: set "
                "model_id, to the same text on all instances that serve it"
            )
        return ModelIdentity(
            f"model_id:{settings.model_id}", kv_dtype, kv_dtype, scales, "none", {}
        )
    shape = {
        "overrides": json.loads(served.json_overrides),
        "adapters": {
            name: lora_digest(model_place(path, None)).hex() for name, path in served.adapters
        },
    }
    if settings.model_id is not None:
        dtype = _WIDE_DTYPES.get(served.dtype, served.dtype)
        # Whoever names the model names what its files and the engine make of its weights.
        identity = f"model_id:{settings.model_id}"
        return ModelIdentity(identity, dtype, kv_dtype, scales, "none", _given(shape))
    _refuse_other_weights(served)
    place = model_place(served.path, served.revision)
    config = _config(place)
    # Unlike vLLM, SGLang takes Mistral's one file of all weights only where it is told to.
    load_format = "mistral" if served.load_format == "mistral" else "safetensors"
    return ModelIdentity(
        weights=weights_identity(place, load_format=load_format),
        model_dtype=_model_dtype(served, config),
        kv_dtype=kv_dtype,
        kv_scales=scales,
        quantization=served.quantization or "none",
        shape=model_shape(_text_config(config), max_model_len=served.context_length)
        | _given(shape),
    )


def _refuse_other_weights(served: ServedModel) -> None:
    if served.load_format not in _FORMATS_OF_FILES:
        raise UnsupportedEngine(
            f"--load-format {served.load_format}: the model's files don't say which weights these "
            f"are: set model_id, to the same text on all instances that serve them"
        )
    if served.other_weights:
        raise UnsupportedEngine(
            f"{', '.join(served.other_weights)}: the weights are not those of the model's files "
            f"alone: set model_id, to the same text on all instances that serve them"
        )


def _given(shape: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in shape.items() if value}


def _kv_format(served: ServedModel | None, pool_dtype: str, item_bytes: int) -> tuple[str, str]:
    """The format of the numbers in the pool, and where their scales come from."""
    if item_bytes > 1:
        return pool_dtype, "none"
    if served is None:
        raise UnsupportedEngine(
            f"the KV cache holds {pool_dtype}, and SGLang doesn't say what these bytes mean: use "
            "--kv-cache-dtype bfloat16"
        )
    if served.quantization_param_path is not None:
        raise UnsupportedEngine(
            "--quantization-param-path gives KV scales from a file beside the model, which has no "
            "name in the store: use the checkpoint's scales"
        )
    return f"{pool_dtype}:{served.kv_cache_dtype}", "checkpoint"


def _model_dtype(served: ServedModel, config: Mapping[str, Any]) -> str:
    if served.dtype != "auto":
        return _WIDE_DTYPES.get(served.dtype, served.dtype)
    text = _text_config(config)
    return f"auto:{text.get('dtype') or text.get('torch_dtype') or config.get('torch_dtype')}"


def _config(place: Path) -> Mapping[str, Any]:
    folder = place if place.is_dir() else place.parent
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UnsupportedEngine(
            f"{folder}/config.json can't be read ({error}), which says what shapes the KV: set "
            f"model_id"
        ) from error
    if not isinstance(config, dict):
        raise UnsupportedEngine(
            f"{folder}/config.json holds no model's configuration: set model_id"
        )
    return config


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config
