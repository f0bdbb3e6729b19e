"""What vLLM's offloading scheduler stores and looks up of a prompt, without an engine around it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    OffloadingConnectorScheduler,
)
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_groups
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.kv_offload.base import LookupResult, RequestOffloadingContext
from vllm.v1.request import RequestStatus

_STEP_TOKENS = 2048
_SOME_BLOCK = 7


class _Files:
    """The manager that the scheduler asks: it has what was stored, and notes what is found."""

    def __init__(self) -> None:
        self.stored: set[bytes] = set()
        self.found: set[bytes] = set()

    def on_new_request(self, _: object) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def lookup(self, key: bytes, _: object) -> LookupResult:
        if key not in self.stored:
            return LookupResult.MISS
        self.found.add(key)
        return LookupResult.HIT

    def prepare_store(self, keys: list[bytes], _: object) -> SimpleNamespace:
        new = [key for key in keys if key not in self.stored]
        self.stored.update(new)
        return SimpleNamespace(keys_to_store=new, store_spec=None)


class FsTier:
    """Of one engine. `specs` are those of its layers."""

    def __init__(self, specs: dict[str, KVCacheSpec], retention_interval: int = 0) -> None:
        config = VllmConfig()
        config.cache_config.kv_cache_layout = "LBNHC"
        config.cache_config.prefix_cache_retention_interval = retention_interval
        groups = get_kv_cache_groups(config, specs)
        self.cache: KVCacheConfig = get_kv_cache_config_from_groups(config, groups, 8 << 30)
        (self._block_tokens,) = {group.kv_cache_spec.block_size for group in groups}
        self._interval = retention_interval
        self._files = _Files()
        offloading: Any = SimpleNamespace(
            config=SimpleNamespace(
                groups=[
                    SimpleNamespace(group_id=number, tokens_per_block=self._block_tokens)
                    for number in range(len(groups))
                ]
            ),
            blocks_per_chunk=1,
            tokens_per_hash=self._block_tokens,
            tokens_per_block=[self._block_tokens],
            offload_prompt_only=True,
            get_manager=lambda: self._files,
            kv_events_config=SimpleNamespace(
                self_describing_kv_events=False, enable_kv_cache_events=False
            ),
        )
        self._scheduler = OffloadingConnectorScheduler(offloading, config, self.cache)

    @property
    def row_bytes(self) -> int:
        return self.cache.kv_cache_tensors[0].size // self.cache.num_blocks

    def written_rows(self, num_prompt: int) -> int:
        """The prompt is computed in several steps."""
        request = self._request("written", num_prompt)
        state = self._scheduler._req_status["written"]
        state.update_offload_keys()
        for done in range(0, num_prompt, _STEP_TOKENS):
            request.num_computed_tokens = done
            step = min(_STEP_TOKENS, num_prompt - done)
            for group in state.group_states:
                group.block_ids = [_SOME_BLOCK] * -(-(done + step) // self._block_tokens)
            output: Any = SimpleNamespace(
                num_scheduled_tokens={"written": step}, finished_req_ids=()
            )
            self._scheduler._build_store_jobs(output)
        for number, group in enumerate(self._scheduler.config.kv_group_configs):
            if group.requires_cow_source:
                ends = self._state_ends(group.kv_cache_spec, num_prompt)
                offers = {"written": [(number, _SOME_BLOCK, end) for end in ends]}
                self._scheduler._build_aligned_boundary_store_jobs(offers)
        return len(self._files.stored)

    def read_rows(self, num_prompt: int) -> int:
        request: Any = self._request("read", num_prompt)
        self._scheduler.get_num_new_matched_tokens(request, 0)
        return len(self._files.found)

    def _request(self, request_id: str, num_prompt: int) -> SimpleNamespace:
        num_blocks = num_prompt // self._block_tokens
        request = SimpleNamespace(
            request_id=request_id,
            num_tokens=num_prompt,
            num_prompt_tokens=num_prompt,
            num_computed_tokens=0,
            block_hashes=[block.to_bytes(32, "big") for block in range(num_blocks)],
            kv_transfer_params=None,
            kv_hints=None,
            status=RequestStatus.RUNNING,
            is_finished=lambda: False,
            shared_prefix_boundary=None,
            skip_reading_prefix_cache=False,
        )
        self._scheduler.on_new_request(request)
        return request

    def _state_ends(self, spec: KVCacheSpec, num_prompt: int) -> list[int]:
        """The states that vLLM's own cache keeps, and then offers to connectors."""
        num_blocks = num_prompt // self._block_tokens
        mask = KVCacheSpecRegistry.get_manager_class(spec).reachable_block_mask(
            start_block=0,
            end_block=num_blocks,
            alignment_tokens=self._block_tokens,
            kv_cache_spec=spec,
            use_eagle=False,
            retention_interval=self._interval,
            reachable_boundaries=(num_prompt - 1,),
        )
        kept = [True] * num_blocks if mask is None else mask
        return [(i + 1) * self._block_tokens for i in range(num_blocks) if kept[i]]
