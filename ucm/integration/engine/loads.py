"""The scheduler side's loads: the copies of what vLLM took of its offers.

    answered (pinned) ──allocated──► loading ──all ranks──► none

When all ranks have copied, the pins go. A node cache that is lost ends no load: the ranks still
have its memory.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from ucm.integration.copies.jobs import NO_GENERATION, CopyJob, PagePart
from ucm.integration.engine.counts import Counts
from ucm.integration.engine.device_blocks import BlockLedger
from ucm.integration.engine.dump_state import DeviceBlocks
from ucm.integration.engine.facts import EngineFacts
from ucm.integration.engine.hit import Hit, RequestLookups
from ucm.integration.engine.hits import Hits
from ucm.integration.engine.prompt import Prompt
from ucm.integration.engine.ranges import parts_of_tokens
from ucm.integration.engine.state_dumps import NULL_BLOCK
from ucm.outcome import Outcome
from ucm.store.blocks.strands import ALL, first_needed_token
from ucm.store.client.session import NodeSession

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Load:
    """Copies of `num_tokens` into `device_blocks`, for which the slowest rank took `took_s`.
    Without a hit they can only fail."""

    of_request: RequestLookups
    hit: Hit | None
    num_tokens: int
    device_blocks: list[int]
    took_s: float = 0.0


class Loads:
    """All loads of one engine. Owned by the engine's thread."""

    def __init__(
        self,
        session: NodeSession,
        facts: EngineFacts,
        hits: Hits,
        ledger: BlockLedger,
        *,
        layerwise: bool,
        stats: Counts,
    ) -> None:
        self._session = session
        self._facts = facts
        self._hits = hits
        self._ledger = ledger
        self._layerwise = layerwise
        self._stats = stats
        self._planned: list[CopyJob] = []
        self._loading: dict[int, Load] = {}

    @property
    def is_loading(self) -> bool:
        return bool(self._loading)

    @property
    def awaited_blocks(self) -> set[int]:
        """The device blocks of loads that vLLM waits for: nothing is computed with them before."""
        loads = () if self._layerwise else self._loading.values()
        return {block for load in loads for block in load.device_blocks}

    def allocated(
        self, prompt: Prompt, device_blocks: DeviceBlocks, start: int, num_tokens: int
    ) -> None:
        """vLLM has given device blocks to tokens [start, start + num_tokens) of the store's."""
        if self._ledger.is_loading(prompt.request_id):
            return  # said twice
        end = start + num_tokens
        hit = self._hits.take(prompt.request_id)
        parts = self._parts(hit, device_blocks, start, end) if hit is not None else ()
        if hit is None or hit.reply is None or not parts:
            if hit is not None:
                self._hits.release(hit)
            self._plan_failure(prompt, device_blocks, start, end)
            return
        self._plan(prompt, hit, hit.generation, parts, num_tokens)
        from_files = hit.tokens_from_files(num_tokens)
        self._stats.count("ucm_hit_tokens", from_files, source="files")
        self._stats.count("ucm_hit_tokens", num_tokens - from_files, source="memory")

    def _parts(
        self, hit: Hit, device_blocks: DeviceBlocks, start: int, end: int
    ) -> tuple[PagePart, ...]:
        """Nothing if this is not what was offered, of this node cache."""
        if hit.generation != self._session.generation or hit.reply is None:
            return ()
        covered = hit.read_from * hit.prompt.block_tokens <= start < end <= hit.end_tokens
        if not covered or (hit.sides is not None and end != hit.sides.end_tokens):
            return ()
        parts: list[PagePart] = []
        for number, target in enumerate(self._facts.targets):
            unit, blocks = target.block_tokens, device_blocks[target.group]
            reach = self._facts.strands[target.strand].reach
            first = first_needed_token(reach, end)
            # vLLM has whole blocks of what it needs, and knows them by their tokens from then on.
            begin = max(start, first // unit * unit)
            if begin % unit:
                return ()
            while reach != ALL and begin < end and blocks[begin // unit] == NULL_BLOCK:
                if target.field is not None:
                    return ()  # a state is all or nothing
                begin += unit  # it needs less than we think
            offsets = hit.offsets(target.strand)
            parts += parts_of_tokens(
                begin,
                end,
                {block: offset + target.page_offset_bytes for block, offset in offsets.items()},
                blocks,
                block_tokens=hit.prompt.block_tokens,
                unit=unit,
                target=number,
            )
        return tuple(parts)

    def _plan(
        self,
        prompt: Prompt,
        hit: Hit | None,
        generation: int,
        parts: tuple[PagePart, ...],
        num_tokens: int,
    ) -> None:
        job = CopyJob(self._session.next_id(), prompt.request_id, generation, parts)
        device_blocks = [block for part in parts for block in part.block_ids]
        of_request = self._hits.of_request(prompt)
        self._loading[job.job_id] = Load(of_request, hit, num_tokens, device_blocks)
        if not self._layerwise:
            self._ledger.load(prompt.request_id, job.job_id)
        self._planned.append(job)

    def _plan_failure(self, prompt: Prompt, groups: DeviceBlocks, start: int, end: int) -> None:
        """vLLM counts on tokens that nobody has (any more): it must hear of a load, and that it has
        failed. No rank has the memory of NO_GENERATION."""
        logger.error(
            "%s: vLLM expects tokens %d to %d from the store, which has not promised them (any "
            "more): they are computed, if kv_load_failure_policy is recompute",
            prompt.request_id,
            start,
            end,
        )
        base = self._facts.targets[0]
        unit = base.block_tokens
        blocks = tuple(groups[base.group][start // unit : -(-end // unit)])
        part = PagePart(slot_offset=0, first_token=0, block_ids=blocks)
        self._plan(prompt, None, NO_GENERATION, (part,), end - start)

    def take_planned(self) -> tuple[CopyJob, ...]:
        """The loads for this step's metadata."""
        planned, self._planned = tuple(self._planned), []
        return planned

    def is_under_way(self, job_id: int) -> bool:
        return job_id in self._loading

    def failed(self, job_id: int) -> set[int]:
        """A rank could not copy. vLLM computes the blocks, and asks anew if none is left: it must
        not be told the same. The device blocks that a forward pass has used all the same."""
        load = self._loading.get(job_id)
        if load is None:
            return set()
        load.of_request.end(Outcome.IO_ERROR)
        return set(load.device_blocks) if self._layerwise else set()

    def took(self, job_id: int, seconds: float) -> None:
        """A rank has copied for so long."""
        load = self._loading.get(job_id)
        if load is not None:
            load.took_s = max(load.took_s, seconds)

    def ended(self, job_id: int) -> Load | None:
        """All ranks have copied: the pins go. What was copied, if anything could be."""
        load = self._loading.pop(job_id, None)
        self._ledger.ended(job_id)
        if load is None or load.hit is None:
            return None
        self._hits.release(load.hit)
        return load
