"""Tells tools what an engine with these flags would be, and what it would make of prompts:
`python -m ucm.integration.vllm.describe DESCRIPTOR < QUESTION`.

No model is loaded and no engine started: what an engine learns from its layers is put together here
from the model's configuration. Of a model with several strands or with windows that is all but the
strands.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import msgspec
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

from ucm.config.settings import Settings, StoreSettings, load_settings_file, start_epoch
from ucm.errors import UcmError
from ucm.integration.engine.adapters import AdapterNames
from ucm.integration.vllm.engine_facts import adapter_rules, engine_facts, state_interval_tokens
from ucm.integration.vllm.identity import manifest, manifest_without_strands
from ucm.integration.vllm.rendering import flags_parser, tokens_of
from ucm.store.blocks.namespace import to_json
from ucm.store.inspect.engine_identity import EngineIdentity, EngineQuestion


def describe(question: EngineQuestion) -> EngineIdentity:
    """Raises UcmError, and whatever vLLM raises for a model or flags that it doesn't like."""
    settings = Settings(store=StoreSettings(socket_path=""))
    if question.config_file:
        settings = load_settings_file(question.config_file)
    flags = _flags(question)
    vllm_config = EngineArgs.from_cli_args(flags).create_engine_config()
    vllm_config.kv_transfer_config = KVTransferConfig(
        kv_connector="UCMConnector", kv_role="kv_both"
    )
    epoch, page_bytes = start_epoch(settings), 0
    if _has_strands(vllm_config):
        made = manifest_without_strands(vllm_config, settings, epoch=epoch)
    else:
        facts = engine_facts(vllm_config, _kv_cache_config(vllm_config), settings)
        made = manifest(vllm_config, facts, settings, epoch=epoch)
        page_bytes = facts.geometry.page_bytes
    rules = adapter_rules(vllm_config)
    return EngineIdentity(
        manifest_json=to_json(made).decode(),
        page_bytes=page_bytes,
        tokens=tokens_of(vllm_config, flags, question.prompts),
        adapters=[_adapter(path, rules) for path in question.adapters],
        window_interval=settings.window_interval,
        state_interval_tokens=state_interval_tokens(vllm_config, settings),
    )


def _flags(question: EngineQuestion) -> Namespace:
    """As `vllm serve` has them, whose first argument is the model."""
    flags: Namespace = flags_parser().parse_args(["--model", question.model, *question.vllm_args])
    also = getattr(flags, "model_tag", None)
    if also not in (None, question.model):
        raise UcmError(f"{also}: is behind -- and no flag: the model is {question.model} (--model)")
    return flags


def _has_strands(vllm_config: Any) -> bool:
    """Whether its layers are of several kinds or have windows: which strands they are only a
    running engine knows. With its hybrid memory manager off, vLLM has one cache for layers with a
    window and without."""
    model = vllm_config.model_config
    has_indexer = getattr(model.hf_text_config, "index_topk", None) is not None
    if model.is_hybrid or (model.use_mla and has_indexer):
        return True
    types = getattr(model.hf_text_config, "layer_types", None) or ()
    is_mixed = not vllm_config.scheduler_config.disable_hybrid_kv_cache_manager and (
        "sliding_attention" in types or "chunked_attention" in types
    )
    has_windows = is_mixed or bool(vllm_config.cache_config.sliding_window)
    return has_windows and not model.disable_sliding_window


def _kv_cache_config(vllm_config: Any) -> Any:
    """As an engine makes it of its layers, for models with one kind of them."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    common = {
        "block_size": cache.block_size,
        "head_size": model.get_head_size(),
        "dtype": kv_cache_dtype_str_to_dtype(cache.cache_dtype, model),
    }
    if model.use_mla:
        spec = MLAAttentionSpec(num_kv_heads=1, **common)
    else:
        heads = model.get_num_kv_heads(vllm_config.parallel_config)
        spec = FullAttentionSpec(num_kv_heads=heads, head_size_v=common["head_size"], **common)
    num_layers = int(model.hf_text_config.num_hidden_layers)
    names = [f"model.layers.{number}.self_attn.attn" for number in range(num_layers)]
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=names)
    return SimpleNamespace(kv_cache_groups=[group], kv_cache_tensors=[], num_blocks=1)


def _adapter(path: str, rules: str) -> str:
    request = SimpleNamespace(lora_int_id=1, lora_path=path)
    digest = AdapterNames(rules).digest(request)
    if digest is None:
        raise UcmError(f"{path}: is no LoRA adapter that can be named")
    return digest.hex()


def main(question: bytes, descriptor: int) -> None:
    """Answers on the descriptor, and ends."""
    asked = msgspec.json.decode(question, type=EngineQuestion)
    try:
        answer = describe(asked)
    except UcmError as error:
        answer = EngineIdentity(problem=str(error))
    except Exception as error:  # noqa: BLE001 - vLLM's own words are what people need
        words = " ".join(f"{error}".split())
        answer = EngineIdentity(problem=f"{_could_not_be_asked(asked.model)}: {words}")
    with open(descriptor, "wb") as file:
        file.write(msgspec.json.encode(answer))
    sys.stdout.flush()
    # Whatever vLLM has started for an engine that never comes.
    os._exit(0)


def _could_not_be_asked(model: str) -> str:
    """vLLM asks Hugging Face for what is no folder, whose words are about names there."""
    other = ", which is no folder here, and so a name on Hugging Face"
    hint = "" if os.path.exists(model) else other
    return f"vLLM could not be asked about {model}{hint}"


if __name__ == "__main__":
    main(sys.stdin.buffer.read(), int(sys.argv[1]))
