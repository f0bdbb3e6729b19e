"""An engine of vLLM on a CPU, with a connector that gets to see what vllm-ascend would show it.

The engine computes in its own cache. Beside it are tensors as vllm-ascend allocates them, and these
alone are registered with UCM: after every forward pass they take what the cache has, and when a
load has arrived the cache takes it from them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.integration.vllm.ascend_stand_in import UCMConnectorV1, on_npu
from ucm.integration.vllm.metadata import StepMetadata
from ucm.integration.vllm.ucm_connector import UCMConnector


class AscendConnector(UCMConnectorV1):
    def make(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> UCMConnector:
        return ConnectorOnNpu(vllm_config, role, kv_cache_config)


class ConnectorOnNpu(UCMConnector):
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        with on_npu():
            super().__init__(vllm_config, role, kv_cache_config)
        self._layers: list[_LayerOnNpu] = []
        # Blocks that a load may be writing, by the request that it is for.
        self._arriving: dict[str, set[int]] = {}

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        layers = {name: _LayerOnNpu(kv) for name, kv in kv_caches.items()}
        self._layers = list(layers.values())
        shown: Any = {name: layer.on_npu for name, layer in layers.items()}
        super().register_kv_caches(shown)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        assert isinstance(self._step, StepMetadata)
        for job in self._step.loads:
            blocks = {block for part in job.parts for block in part.block_ids}
            self._arriving.setdefault(job.request_id, set()).update(blocks)
        super().start_load_kv(forward_context, **kwargs)

    def wait_for_save(self) -> None:
        arriving = set().union(*self._arriving.values())
        for layer in self._layers:
            layer.computed([b for b in range(layer.num_blocks) if b not in arriving])
        super().wait_for_save()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        finished, received = super().get_finished(finished_req_ids)
        for request_id in received or ():
            for layer in self._layers:
                layer.loaded(sorted(self._arriving.get(request_id, ())))
            self._arriving.pop(request_id, None)
        return finished, received


class _LayerOnNpu:
    """(K, V), each [B, N, H, d]. vLLM's CPU kernels have [d][N] of K and [N][d] of V in every head
    of a block."""

    def __init__(self, on_cpu: Tensor) -> None:
        self.num_blocks, heads, tokens, content = on_cpu.shape
        size = content // 2
        halves = on_cpu.view(self.num_blocks, heads, 2, tokens * size)
        keys = halves[:, :, 0].unflatten(-1, (size, tokens)).permute(0, 3, 1, 2)
        values = halves[:, :, 1].unflatten(-1, (tokens, size)).transpose(1, 2)
        self._on_cpu = (keys, values)
        self.on_npu = tuple(torch.zeros(each.shape, dtype=each.dtype) for each in self._on_cpu)

    def computed(self, blocks: list[int]) -> None:
        for into, out_of in zip(self.on_npu, self._on_cpu, strict=True):
            into[blocks] = out_of[blocks]

    def loaded(self, blocks: list[int]) -> None:
        for into, out_of in zip(self._on_cpu, self.on_npu, strict=True):
            into[blocks] = out_of[blocks]
