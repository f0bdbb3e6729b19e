"""Which layout vLLM is asked for, and which engines can't be copied layer by layer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import torch

from ucm.config.settings import Settings, StoreSettings
from ucm.errors import UnsupportedEngine
from ucm.integration.vllm.device_facts import (
    head_major_pays,
    refuse_layerwise_with_micro_batches,
    wanted_layout,
)


def test_layer_by_layer_is_refused_with_micro_batches() -> None:
    """A layer has run when all micro-batches have run it, which no hook tells."""
    settings = Settings(store=StoreSettings(socket_path="/nowhere"), use_layerwise=True)
    with pytest.raises(UnsupportedEngine, match="--enable-dbo"):
        refuse_layerwise_with_micro_batches(SimpleNamespace(use_ubatching=True), settings)
    refuse_layerwise_with_micro_batches(SimpleNamespace(use_ubatching=False), settings)


@pytest.mark.parametrize(
    ("tokens", "pays"), [(16, False), (32, False), (128, True)], ids=["16", "32", "whole page"]
)
def test_a_layout_is_asked_for_only_where_blocks_then_need_no_staging(
    tokens: int, pays: bool
) -> None:
    """8 heads of 128 in bfloat16: a head's part of a block of 16 tokens is 8 KiB."""
    assert pays == head_major_pays(
        engine_block_tokens=tokens, block_tokens=128, num_heads=8, token_bytes=512
    )


@pytest.mark.parametrize(
    ("setting", "block_size", "wanted"),
    [
        ("auto", 16, None),
        ("auto", 128, "LBHNC"),
        ("keep", 128, None),
        ("head_major", 16, "LBHNC"),
        ("auto", None, None),
    ],
)
def test_the_setting_decides_about_the_layout(
    setting: str, block_size: int | None, wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm.platforms

    monkeypatch.setattr(
        vllm.platforms, "current_platform", SimpleNamespace(device_type="cuda"), raising=False
    )
    model = SimpleNamespace(
        use_mla=False,
        dtype=torch.bfloat16,
        get_num_kv_heads=lambda parallel: 8,
        get_head_size=lambda: 128,
    )
    config = SimpleNamespace(
        model_config=model,
        cache_config=SimpleNamespace(
            block_size=block_size, cache_dtype="auto", kv_cache_layout=None
        ),
        parallel_config=None,
    )
    settings = Settings(store=StoreSettings(socket_path="/nowhere"), engine_layout=setting)
    assert wanted == wanted_layout(config, settings)
