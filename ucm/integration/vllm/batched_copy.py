"""vLLM's own call for many copies at once, where this platform has it.

On CUDA 12.8 and later that is one call into the driver for thousands of runs; without it torch
issues them one by one.
"""

from __future__ import annotations

import torch

from ucm.integration.copies.accelerator import BatchedCopy


def batched_copy() -> BatchedCopy | None:
    from vllm.platforms import current_platform

    if not current_platform.is_cuda_alike():
        return None  # XPU's takes addresses of another type
    from vllm import _custom_ops as ops

    if not hasattr(torch.ops._C_cache_ops, "swap_blocks_batch"):  # noqa: SLF001 - its name
        return None
    swap: BatchedCopy = ops.swap_blocks_batch
    return swap
