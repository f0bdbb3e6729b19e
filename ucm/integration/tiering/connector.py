"""UCMOffloadingConnector: vLLM's OffloadingConnector, whose tiers know which engine they are of.

Nothing of what vLLM does is changed. Beside telling the tiers, it answers a prefill that the proxy
has asked for a receipt with one. Importing this module tells vLLM's registry of connectors where
the name is, because MultiConnector looks up its children's statistics by name.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.request import RequestStatus

from ucm import handoff
from ucm.integration.tiering.engine import Engine, making
from ucm.integration.tiering.promises import is_receipt_wanted
from ucm.integration.vllm.engine_versions import OLDEST_TIERING, check_version
from ucm.integration.vllm.logs import log_like_vllm

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

_COMPUTED = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


class UCMOffloadingConnector(OffloadingConnector):
    """One per process and role. vLLM makes and drives it."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        log_like_vllm()
        check_version(vllm.__version__, oldest=OLDEST_TIERING, who="UcmTier")
        self._engine = Engine(vllm_config, kv_cache_config)
        with making(self._engine):
            super().__init__(vllm_config, role, kv_cache_config)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._with_receipt(request, super().request_finished(request, block_ids))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        found = super().request_finished_all_groups(request, block_ids)
        return self._with_receipt(request, found)

    def _with_receipt(
        self, request: Request, found: tuple[bool, dict[str, Any] | None]
    ) -> tuple[bool, dict[str, Any] | None]:
        is_kept, params = found
        is_computed = request.status in _COMPUTED
        if not is_computed or not is_receipt_wanted(request.kv_transfer_params):
            return found
        for tier in self._engine.tiers:
            receipt = tier.receipt(
                request.request_id, request.block_hashes, request.num_prompt_tokens
            )
            if receipt is not None:
                return is_kept, {**(params or {}), **handoff.params(receipt)}
        return found

    def reset_cache(self) -> bool | None:
        done: bool | None = super().reset_cache()
        for tier in self._engine.tiers:
            tier.begin_epoch()
        return done


with suppress(ValueError):  # a name that is taken already stays what it is
    KVConnectorFactory.register_connector(
        UCMOffloadingConnector.__name__, __name__, UCMOffloadingConnector.__name__
    )
