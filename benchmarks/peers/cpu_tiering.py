"""vLLM's tiering offload with a copy worker for CPU, so that its fs tier can be measured here.

Everything but the copy between KV cache and host memory is vLLM's own; that copy is written for
CUDA there. Named in kv_connector_extra_config as spec_module_path; vLLM imports it.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class CpuCopyWorker(OffloadingWorker):
    """Copies whole blocks, tensor by tensor, on one thread beside the forward pass."""

    def __init__(self, kv_caches: Any, region: SharedOffloadRegion) -> None:
        self._region = region
        self._device = [
            t.tensor.view(torch.int8).view((-1, t.page_size_bytes)) for t in kv_caches.tensors
        ]
        self._host = [region.create_next_worker_view(t.page_size_bytes) for t in kv_caches.tensors]
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._jobs: dict[int, Future[TransferResult]] = {}

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        pairs = list(zip(dst_spec.block_ids.tolist(), src_spec.block_ids.tolist(), strict=True))
        self._jobs[job_id] = self._thread.submit(
            self._copy, job_id, self._host, self._device, pairs
        )
        return True

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        pairs = list(zip(dst_spec.block_ids.tolist(), src_spec.block_ids.tolist(), strict=True))
        self._jobs[job_id] = self._thread.submit(
            self._copy, job_id, self._device, self._host, pairs
        )
        return True

    def _copy(
        self,
        job_id: int,
        to: list[torch.Tensor],
        source: list[torch.Tensor],
        pairs: list[tuple[int, int]],
    ) -> TransferResult:
        started_s = time.monotonic()
        num_bytes = 0
        for to_tensor, source_tensor in zip(to, source, strict=True):
            for to_block, source_block in pairs:
                to_tensor[to_block].copy_(source_tensor[source_block])
            num_bytes += len(pairs) * to_tensor.shape[1]
        return TransferResult(job_id, True, num_bytes, time.monotonic() - started_s)

    def get_finished(self) -> list[TransferResult]:
        ended = [job_id for job_id, future in self._jobs.items() if future.done()]
        return [self._jobs.pop(job_id).result() for job_id in ended]

    def wait(self, job_ids: set[int]) -> None:
        for job_id in job_ids & self._jobs.keys():
            self._jobs[job_id].exception()

    def shutdown(self) -> None:
        self._thread.shutdown()
        self._device.clear()
        self._host.clear()
        self._region.cleanup()


class CpuTieringSpec(TieringOffloadingSpec):
    """TieringOffloadingSpec whose worker runs on the CPU build."""

    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        if not self._worker:
            assert self.blocks_per_chunk == 1, "one engine block per chunk is all this copies"
            region = SharedOffloadRegion(
                engine_id=self.config.engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = CpuCopyWorker(kv_caches, region)
        return self._worker
