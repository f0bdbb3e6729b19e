"""vllm-ascend as far as a connector sees it, replayed on a CPU from its sources: its platform, its
spec for MLA, its tensors, and the connector that it registers as UCMConnector.

    runner    vLLM's own, so its hooks come in vLLM's order: handle_preemptions, bind, start_load,
              the forward pass with its layers, wait_for_save, get_finished
    GQA       (K, V), each [B, N, H, d], in an allocation of its own for every layer
    MLA       (latent [B, N, 1, c], rope part [B, N, 1, r]), the latter written by an operator that
              takes the pairs apart before it rotates them
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, SupportsHMA
from vllm.v1.kv_cache_interface import MLAAttentionSpec

from ucm.integration.vllm.ucm_connector import UCMConnector

NPU = SimpleNamespace(
    device_type="npu",
    device_name="npu",
    is_rocm=lambda: False,
    is_fp8_fnuz=lambda: False,
    is_cuda_alike=lambda: False,
)


@contextmanager
def on_npu() -> Iterator[None]:
    """UCM, and whoever else asks meanwhile, finds vllm-ascend's platform."""
    with mock.patch("vllm.platforms.current_platform", NPU):
        yield


@dataclass(frozen=True, kw_only=True)
class AscendMLAAttentionSpec(MLAAttentionSpec):
    """The fields that it adds; with an indexer `sparse_head_dim` says how a block is cut."""

    scale_dim: int = 0
    scale_dtype: torch.dtype = torch.int8
    sparse_head_dim: tuple[int, ...] | None = None
    cache_sparse_sfa_c8: bool = False
    cache_sparse_li_c8: bool = False


def rotated_as_cuda(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """vLLM's rotation of DeepSeek's MLA (`is_neox_style` is false): pairs stay where they are.
    `cos` and `sin` have one element for each pair."""
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def rotated_as_npu(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What the operator npu_kv_rmsnorm_rope_cache writes, by its documentation."""
    size = x.shape[-1]
    k = x.unflatten(-1, (size // 2, 2)).transpose(-1, -2).flatten(-2)
    turned = torch.cat((-k[..., size // 2 :], k[..., : size // 2]), dim=-1)
    return k * torch.cat((cos, cos), dim=-1) + turned * torch.cat((sin, sin), dim=-1)


class UCMConnectorV1(KVConnectorBase_V1, SupportsHMA):
    """As vllm-ascend hands the hooks on, and no other hook."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._ucm_engine = self.make(vllm_config, role, kv_cache_config)

    def make(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> UCMConnector:
        return UCMConnector(vllm_config, role, kv_cache_config)

    def has_connector_metadata(self) -> bool:
        return self._ucm_engine.has_connector_metadata()

    def register_kv_caches(self, kv_caches: Any) -> None:
        self._ucm_engine.register_kv_caches(kv_caches)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._ucm_engine.start_load_kv(forward_context, **kwargs)

    def wait_for_layer_load(self, layer_name: str) -> None:
        self._ucm_engine.wait_for_layer_load(layer_name)

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        self._ucm_engine.save_kv_layer(layer_name, kv_layer, attn_metadata, **kwargs)

    def wait_for_save(self) -> None:
        self._ucm_engine.wait_for_save()

    def clear_connector_metadata(self) -> None:
        self._ucm_engine.clear_connector_metadata()

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        self._ucm_engine.bind_connector_metadata(connector_metadata)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._ucm_engine.get_block_ids_with_load_errors()

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Any:
        return self._ucm_engine.get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._ucm_engine.update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        return self._ucm_engine.build_connector_meta(scheduler_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> Any:
        return self._ucm_engine.request_finished(request, block_ids)

    def request_finished_all_groups(self, request: Any, block_ids: tuple[list[int], ...]) -> Any:
        return self._ucm_engine.request_finished_all_groups(request, block_ids)

    def get_finished(self, finished_req_ids: set[str]) -> Any:
        return self._ucm_engine.get_finished(finished_req_ids)

    def build_connector_worker_meta(self) -> Any:
        return self._ucm_engine.build_connector_worker_meta()

    def update_connector_output(self, connector_output: Any) -> None:
        self._ucm_engine.update_connector_output(connector_output)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        return UCMConnector.build_kv_connector_stats(data)

    @classmethod
    def build_prom_metrics(cls, *arguments: Any) -> Any:
        return UCMConnector.build_prom_metrics(*arguments)
