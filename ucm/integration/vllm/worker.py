"""The worker side: one per rank. Maps the node cache's memory and copies between it and the device.

vLLM calls everything here from the rank's own thread, in the order of a step: `fence`, `begin`,
`start_loads`, per layer `wait_layer` and `save_layer`, `end_of_forward`, `take_finished`; the last
two, and `start_loads` and the layers, also the other way round. A step whose `end_of_forward` has
been left out ends when the next one begins: vLLM's V1 runner has none on the stages of a pipeline
that don't sample, if it speculates. One that computes nothing ends with `take_finished` at the
latest: before 0.31 vLLM leaves out the end of all of those. A background thread keeps the
connection to the node cache and brings its memory; nothing is sent on the data path.

What is copied in a step is copied once, however often a hook is called: a draft model runs a layer
several times, of which the first has computed the prompt's tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ucm.config.settings import Settings
from ucm.integration.ascend.accelerator import accelerator_for
from ucm.integration.copies.arena import Arena
from ucm.integration.copies.copy_engine import CopyEngine
from ucm.integration.copies.generations import Memories
from ucm.integration.copies.jobs import CopyJob, Direction, PagePart
from ucm.integration.copies.make import make_copy_engine
from ucm.integration.engine.facts import EngineFacts
from ucm.integration.engine.meter import CopyMeter
from ucm.integration.engine.step_waits import IDLE_WAIT_MAX_S
from ucm.integration.vllm.batched_copy import batched_copy
from ucm.integration.vllm.metadata import RankReport, StepMetadata
from ucm.integration.vllm.registered import registered_target
from ucm.integration.vllm.stats import UcmStats
from ucm.store.blocks.page_layout import RankShare, rank_share
from ucm.store.client.rank_link import RankLink

logger = logging.getLogger(__name__)


class WorkerSide:
    """One rank's. `register` is called once, before the first step."""

    def __init__(
        self, settings: Settings, facts: EngineFacts, *, tp_rank: int, stats: UcmStats
    ) -> None:
        self._settings = settings
        self._facts = facts
        self._shares: list[RankShare] = [
            rank_share(
                facts.geometry_of(target),
                tp_rank=tp_rank,
                tp_size=facts.tp_size,
                layers=target.positions,
            )
            for target in facts.targets
        ]
        self._meter = CopyMeter(stats, facts, self._shares)
        self._layer_at = {name: i for i, name in enumerate(facts.layer_names)}
        # Of each target.
        self._kernel_blocks: list[int] = []
        self._engine: CopyEngine | None = None
        self._memories: Memories | None = None
        self._link: RankLink | None = None
        self._report = RankReport()
        self._loads: dict[int, CopyJob] = {}
        self._received: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._failed_requests: set[str] = set()
        # The step whose loads were begun last, and that of the dumps, with what is known of it.
        self._loading: StepMetadata | None = None
        self._dumping: StepMetadata | None = None
        self._unended: StepMetadata | None = None
        self._fenced: StepMetadata | None = None
        self._step_dumps: list[tuple[CopyJob, Arena]] = []
        self._saved_layers: set[int] = set()
        self._forward_ended = False

    def register(self, kv_caches: dict[str, Any]) -> None:
        """Takes the KV tensors of this rank. Raises UnsupportedEngine if they are laid out in no
        way that can be told."""
        facts = self._facts
        registered = [
            registered_target(facts, target, share, kv_caches)
            for target, share in zip(facts.targets, self._shares, strict=True)
        ]
        targets = [each.target for each in registered]
        self._kernel_blocks = [each.kernel_blocks for each in registered]
        self._engine = make_copy_engine(
            targets,
            accelerator=accelerator_for(targets),
            batched=batched_copy(),
            staging_bytes=self._settings.copy_staging_bytes,
        )
        device = targets[0].views[0].parts[0].device
        self._memories = Memories(device, pin_piece_bytes=self._settings.pin_piece_bytes)
        self._link = RankLink(
            self._settings.store, engine_id=facts.engine_id, on_memory=self._memories
        )
        self._link.start()

    # -- a step, in order ------------------------------------------------------------------

    def fence(self, step: StepMetadata) -> None:
        """Before this step overwrites freed blocks: their copies must have ended."""
        self._fenced = step
        if self._unended is not None:
            self.end_of_forward(self._unended)
        if self._link is not None and self._memories is not None:
            # A loss noticed between planning a job and sending it has raised the step's generation,
            # not the job's.
            jobs = (*step.loads, *step.step_loads, *step.dumps)
            oldest = min([step.generation, *(job.generation for job in jobs)])
            self._memories.planned_from(oldest)
            self._memories.first_step()
            self._link.follow(step.generation)
        if self._engine is not None and step.fence:
            if step.writes_before_fence:
                self._engine.fail(step.fence)
            self._engine.fence(step.fence)

    def begin(self, step: StepMetadata) -> None:
        """The step's loads come after what is on the stream now. vLLM's runners overwrite blocks
        partly before `fence` and partly after it, and all before this: a load that were ordered
        before the fence could overtake a dump that still reads its blocks, and one that were
        ordered later would wait for the step's own forward pass.

        A connector around this one may keep `fence` from it. Nothing but the runner's own writes
        comes before `begin` either, and what those touch fails by itself."""
        if self._fenced is not step:
            self.fence(step)
        self._unended = step
        if self._engine is not None:
            self._engine.order_before_forward()

    def start_loads(self, step: StepMetadata) -> None:
        """Once per step."""
        if self._loading is step:
            return
        self._loading = step
        for job in step.loads:
            self._loads[job.job_id] = job
            if arena := self._begin(job, Direction.LOAD):
                self._copying.submit(job.job_id, Direction.LOAD, self._parts(job), arena)
        for job in step.step_loads:
            self._loads[job.job_id] = job
            if arena := self._begin(job, Direction.LOAD):
                parts = self._parts(job)
                for layer in range(len(self._facts.layer_names)):
                    self._copying.submit_layer(job.job_id, Direction.LOAD, layer, parts, arena)
        if self._facts.can_sleep:
            self._copying.wait_until_queued()

    def wait_layer(self, layer_name: str) -> None:
        """Before a layer's attention: its part of this step's loads must be there."""
        layer = self._layer_at.get(layer_name)
        if layer is not None and self._settings.use_layerwise and self._engine is not None:
            self._engine.wait_layer(layer)

    def save_layer(self, step: StepMetadata, layer_name: str) -> None:
        """After a layer's attention. Only `use_layerwise` copies here, once per layer and step."""
        layer = self._layer_at.get(layer_name)
        if layer is None or not self._settings.use_layerwise or not step.dumps:
            return
        self._begin_dumps(step)
        if layer not in self._saved_layers and not self._forward_ended:
            self._save(layer)

    def end_of_forward(self, step: StepMetadata) -> None:
        """Starts the dumps of this step, or what `save_layer` has left of them."""
        self._unended = None
        if step.dumps:
            self._begin_dumps(step)
            if not self._forward_ended:
                self._forward_ended = True
                self._dump_the_rest()
                if step.at_once:
                    self._copying.fence(step.at_once)
        if self._facts.can_sleep and self._engine is not None:
            # vLLM waits for the device, and for nobody's queue, before it unmaps the KV cache.
            self._engine.wait_until_queued()

    def drain(self) -> None:
        """No copy touches the KV cache after this, until the next step."""
        if self._engine is not None:
            self._engine.wait_until_queued()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()

    def take_finished(self, step: StepMetadata) -> tuple[set[str], set[str]]:
        """Requests whose copies out have ended (vLLM may free their blocks) and whose loads have
        arrived. Collects what the next report says."""
        if step.idle and self._unended is step:
            self.end_of_forward(step)
        if self._engine is not None and self._memories is not None:
            if step.idle and self._loads:
                self._engine.wait_for_news(IDLE_WAIT_MAX_S)
            # First: a job that has ended has had its share.
            self._meter.busy(self._engine.take_busy())
            ended = self._engine.finished()
            for job_id in self._engine.failed():
                self._failed(job_id)
            self._memories.ended(ended)
            for job_id in ended:
                self._ended(job_id)
        self._report.measured = max(self._report.measured, step.measured)
        received, self._received = self._received, set()
        return set(step.released), received

    def take_bad_blocks(self) -> set[int]:
        """Where vLLM has several groups it can't tell by blocks what has failed, and with windows
        it would take what lies before the first of them for whole."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad if self._fails_by_blocks else set()

    def take_failed_requests(self) -> set[str]:
        """Those whose loads have failed, where blocks don't tell."""
        failed, self._failed_requests = self._failed_requests, set()
        return set() if self._fails_by_blocks else failed

    @property
    def _fails_by_blocks(self) -> bool:
        return len(self._facts.targets) == 1 and self._facts.is_plain

    def take_report(self) -> RankReport | None:
        report, self._report = self._report, RankReport()
        return report if report.ended or report.measured else None

    def close(self) -> None:
        if self._engine is not None and self._memories is not None:
            self._engine.close()
            self._memories.ended(self._engine.finished())
            self._memories.close()
        # Last: with the connection the node cache takes back the slots that were copied into.
        if self._link is not None:
            self._link.close()

    # -- parts of it -----------------------------------------------------------------------

    @property
    def _copying(self) -> CopyEngine:
        assert self._engine is not None, "register comes first"
        return self._engine

    def _begin(self, job: CopyJob, direction: Direction) -> Arena | None:
        arena = self._memories.begin(job) if self._memories is not None else None
        if arena is None:
            # The scheduler side plans nothing before every rank has the memory; if it ever does,
            # the job fails in the open.
            logger.error("job %d is for memory that this rank does not have", job.job_id)
            self._failed(job.job_id)
            self._ended(job.job_id)
        else:
            self._meter.began(job, direction)
        return arena

    def _failed(self, job_id: int) -> None:
        """A failed dump is not committed; the blocks of a failed load are reported to vLLM."""
        self._report.failed[job_id] = 1
        self._meter.failed(job_id)
        load = self._loads.get(job_id)
        if load is not None:
            self._bad_blocks.update(b for part in load.parts for b in part.block_ids)
            self._failed_requests.add(load.request_id)

    def _begin_dumps(self, step: StepMetadata) -> None:
        """Once per step."""
        if self._dumping is step:
            return
        self._dumping, self._step_dumps = step, []
        self._saved_layers, self._forward_ended = set(), False
        for job in step.dumps:
            if not any(self._shares[part.target].dumps for part in job.parts):
                self._ended(job.job_id)  # another rank has the same bytes and copies them
            elif arena := self._begin(job, Direction.DUMP):
                self._step_dumps.append((job, arena))

    def _dump_the_rest(self) -> None:
        if self._saved_layers:
            for layer in range(len(self._facts.layer_names)):
                if layer not in self._saved_layers:
                    self._save(layer)
        elif self._step_dumps:
            self._order_after_forward()
            for job, arena in self._step_dumps:
                parts = [part for part in self._parts(job) if self._shares[part.target].dumps]
                self._copying.submit(job.job_id, Direction.DUMP, parts, arena)
        self._step_dumps = []

    def _order_after_forward(self) -> None:
        if not self._settings.enable_event_sync and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self._copying.order_after_forward()

    def _save(self, layer: int) -> None:
        self._saved_layers.add(layer)
        self._order_after_forward()
        for job, arena in self._step_dumps:
            self._copying.submit_layer(job.job_id, Direction.DUMP, layer, self._parts(job), arena)

    def _ended(self, job_id: int) -> None:
        self._report.ended[job_id] = 1
        load = self._loads.pop(job_id, None)
        took_s = self._meter.ended(job_id)
        if load is not None and took_s:
            self._report.took_s[job_id] = took_s
        if load is not None and not self._settings.use_layerwise:
            self._received.add(load.request_id)  # vLLM holds the request back until then

    def _parts(self, job: CopyJob) -> Sequence[PagePart]:
        return [
            part
            if (count := self._kernel_blocks[part.target]) == 1
            else replace(
                part, block_ids=tuple(b * count + i for b in part.block_ids for i in range(count))
            )
            for part in job.parts
        ]
