"""UCMConnector: vLLM's connector interface, and nothing else.

Each hook is handed to the scheduler side or to the worker side; what they do is in `scheduler` and
`worker`. Nothing in vLLM is patched. Importing this module does one thing: it tells vLLM's registry
of connectors where the name UCMConnector is, because MultiConnector looks up its children's
statistics by name.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)

from ucm.config.settings import load_settings, start_epoch
from ucm.integration.engine.strand_report import strands_text
from ucm.integration.vllm.device_facts import wanted_layout
from ucm.integration.vllm.engine_facts import engine_facts
from ucm.integration.vllm.engine_versions import check_version, hybrid_support
from ucm.integration.vllm.identity import manifest
from ucm.integration.vllm.logs import log_like_vllm
from ucm.integration.vllm.metadata import RankReport, StepMetadata
from ucm.integration.vllm.scheduler import SchedulerSide
from ucm.integration.vllm.stats import UcmPromMetrics, UcmStats
from ucm.integration.vllm.worker import WorkerSide
from ucm.integration.vllm.wrapped import (
    is_made_by_another,
    refuse_what_another_keeps,
    warn_of_what_another_keeps,
)
from ucm.store.client.link import NodeLink

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

_HybridSupport: Any = hybrid_support()


class UCMConnector(KVConnectorBase_V1, _HybridSupport):
    """One per process and role. vLLM makes and drives it."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        log_like_vllm()
        check_version(vllm.__version__)
        settings = load_settings(vllm_config.kv_transfer_config.kv_connector_extra_config)
        facts = engine_facts(vllm_config, kv_cache_config, settings)
        is_wrapped = is_made_by_another(vllm_config.kv_transfer_config, type(self))
        if is_wrapped:
            refuse_what_another_keeps(settings, facts)
        self._stats = UcmStats()
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role is KVConnectorRole.SCHEDULER:
            for warning in settings.warnings:
                logger.warning("%s", warning)
            if is_wrapped:
                warn_of_what_another_keeps()
            if facts.why_no_hits:
                logger.warning(
                    "nothing is loaded from the store into this engine: %s", facts.why_no_hits
                )
            if len(facts.targets) > 1 or not facts.is_plain:
                interval = facts.interval_tokens(settings.window_interval)
                logger.info("%s", strands_text(facts.strands, interval))
            self._scheduler = SchedulerSide(
                settings,
                facts,
                manifest(vllm_config, facts, settings, epoch=start_epoch(settings)),
                NodeLink(settings.store, engine_id=facts.engine_id),
                stats=self._stats,
            )
        else:
            from vllm.distributed import get_tensor_model_parallel_rank

            self._worker = WorkerSide(
                settings,
                facts,
                tp_rank=int(get_tensor_model_parallel_rank()),
                stats=self._stats,
            )

    # -- before there is a connector ---------------------------------------------------------

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """A layout in which a block of a layer is one run, as it is in a page. A preference: vLLM
        drops it where the backend can't. Not asked for where blocks would be staged anyway: the
        attention kernels may be slower in it."""
        extra_config = vllm_config.kv_transfer_config.kv_connector_extra_config
        return wanted_layout(vllm_config, load_settings(extra_config))

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Layer by layer needs Python between the layers."""
        return load_settings(extra_config).use_layerwise

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """vLLM maps other memory to the addresses it had: views of it stay good, and no copy is
        under way."""
        return True

    @property
    def requires_kv_delivery(self) -> bool:
        """A dump that is dropped is a later miss, never a reason to compute again here."""
        return False

    # -- worker side -------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._rank.register(kv_caches)

    def unregister_kv_caches(self) -> None:
        """Their memory goes after this, until vLLM wakes up."""
        self._rank.drain()

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        assert isinstance(kv_connector_metadata, StepMetadata)
        self._rank.fence(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._rank.begin(self._step)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        self._rank.start_loads(self._step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        self._rank.wait_layer(layer_name)

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        self._rank.save_layer(self._step, layer_name)

    def wait_for_save(self) -> None:
        self._rank.end_of_forward(self._step)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return self._rank.take_finished(self._step)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        # Not every vLLM that this runs on asks for them, and has the class.
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

        finished, received = self._rank.take_finished(self._step)
        failed = self._rank.take_failed_requests()
        return KVConnectorTransferResults(finished, received, failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._rank.take_bad_blocks()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self._rank.take_report()

    # -- scheduler side ----------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        self._engine.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self._engine.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        self._engine.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self._engine.step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        if connector_output.invalid_block_ids:
            self._engine.blocks_invalid(connector_output.invalid_block_ids)
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, RankReport):
            self._engine.ranks_reported(report)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._engine.finished(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._engine.finished(request, block_ids)

    def reset_cache(self) -> bool:
        self._engine.reset()
        return True

    # -- metrics: taken in both roles, shown where there is no connector ------------------------

    def get_kv_connector_stats(self) -> UcmStats | None:
        return self._stats.take()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> UcmStats:
        return UcmStats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> UcmPromMetrics:
        return UcmPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # -- both --------------------------------------------------------------------------------

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()

    @property
    def _step(self) -> StepMetadata:
        step = self._get_connector_metadata()
        assert isinstance(step, StepMetadata)
        return step

    @property
    def _engine(self) -> SchedulerSide:
        assert self._scheduler is not None, "a hook of the scheduler side on the worker side"
        return self._scheduler

    @property
    def _rank(self) -> WorkerSide:
        assert self._worker is not None, "a hook of the worker side on the scheduler side"
        return self._worker


def _register() -> None:
    """A name that is taken already stays what it is."""
    try:
        KVConnectorFactory.register_connector(
            UCMConnector.__name__, __name__, UCMConnector.__name__
        )
    except ValueError:
        logger.debug("vLLM knows a connector of this name already")


_register()
