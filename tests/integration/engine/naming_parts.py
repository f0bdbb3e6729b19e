"""Prompts that come to an engine's scheduler side, and the keys that it makes of them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)

from tests.integration.scheduler_parts import BLOCK, Engine, Loopback
from tests.store.blocks.test_weights import write_safetensors

NUM_BLOCKS = 4
PROMPT = NUM_BLOCKS * BLOCK
# The third block.
PICTURE_AT = 2 * BLOCK + BLOCK // 4
PICTURE_TOKENS = BLOCK // 2


def picture(
    values: Any,
    *,
    name: str = "ab" * 32,
    start: int = PICTURE_AT,
    embedded: list[bool] | None = None,
    modality: str = "image",
    prefix: str = "",
) -> MultiModalFeatureSpec:
    """A feature as vLLM's scheduler has it. `values`: what the model is given, or None."""
    data = None
    if values is not None:
        fields = values if isinstance(values, dict) else {"pixel_values": values}
        data = MultiModalKwargsItem(
            {
                field: MultiModalFieldElem(data=value, field=MultiModalBatchedField())
                for field, value in fields.items()
            }
        )
    mask = None if embedded is None else torch.tensor(embedded)
    place = PlaceholderRange(offset=start, length=PICTURE_TOKENS, is_embed=mask)
    return MultiModalFeatureSpec(
        data=data, modality=modality, identifier=prefix + name, mm_position=place, mm_hash=name
    )


def red(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(24, dtype=dtype).reshape(2, 3, 4)


def blue() -> torch.Tensor:
    return red() + 1


def make_adapter(folder: Path, seed: int = 0, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "adapter_model.safetensors", {"lora_A": bytes([seed]) * 100})
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 16} | config))
    return folder


def lora(folder: Path | str, number: int = 1, **more: Any) -> LoRARequest:
    return LoRARequest("an adapter", number, str(folder), **more)


def named(engine: Engine, request: SimpleNamespace) -> None:
    """Until the scheduler side has made the request's keys."""
    deadline_s = time.monotonic() + 30
    while engine.side.matched_tokens(request, 0)[0] is None:
        engine.step({})
        assert time.monotonic() < deadline_s


def keys(engine: Engine | None = None, **more: Any) -> list[bytes]:
    """Of a prompt that comes to an engine (or to a new one, as after a restart or elsewhere)."""
    engine = engine or Engine(Loopback())
    request = engine.add(f"r{len(engine.requests)}", PROMPT, **more)
    named(engine, request)
    return list(engine.side._states[request.request_id].prompt.keys)


def common(one: list[bytes], other: list[bytes]) -> int:
    return sum(a == b for a, b in zip(one, other, strict=False))
