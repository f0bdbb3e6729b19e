"""UcmTier: a secondary tier of vLLM's offloading, over the node cache.

    vLLM's offloading, in the scheduler's process            a thread of its own
      lookup, on_schedule_end ──► questions ────────────────► node cache: memory, files
      submit_store, submit_load ─► jobs ───── copies ───────► its memory <-> vLLM's host memory
      get_finished_jobs ◄───────── what has ended

No hook waits for storage. What vLLM asks for row by row is asked of the node cache by request
(`lookups.py`); what it submits becomes a job that ends in its time (`row_store.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadPolicy,
    RequestOffloadingContext,
    get_offload_group_idx,
    make_offload_key,
)
from vllm.v1.kv_offload.tiering.base import (
    JobResult,
    SecondaryTierManager,
)

from ucm.config.settings import load_settings, start_epoch
from ucm.handoff import Receipt
from ucm.integration.engine.epoch import Epochs
from ucm.integration.tiering.counts import TierCounts
from ucm.integration.tiering.engine import engine_of_tier
from ucm.integration.tiering.identity import row_manifest, waited_group
from ucm.integration.tiering.lookups import RowLookups
from ucm.integration.tiering.promises import (
    Promising,
    is_receipt_wanted,
    promise_of,
    receipt_for,
)
from ucm.integration.tiering.row_store import Ended, RowStore
from ucm.integration.tiering.rows import HostRows
from ucm.integration.tiering.vllm_stats import definitions, stats_of
from ucm.store.blocks.keys import Key

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
        OffloadingConnectorStats,
    )
    from vllm.v1.kv_offload.base import (
        OffloadingMetricMetadata,
        OffloadingSpec,
        OffloadKey,
        ReqContext,
        ScheduleEndContext,
    )
    from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector
    from vllm.v1.kv_offload.tiering.base import TransferJob

logger = logging.getLogger(__name__)

_LATER: Mapping[bool | None, LookupResult] = {
    True: LookupResult.HIT,
    False: LookupResult.MISS,
    None: LookupResult.RETRY,
}


@dataclass
class _LastStored:
    """Of a request: the row that the next one is written behind, and its place."""

    place: tuple[int, bool, int]
    key: Key


class UcmTier(SecondaryTierManager, Promising):
    """One per engine. vLLM makes it, by `module_path`, and drives it from one thread. `settings`
    are those of a UCM engine: UCM_CONFIG_FILE, or the same inline."""

    medium: ClassVar[Medium | None] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: BackpressureDetector | None = None,
        locality: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.locality = Locality(locality) if locality is not None else None
        engine = engine_of_tier()
        self._settings = load_settings(settings, source="secondary_tiers")
        for warning in self._settings.warnings:
            logger.warning("%s", warning)
        self._group = waited_group(engine, offloading_spec)
        self._tokens_per_hash = int(offloading_spec.tokens_per_hash)
        rows = HostRows.of(primary_kv_view)
        manifest = row_manifest(
            engine,
            offloading_spec,
            self._settings,
            row_bytes=rows.row_bytes,
            block_tokens=self._group.chunk_tokens,
            epoch=start_epoch(self._settings),
        )
        self._epochs = Epochs(self._settings, manifest)
        self._epochs.log()
        self._counts = TierCounts()
        self._store = RowStore(
            self._settings,
            rows,
            manifest,
            name=f"tiering-{offloading_spec.config.engine_id}-{engine.vllm_config.instance_id}",
            counts=self._counts,
        )
        self._lookups = RowLookups(self._store, self._group, self._settings, self._counts)
        # Of the loads under way: the request of each, and vLLM's names.
        self._loads: dict[int, tuple[str, dict[Key, OffloadKey]]] = {}
        engine.tiers.append(self)

    # -- requests --------------------------------------------------------------------------

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        promise = promise_of(
            req_context.kv_transfer_params,
            fingerprint=self._store.names.fingerprint,
            group=self._group,
            settings=self._settings,
        )
        if isinstance(promise, str):
            self._counts.count("ucm_tiering_promises", outcome=promise)
            promise = None
        self._lookups.begin(req_context.req_id, promise)
        if not is_receipt_wanted(req_context.kv_transfer_params):
            return RequestOffloadingContext()
        # What is promised is handed on even if vLLM's host memory has it already: that may be of a
        # time when the store did not take it.
        return RequestOffloadingContext(policy=OffloadPolicy.REQUEST_LEVEL)

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        found = self._lookups.lookup(
            req_context.req_id,
            self._store.names.key(key),
            group=get_offload_group_idx(key),
            end=req_context.get_offload_key_position(key) or 0,
        )
        return _LATER[found]

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._lookups.flush()

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._lookups.end(req_context.req_id)

    # -- jobs ------------------------------------------------------------------------------

    def submit_store(self, job_metadata: TransferJob) -> None:
        context = job_metadata.req_context
        if self._lookups.is_bypassed(context.req_id):
            self._store.refuse(job_metadata.job_id)
            return
        placed = sorted(
            (self._place(key, context), self._store.names.key(key), int(row))
            for key, row in zip(job_metadata.keys, job_metadata.chunk_ids, strict=True)
        )
        parents: list[bytes] = []
        last = context.get_state(_LastStored)
        for place, key, _ in placed:
            # Places rise in every engine alike, so no two rows ever wait for each other.
            parents.append(last.key if last is not None and last.place < place else b"")
            last = _LastStored(place, key)
        if last is not None:
            context.set_state(last)
        keys, rows = [key for _, key, _ in placed], [row for _, _, row in placed]
        self._store.store(job_metadata.job_id, keys, rows, parents)

    def _place(self, key: OffloadKey, context: ReqContext) -> tuple[int, bool, int]:
        """In the order in which rows are written: that of the prompt, and of those that end at one
        token the one that is waited for last."""
        group = get_offload_group_idx(key)
        end = context.get_offload_key_position(key) or 0
        return (end, group == self._group.number, group)

    def submit_load(self, job_metadata: TransferJob) -> None:
        names = {self._store.names.key(key): key for key in job_metadata.keys}
        rows = [int(row) for row in job_metadata.chunk_ids]
        self._loads[job_metadata.job_id] = (job_metadata.req_context.req_id, names)
        self._store.load(job_metadata.job_id, list(names), rows)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        return [self._result(ended) for ended in self._store.take_ended()]

    def _result(self, ended: Ended) -> JobResult:
        job = ended.job
        done: list[OffloadKey] | None = None
        if ended.is_load:
            request, names = self._loads.pop(ended.number)
            done = [name for key, name in names.items() if key in job.done]
            self._lookups.lost(request, names.keys() - job.done)
        return JobResult(
            job_id=ended.number,
            success=bool(job.rows) and job.is_whole,
            successful_keys=done or None,
            transfer_time=ended.took_s,
            transfer_bytes=len(job.done) * self.block_size_bytes,
        )

    def drain_jobs(self) -> None:
        self._store.drain()

    # -- hand-off, and what the connector tells ----------------------------------------------

    def receipt(self, request_id: str, block_hashes: Any, num_prompt: int) -> Receipt | None:
        tokens = num_prompt // self._group.chunk_tokens * self._group.chunk_tokens
        if not tokens or not self._store.is_ready or self._lookups.is_bypassed(request_id):
            return None
        block_hash = block_hashes[tokens // self._tokens_per_hash - 1]
        name = make_offload_key(block_hash, self._group.number)
        self._counts.count("ucm_tiering_promises", outcome="issued")
        return receipt_for(
            fingerprint=self._store.names.fingerprint,
            key=self._store.names.key(name),
            tokens=tokens,
            group=self._group,
        )

    def begin_epoch(self) -> None:
        if self._epochs.reset():
            self._lookups.bypass_all()
            self._store.reopen(self._epochs.manifest)

    # -- metrics, and the end ----------------------------------------------------------------

    @classmethod
    def build_metric_definitions(
        cls, extra_config: dict[str, Any]
    ) -> dict[str, OffloadingMetricMetadata]:
        return definitions()

    def get_stats(self) -> OffloadingConnectorStats | None:
        return stats_of(self._counts)

    def shutdown(self) -> None:
        self._store.close()
