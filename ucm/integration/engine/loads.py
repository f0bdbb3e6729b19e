"""The scheduler side's lookups: what vLLM is told it can have, and the loads that follow.

    none ──lookup──► asked ──reply──► answered (pinned) ──allocated──► loading ──all ranks──► none

A promise is kept or not made: vLLM hears of tokens only when their pages are pinned in memory that
every rank has mapped, so a load can't fail on storage. While a lookup has no answer vLLM is told to
ask again at its next step.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial

import msgspec

from ucm.integration.copies.jobs import NO_GENERATION, CopyJob, PagePart
from ucm.integration.engine.counts import Counts
from ucm.integration.engine.device_blocks import BlockLedger
from ucm.integration.engine.facts import EngineFacts
from ucm.integration.engine.prompt import RequestState, parts_of_tokens
from ucm.integration.engine.turns import Turns
from ucm.integration.engine.waiting import STEP_WAIT_S
from ucm.outcome import Outcome, missed_as
from ucm.store.client.session import NodeSession
from ucm.store.node import protocol as p

logger = logging.getLogger(__name__)

# The node cache settles a lookup by its deadline; an answer later than this will never come, unless
# the machine itself stood still: it gets as long again from when that is noticed.
_GRACE_S = 0.5


@dataclass(eq=False)
class Hit:
    """One lookup. `offsets[i]` is the slot of block `read_from + i`, once answered."""

    state: RequestState
    lookup_id: int
    generation: int
    read_from: int
    asked_s: float
    overdue_s: float
    is_last_wait: bool = False
    reply: p.LookupReply | None = None

    def end_tokens(self, block_tokens: int) -> int:
        count = len(self.reply.offsets) if self.reply is not None else 0
        return (self.read_from + count) * block_tokens


@dataclass(frozen=True)
class Load:
    """Copies into `device_blocks`. Without a hit they can only fail."""

    state: RequestState
    hit: Hit | None
    device_blocks: list[int]


class Hits:
    """All lookups and loads of one engine. Owned by the engine's thread."""

    def __init__(
        self,
        session: NodeSession,
        facts: EngineFacts,
        ledger: BlockLedger,
        *,
        layerwise: bool,
        block_tokens: int,
        timeout_s: float,
        turns: Turns,
        stats: Counts,
    ) -> None:
        self._session = session
        self._facts = facts
        self._ledger = ledger
        self._layerwise = layerwise
        self._block_tokens = block_tokens
        self._timeout_s = timeout_s
        self._turns = turns
        self._stats = stats
        self._hits: dict[str, Hit] = {}
        self._planned: list[CopyJob] = []
        self._loading: dict[int, Load] = {}

    # -- what vLLM asks --------------------------------------------------------------------

    def matched_tokens(self, state: RequestState, num_computed: int) -> tuple[int | None, bool]:
        """As vLLM's get_num_new_matched_tokens; None asks vLLM to ask again."""
        if not state.keys or state.no_loads:
            return 0, False
        # vLLM asks of requests that may read no cache as well, and drops the answer.
        loads = self._facts.loads and not state.request.skip_reading_prefix_cache
        hit = self._hits.get(state.request_id)
        if hit is not None and not self._still_good(hit, num_computed):
            self.drop(state)
            hit = None
        if hit is None:
            if not self._session.is_ready:
                state.end_reason = self._session.why_not_ready
                return 0, False
            if self._turns.must_wait(state, time.monotonic()):
                return self._wait_for_turn(state, loads=loads), False
            hit = self._ask(state, num_computed, load=loads)
        if not loads:
            return 0, False  # a producer only wants to know what is stored, and doesn't wait
        if hit.reply is None:
            self._session.wait_for_news()
        if hit.reply is None:
            if not self._is_given_up(hit):
                return None, False
            self.drop(state)
            self._session.found_silent()
            state.no_loads = True
            state.end_reason = Outcome.TIMEOUT
            return 0, False
        # There is something to do: the answers of others can be waited for in the next step.
        self._session.wait_at_most(STEP_WAIT_S)
        return self._offer(state, hit, num_computed)

    def _wait_for_turn(self, state: RequestState, *, loads: bool) -> int | None:
        """Who only wants to know what is stored doesn't wait: dumps skip what is there anyway."""
        if not loads:
            return 0
        if not state.no_loads:
            return None
        self._stats.count("ucm_lookup_missed_blocks", len(state.keys), reason=Outcome.TIMEOUT)
        return 0

    def _is_given_up(self, hit: Hit) -> bool:
        now_s = time.monotonic()
        if now_s <= hit.overdue_s:
            return False
        was_last, hit.is_last_wait, hit.overdue_s = hit.is_last_wait, True, now_s + _GRACE_S
        return was_last

    def _still_good(self, hit: Hit, num_computed: int) -> bool:
        """Not if the node cache is another one, or if vLLM has less of the prompt than then."""
        same_node = hit.generation == self._session.generation
        return same_node and num_computed >= hit.read_from * self._block_tokens

    def _ask(self, state: RequestState, num_computed: int, *, load: bool) -> Hit:
        now_s = time.monotonic()
        crowded_out = self._turns.asks(hit_id := self._session.next_id(), state, now_s)
        if crowded_out is not None:
            self.drop(crowded_out)  # it asks again, for what is there by now
        promise = state.promise
        wait_s = promise.left_s(now_s) if promise is not None else 0.0
        renewed = promise is not None and promise.is_renewed
        timeout_s = max(wait_s, self._timeout_s)
        hit = Hit(
            state=state,
            lookup_id=hit_id,
            generation=self._session.generation,
            read_from=min(num_computed // self._block_tokens, len(state.keys)),
            asked_s=now_s,
            overdue_s=now_s + timeout_s * (len(state.keys) if renewed else 1) + _GRACE_S,
        )
        self._hits[state.request_id] = hit
        self._session.ask(
            p.Lookup(
                id=hit.lookup_id,
                ns=self._session.namespace,
                keys=list(state.keys),
                read_from=hit.read_from,
                load=load,
                timeout_ms=int(timeout_s * 1000),
                promised=promise.num_blocks if promise is not None and wait_s > 0 else 0,
                renewed=renewed,
                tail_tokens=state.tail_tokens,
            ),
            partial(self._on_reply, hit),
        )
        return hit

    def _offer(self, state: RequestState, hit: Hit, num_computed: int) -> tuple[int, bool]:
        num_prompt = state.num_prompt
        # In a step that loads and computes, one token must be left to compute. An asynchronous
        # load may cover the whole prompt: vLLM then computes the last token again. With nothing in
        # front of that token it would find nothing computed, and ask again, for ever.
        limit = num_prompt - 1 if self._layerwise or num_prompt == 1 else num_prompt
        extra = min(hit.end_tokens(self._block_tokens), limit) - num_computed
        if extra <= 0:
            self._release(hit)
            return 0, False
        return extra, not self._layerwise

    def _on_reply(self, hit: Hit, reply: p.LookupReply) -> None:
        self._turns.ended(hit.lookup_id)
        hit.reply = reply
        hit.state.end_reason = reply.reason
        self._count_reply(hit, reply)

    def _count_reply(self, hit: Hit, reply: p.LookupReply) -> None:
        promise = hit.state.promise
        if promise is not None and not promise.void:
            self._stats.observe("ucm_handoff_wait_seconds", time.monotonic() - hit.asked_s)
        elif reply.reason and self._facts.loads:
            missed = len(hit.state.keys) - hit.read_from - reply.num_stored
            reason = missed_as(reply.reason)
            self._stats.count("ucm_lookup_missed_blocks", missed, reason=reason)

    @property
    def is_loading(self) -> bool:
        return bool(self._loading)

    # -- what vLLM decides -----------------------------------------------------------------

    def allocated(self, state: RequestState, start: int, num_tokens: int) -> None:
        """vLLM has given device blocks to tokens [start, start + num_tokens) of the store's."""
        if self._ledger.is_loading(state.request_id):
            return  # said twice
        hit = self._hits.pop(state.request_id, None)
        parts = self._parts(hit, state, start, start + num_tokens) if hit is not None else ()
        if hit is None or hit.reply is None or not parts:
            if hit is not None:
                self._release(hit)
            self._plan_failure(state, start, start + num_tokens)
            return
        self._plan(state, hit, hit.generation, parts)
        from_files = min(num_tokens, hit.reply.from_files * self._block_tokens)
        self._stats.count("ucm_hit_tokens", from_files, source="files")
        self._stats.count("ucm_hit_tokens", num_tokens - from_files, source="memory")

    def _parts(self, hit: Hit, state: RequestState, start: int, end: int) -> tuple[PagePart, ...]:
        """Nothing if this is not what was offered, of this node cache."""
        if hit.generation != self._session.generation or hit.reply is None:
            return ()
        unit = self._facts.block_tokens
        covered = hit.read_from * self._block_tokens <= start < end
        if not covered or end > hit.end_tokens(self._block_tokens) or start % unit:
            return ()
        return parts_of_tokens(
            start,
            end,
            {hit.read_from + i: offset for i, offset in enumerate(hit.reply.offsets)},
            state.device_blocks,
            block_tokens=self._block_tokens,
            unit=unit,
        )

    def _plan(
        self, state: RequestState, hit: Hit | None, generation: int, parts: tuple[PagePart, ...]
    ) -> None:
        job = CopyJob(self._session.next_id(), state.request_id, generation, parts)
        self._loading[job.job_id] = Load(state, hit, [b for part in parts for b in part.block_ids])
        if not self._layerwise:
            self._ledger.load(state.request_id, job.job_id)
        self._planned.append(job)

    def _plan_failure(self, state: RequestState, start: int, end: int) -> None:
        """vLLM counts on tokens that nobody has (any more): it must hear of a load, and that it has
        failed. No rank has the memory of NO_GENERATION."""
        logger.error(
            "%s: vLLM expects tokens %d to %d from the store, which has not promised them (any "
            "more): they are computed, if kv_load_failure_policy is recompute",
            state.request_id,
            start,
            end,
        )
        unit = self._facts.block_tokens
        blocks = tuple(state.device_blocks[start // unit : -(-end // unit)])
        part = PagePart(slot_offset=0, first_token=0, block_ids=blocks)
        self._plan(state, None, NO_GENERATION, (part,))

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
        load.state.no_loads, load.state.end_reason = True, Outcome.IO_ERROR
        return set(load.device_blocks) if self._layerwise else set()

    def ended(self, job_id: int) -> None:
        """All ranks have copied: the pins go."""
        load = self._loading.pop(job_id, None)
        self._ledger.ended(job_id)
        hit = load.hit if load is not None else None
        if hit is not None and hit.generation == self._session.generation:
            self._session.release(hit.lookup_id)

    def known(self, state: RequestState) -> Hit | None:
        """The request's lookup, answered or not."""
        return self._hits.get(state.request_id)

    def drop(self, state: RequestState) -> None:
        """Withdraws the request's lookup, or gives back what it pinned."""
        hit = self._hits.pop(state.request_id, None)
        if hit is not None:
            self._release(hit)

    def _release(self, hit: Hit) -> None:
        self._turns.ended(hit.lookup_id)
        if hit.generation == self._session.generation and not _pins_nothing(hit):
            self._session.release(hit.lookup_id)
        if hit.reply is not None:
            hit.reply = msgspec.structs.replace(hit.reply, offsets=[])

    def forget_all(self) -> None:
        """Nothing that was looked up counts any more. Loads under way go on."""
        for hit in list(self._hits.values()):
            self.drop(hit.state)

    def node_lost(self) -> None:
        """What was promised is gone. Loads under way go on: the ranks still have that memory."""
        lost = [name for name, hit in self._hits.items() if hit.reply is None or hit.reply.offsets]
        for name in lost:
            self._turns.ended(self._hits.pop(name).lookup_id)


def _pins_nothing(hit: Hit) -> bool:
    return hit.reply is not None and not hit.reply.offsets
