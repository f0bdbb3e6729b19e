"""Engines of vllm-ascend, as far as their configuration, their specs and their tensors go."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("vllm")

import torch
from torch import Tensor
from vllm.v1.kv_cache_interface import KVCacheConfig, MLAAttentionSpec

from tests.integration.copies.copy_engines import DUMP, LOAD, copy_and_wait, on_host
from tests.integration.copies.kv_layouts import make_arena
from tests.integration.vllm.ascend_stand_in import (
    NPU,
    AscendMLAAttentionSpec,
    UCMConnectorV1,
    on_npu,
    rotated_as_cuda,
    rotated_as_npu,
)
from tests.integration.vllm.strand_engine import FULL, config, grouped, name
from ucm.config.settings import Settings, StoreSettings
from ucm.errors import UnsupportedEngine
from ucm.integration.copies.jobs import PagePart
from ucm.integration.copies.layout_kind import LayoutKind
from ucm.integration.engine.facts import EngineFacts
from ucm.integration.vllm import strand_layout
from ucm.integration.vllm.device_facts import wanted_layout
from ucm.integration.vllm.engine_facts import engine_facts
from ucm.integration.vllm.identity import manifest
from ucm.integration.vllm.registered import registered_target
from ucm.integration.vllm.ucm_connector import UCMConnector
from ucm.integration.vllm.wrapped import is_made_by_another, refuse_what_another_keeps
from ucm.store.blocks.namespace import to_json
from ucm.store.blocks.page_layout import rank_share

LAYERS, BLOCKS, TOKENS, LATENT, ROPE = 2, 4, 64, 512, 64
NUMBERS = range(LAYERS)
MLA: dict[str, Any] = {
    "block_size": TOKENS,
    "num_kv_heads": 1,
    "head_size": LATENT + ROPE,
    "dtype": torch.bfloat16,
}


@contextmanager
def on_cuda() -> Iterator[None]:
    cuda = SimpleNamespace(**{**vars(NPU), "device_type": "cuda", "device_name": "cuda"})
    with mock.patch("vllm.platforms.current_platform", cuda):
        yield


def settings(**more: Any) -> Settings:
    store = StoreSettings(socket_path="/nowhere")
    return Settings(**{"store": store, "block_tokens": 128, "model_id": "m", **more})


def facts_of(cache: KVCacheConfig, given: Any = None, **more: Any) -> EngineFacts:
    return engine_facts(given or config(), cache, settings(**more))


def mla_on(platform: AbstractContextManager[None], spec: MLAAttentionSpec) -> EngineFacts:
    with platform:
        return facts_of(grouped((spec, NUMBERS)))


ASCEND, CUDA = AscendMLAAttentionSpec(**MLA), MLAAttentionSpec(**MLA)


def test_both_platforms_are_in_one_namespace() -> None:
    for here, there in ((FULL, FULL), (ASCEND, CUDA)):
        with on_npu():
            facts = facts_of(grouped((here, NUMBERS)))
            ours = to_json(manifest(config(), facts, settings(), epoch=1))
        with on_cuda():
            others = facts_of(grouped((there, NUMBERS)))
            theirs = to_json(manifest(config(), others, settings(), epoch=1))
        assert ours == theirs
        assert facts.geometry == others.geometry


def test_only_an_npu_keeps_rope_in_halves() -> None:
    assert mla_on(on_npu(), ASCEND).layout is LayoutKind.ROPE_HALVES
    assert mla_on(on_cuda(), CUDA).layout is LayoutKind.AS_SHAPED
    with on_npu():
        assert facts_of(grouped((FULL, NUMBERS))).layout is LayoutKind.AS_SHAPED


@pytest.mark.parametrize("setting", ["auto", "head_major"])
def test_no_layout_is_asked_for_where_there_is_one(setting: str) -> None:
    with on_npu():
        assert wanted_layout(config(), settings(engine_layout=setting)) is None


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (replace(ASCEND, sparse_head_dim=(512, 64, 128)), "MLA layers with an indexer or scales"),
        (replace(ASCEND, scale_dim=1), "MLA layers with an indexer or scales"),
        (replace(ASCEND, cache_sparse_sfa_c8=True), "MLA layers with an indexer or scales"),
    ],
)
def test_what_its_spec_stands_for_besides_plain_mla_is_refused(
    spec: AscendMLAAttentionSpec, told: str
) -> None:
    with on_npu(), pytest.raises(UnsupportedEngine, match=told) as refusal:
        facts_of(grouped((spec, NUMBERS)))
    assert "(AscendMLAAttentionSpec in model.layers.0.self_attn.attn" in str(refusal.value)


def with_nz() -> Any:
    given = config()
    given.additional_config = {"enable_kv_nz": True}
    return given


def with_halves_rotated() -> Any:
    given = config()
    given.model_config.hf_text_config.rope_interleave = False
    return given


@pytest.mark.parametrize(
    ("given", "more", "told"),
    [
        (with_nz(), {}, "leave it out of --additional-config"),
        (with_halves_rotated(), {}, "rope_interleave is false"),
        (config(), {"use_layerwise": True}, "use_layerwise is not for MLA on an NPU"),
    ],
    ids=["NZ order", "other rotation", "layer by layer"],
)
def test_what_changes_mla_s_cache_behind_its_shape_is_refused(
    given: Any, more: dict[str, Any], told: str
) -> None:
    with on_npu(), pytest.raises(UnsupportedEngine, match=re.escape(told)):
        facts_of(grouped((ASCEND, NUMBERS)), given, **more)
    with on_cuda():
        facts_of(grouped((CUDA, NUMBERS)), given, **more)
    with on_npu():
        facts_of(grouped((FULL, NUMBERS)), given, **more)


def test_kv_that_the_weights_quantise_is_refused() -> None:
    """int8 under --kv-cache-dtype auto would be taken for the model's own type."""
    quantised = replace(FULL, dtype=torch.int8)
    with on_npu(), pytest.raises(UnsupportedEngine, match=r"keep KV as torch\.int8, with scales"):
        facts_of(grouped((quantised, NUMBERS)))


@dataclass
class MlaCaches:
    """The same tokens' keys and values as both platforms keep them, or empty ones."""

    cuda: dict[str, Tensor]
    npu: dict[str, tuple[Tensor, Tensor]]


def mla_caches(*, seed: int | None) -> MlaCaches:
    caches = MlaCaches({}, {})
    generator = torch.Generator().manual_seed(seed or 0)
    angles = torch.outer(
        torch.arange(BLOCKS * TOKENS), 10000.0 ** -(torch.arange(0, ROPE, 2) / ROPE)
    )
    for number in NUMBERS:
        latent = torch.randn(BLOCKS * TOKENS, LATENT, generator=generator)
        key = torch.randn(BLOCKS * TOKENS, ROPE, generator=generator)
        if seed is None:
            latent, key = torch.zeros_like(latent), torch.zeros_like(key)
        joined = torch.cat([latent, rotated_as_cuda(key, angles.cos(), angles.sin())], dim=-1)
        caches.cuda[name(number)] = joined.bfloat16().view(BLOCKS, TOKENS, LATENT + ROPE)
        rope = rotated_as_npu(key, angles.cos(), angles.sin())
        caches.npu[name(number)] = (
            latent.bfloat16().view(BLOCKS, TOKENS, 1, LATENT),
            rope.bfloat16().view(BLOCKS, TOKENS, 1, ROPE),
        )
    return caches


def copied(facts: EngineFacts, caches: Any, arena: Any, *, load: bool) -> None:
    """Two blocks are a page."""
    (target,) = facts.targets
    share = rank_share(facts.geometry, tp_rank=0, tp_size=1, layers=target.positions)
    registered = registered_target(facts, target, share, caches).target
    engine = on_host(SimpleNamespace(target=lambda: registered))  # type: ignore[arg-type]
    try:
        copy_and_wait(engine, LOAD if load else DUMP, [PagePart(0, 0, (3, 1))], arena)
    finally:
        engine.close()


def page_of(facts: EngineFacts, caches: Any) -> Tensor:
    arena = make_arena(1, facts.geometry)
    copied(facts, caches, arena, load=False)
    return arena.bytes


def test_an_npu_s_page_of_mla_is_byte_for_byte_that_of_cuda() -> None:
    npu, cuda = mla_on(on_npu(), ASCEND), mla_on(on_cuda(), CUDA)
    caches = mla_caches(seed=1)

    assert torch.equal(page_of(npu, caches.npu), page_of(cuda, caches.cuda))


def test_the_pages_would_differ_if_nobody_knew_of_the_order_of_rope() -> None:
    """Or the test above could not fail."""
    with mock.patch.object(strand_layout, "keeps_rope_halves", return_value=False):
        npu = mla_on(on_npu(), ASCEND)
    caches = mla_caches(seed=1)
    ours = page_of(npu, caches.npu).view(torch.int16)
    theirs = page_of(mla_on(on_cuda(), CUDA), caches.cuda).view(torch.int16)

    content = (LAYERS, 2 * TOKENS, LATENT + ROPE)
    size = npu.geometry.page_bytes // 2
    ours, theirs = ours[:size].view(content), theirs[:size].view(content)
    assert torch.equal(ours[..., :LATENT], theirs[..., :LATENT])
    assert not torch.equal(ours[..., LATENT:], theirs[..., LATENT:])


@pytest.mark.parametrize("loading", ["npu", "cuda"])
def test_what_one_platform_stores_of_mla_the_other_loads(loading: str) -> None:
    facts = {"npu": mla_on(on_npu(), ASCEND), "cuda": mla_on(on_cuda(), CUDA)}
    storing = "cuda" if loading == "npu" else "npu"
    stored, empty = mla_caches(seed=2), mla_caches(seed=None)
    arena = make_arena(1, facts["npu"].geometry)
    copied(facts[storing], getattr(stored, storing), arena, load=False)
    copied(facts[loading], getattr(empty, loading), arena, load=True)

    for layer, kv in getattr(empty, loading).items():
        expected = getattr(stored, loading)[layer]
        pairs = zip(kv, expected, strict=True) if loading == "npu" else [(kv, expected)]
        for found, wanted in pairs:
            assert torch.equal(found[[3, 1]], wanted[[3, 1]])
            assert not bool(found[[0, 2]].any())


def test_a_connector_that_has_taken_the_name_is_seen() -> None:
    def transfer(path: str | None, called: str = "UCMConnector") -> Any:
        return SimpleNamespace(kv_connector=called, kv_connector_module_path=path)

    assert not is_made_by_another(transfer(None), UCMConnector)
    by_name = (
        "vllm.distributed.kv_transfer.kv_connector.factory.KVConnectorFactory"
        ".get_connector_class_by_name"
    )
    with mock.patch(by_name, return_value=UCMConnectorV1):
        assert is_made_by_another(transfer(None), UCMConnector)
        path = "ucm.integration.vllm.ucm_connector"
        assert not is_made_by_another(transfer(path), UCMConnector)


def test_what_needs_the_hooks_that_it_keeps_is_refused() -> None:
    with on_npu():
        plain = facts_of(grouped((FULL, NUMBERS)))
        two = facts_of(grouped((FULL, (0, 2)), (FULL, (1, 3))))
    refuse_what_another_keeps(settings(), plain)
    for facts, more in ((plain, {"use_layerwise": True}), (two, {})):
        with pytest.raises(UnsupportedEngine, match='set "kv_connector_module_path"'):
            refuse_what_another_keeps(settings(**more), facts)
