"""The scheduler side's dumps: which blocks go into the store, and when.

    todo ──reserve──► asked ──reply──► has a slot ──computed──► copying ──all ranks──► committed

Slots are asked for one step ahead of the computation, so a long prompt holds no more memory than
its next step can fill, and a step hardly ever waits for the answer. Blocks are copied and committed
in prompt order, strand by strand (`dump_state.py`). vLLM keeps a finished request's device blocks
until its copies have ended; whose blocks may be read is asked of the ledger (`device_blocks.py`),
and how far a prompt is its cursor (`ranges.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import partial

from ucm.config.settings import Settings
from ucm.integration.copies.jobs import CopyJob
from ucm.integration.engine.device_blocks import BlockLedger, BlockReturn
from ucm.integration.engine.dump_plan import of_answer, of_prompt
from ucm.integration.engine.dump_state import (
    DeviceBlocks,
    DumpEnd,
    DumpJob,
    RequestDump,
    StrandDump,
    parts_of,
    touches,
)
from ucm.integration.engine.facts import EngineFacts
from ucm.integration.engine.prompt import Prompt
from ucm.integration.engine.state_dumps import StateBlocks, StateCursor, states_at
from ucm.store.blocks.keys import Key
from ucm.store.blocks.strands import ALL
from ucm.store.client.session import NodeSession
from ucm.store.node import protocol as p

logger = logging.getLogger(__name__)


class Dumps:
    """All dumps of one engine. Owned by the engine's thread."""

    def __init__(
        self, session: NodeSession, facts: EngineFacts, settings: Settings, ledger: BlockLedger
    ) -> None:
        # Told of each block that this engine itself is to bring.
        self.on_slot: Callable[[Key, bool], None] = lambda key, is_doubted: None
        self._session = session
        self._ledger = ledger
        self._facts = facts
        self._timeout_s = settings.dump_timeout_ms / 1000
        self._interval_tokens = facts.interval_tokens(settings.window_interval)
        self._dumps: dict[str, RequestDump] = {}
        self._jobs: dict[int, tuple[StrandDump, DumpJob]] = {}
        self._planned: list[CopyJob] = []
        # Of these, those whose device blocks may be another request's in the next step.
        self._at_once: list[int] = []
        self._fence: list[int] = []
        self._draining: dict[str, float] = {}

    # -- a request's life ------------------------------------------------------------------

    def plan(self, prompt: Prompt, todo: Iterable[int], *, num_computed: int) -> None:
        """From now on these blocks of the request are dumped as they are computed, and what is
        kept of strands that don't need every block."""
        if prompt.request_id not in self._dumps:
            strands = of_prompt(
                prompt,
                self._facts,
                self._session.namespaces,
                of_base=todo,
                num_computed=num_computed,
                interval_tokens=self._interval_tokens,
            )
            dump = self._dumps[prompt.request_id] = RequestDump(prompt, strands, num_computed)
            self._reserve(dump.strands, num_computed + self._facts.max_step_tokens)

    def is_planned(self, request_id: str) -> bool:
        return request_id in self._dumps

    def allocated(self, request_id: str, device_blocks: DeviceBlocks) -> None:
        """vLLM has given the request these, of which it may have computed some before."""
        if (dump := self._dumps.get(request_id)) is not None:
            dump.device_blocks = device_blocks

    def computed(
        self,
        request_id: str,
        tokens: range,
        device_blocks: Callable[[], DeviceBlocks],
        states: StateBlocks,
    ) -> None:
        """This step computes these of the request's tokens, into the blocks that it has then. With
        its end there are these `states`."""
        dump = self._dumps.get(request_id)
        if dump is None or dump.is_closed:
            return  # whatever it has is not what its keys say
        prompt, num_tokens = dump.prompt, tokens.stop
        named_tokens = len(prompt.keys) * prompt.block_tokens
        is_first = tokens.start == dump.start_tokens and tokens.start <= named_tokens
        if dump.is_done and not states and not is_first:
            dump.offer(states)
            return  # all the blocks of a long prompt are not asked for in vain
        dump.device_blocks = device_blocks()
        if is_first:
            states = {**states_at(tokens.start, dump.device_blocks, self._facts), **states}
        dump.offer(states)
        if dump.is_done and not states:
            return
        self._reserve(dump.strands, num_tokens + self._facts.max_step_tokens)
        num_blocks = prompt.blocks_in(num_tokens)
        # Answers take a tenth of the time; a step that doesn't get one copies in the next.
        for of_strand in dump.strands:
            cursor = of_strand.cursor
            self._session.wait_for(lambda cursor=cursor: not cursor.is_awaited(num_blocks))  # type: ignore[misc]
        self._copy(dump, num_blocks)

    def answered(self, prompt: Prompt, device_blocks: DeviceBlocks) -> None:
        """`prompt` is the request's with what is answered to it so far; earlier steps have computed
        all of it, into these blocks. Nothing waits for it: what gets no slot now is copied in a
        later step."""
        dump = self._dumps.get(prompt.request_id)
        if dump is None or dump.is_closed or dump.leads_nowhere:
            return
        dump.device_blocks = device_blocks
        dump.answer = dump.answer or of_answer(dump.prompt, self._facts, self._session.namespaces)
        for of_strand in dump.answer:
            of_strand.prompt = prompt
            of_strand.cursor.grow(len(prompt.keys))
        self._reserve(dump.answer, prompt.num_tokens)

    def taken_back(self, request_id: str) -> None:
        """vLLM has the request's device blocks again, or waits for a load into them, and nothing
        more is read; the coming step may write into them. Copies under way are waited for by the
        ranks, the others don't start."""
        self._fence.extend(self._ledger.take_back(request_id))
        dump = self._dumps.pop(request_id, None)
        if dump is not None:
            self._close(dump)

    def finished(
        self,
        request_id: str,
        num_tokens: int,
        device_blocks: DeviceBlocks,
        *,
        unsaved: Collection[bytes] = (),
    ) -> DumpEnd:
        """The request has ended with its tokens up to `num_tokens` computed, and no load of it is
        under way. Storage will not have the pages of the keys `unsaved`."""
        dump = self._dumps.get(request_id)
        if dump is None:
            return DumpEnd()
        dump.device_blocks = device_blocks
        for of_strand in dump.strands:
            of_strand.cursor.end_at(dump.prompt.blocks_in(num_tokens))
        self._reserve(dump.strands, num_tokens)
        kept = dump.kept_blocks(self._facts, unsaved), dump.kept_with_answer(unsaved)
        ended = DumpEnd(True, *kept)
        ending = self._ledger.finish(request_id, more_to_dump=not dump.is_done)
        if ending is BlockReturn.HELD:
            self._draining[request_id] = time.monotonic()
            return ended
        self._close(self._dumps.pop(request_id))
        return replace(ended, is_copying=False)

    @property
    def is_draining(self) -> bool:
        """Copies of requests that have ended are still under way."""
        return bool(self._draining)

    # -- each step -------------------------------------------------------------------------

    def drain(self) -> tuple[str, ...]:
        """Goes on with finished requests; those whose copies have all ended are returned."""
        released = []
        for request_id, since_s in list(self._draining.items()):
            dump = self._dumps[request_id]
            self._copy(dump, len(dump.prompt.keys))
            late = time.monotonic() - since_s > self._timeout_s
            if not dump.is_done and (late or not self._session.can_store):
                why = "no slots in time" if late else "the node cache doesn't answer"
                num_left = sum(len(of_strand.cursor.todo) for of_strand in dump.all_strands)
                logger.warning("%d blocks of %s not stored: %s", num_left, request_id, why)
                self._give_up(dump)
            if dump.is_done and self._ledger.release(request_id):
                del self._draining[request_id]
                # Slots that were asked for in vain may still be given.
                self._close(self._dumps.pop(request_id))
                released.append(request_id)
        return tuple(released)

    def take_planned(self) -> tuple[CopyJob, ...]:
        planned, self._planned = tuple(self._planned), []
        return planned

    def take_at_once(self) -> tuple[int, ...]:
        """Of the planned, those that have to end with their own step."""
        at_once, self._at_once = tuple(self._at_once), []
        return at_once

    def take_fence(self) -> tuple[int, ...]:
        fence, self._fence = tuple(self._fence), []
        return fence

    def _reserve(self, strands: Iterable[StrandDump], to_tokens: int) -> None:
        if not self._session.can_store:
            return
        for of_strand in strands:
            prompt = of_strand.prompt
            blocks = of_strand.cursor.ask(prompt.blocks_in(to_tokens))
            if not blocks:
                continue
            self._session.ask(
                p.Reserve(
                    id=self._session.next_id(),
                    ns=of_strand.namespace,
                    keys=list(of_strand.keys_of(blocks)),
                    parents=of_strand.parents(blocks),
                    tail_tokens=prompt.tail_at(blocks[-1] + 1),
                ),
                partial(self._on_reply, of_strand, blocks),
            )

    def _on_reply(self, dump: StrandDump, blocks: list[int], reply: p.ReserveReply) -> None:
        certain = len(blocks) if reply.doubted_from is None else reply.doubted_from
        for number, (block, offset) in enumerate(zip(blocks, reply.offsets, strict=True)):
            dump.cursor.slots[block] = offset
            if offset >= 0:
                self.on_slot(dump.prompt.key_of(block, dump.strand), number >= certain)
        if dump.closed:
            self._abort_slots(dump)
        elif isinstance(dump.cursor, StateCursor):
            self._abort(dump, dump.cursor.take_late(blocks))

    def _copy(self, dump: RequestDump, num_blocks: int) -> None:
        """Plans the copies of leading blocks that are computed and have slots. The base comes last:
        who finds its pages should find the others."""
        for of_strand in reversed(dump.strands):
            self._copy_strand(of_strand, dump, num_blocks)
        for of_strand in reversed(dump.answer):
            self._copy_strand(of_strand, dump, len(of_strand.prompt.keys))

    def _copy_strand(self, dump: StrandDump, of_request: RequestDump, num_blocks: int) -> None:
        taken = dump.cursor.take(num_blocks)
        if not dump.cursor.todo:
            self._abort_slots(dump)
        parts, blocks, gone = parts_of(dump, taken, of_request, self._facts)
        dump.cursor.holes.update(gone)
        self._abort(dump, gone)
        if not blocks:
            return
        # The slots are those of the node cache that has given them.
        generation = self._session.told_generation
        job = DumpJob(self._session.next_id(), blocks, of_request.device_blocks, generation)
        dump.jobs.append(job)
        name = dump.prompt.request_id
        self._ledger.dump(name, job.job_id)
        self._jobs[job.job_id] = (dump, job)
        self._planned.append(CopyJob(job.job_id, name, job.generation, parts))
        if dump.reach != ALL:
            self._at_once.append(job.job_id)

    # -- endings ---------------------------------------------------------------------------

    def is_under_way(self, job_id: int) -> bool:
        return job_id in self._jobs

    def spoiled(self, device_blocks: set[int]) -> None:
        """These blocks, which a step has computed with, hold no KV: nor does what was computed
        behind them. Nothing of it is committed. Other requests may have shared them."""
        for of_strand, job in self._jobs.values():
            if job.touches(device_blocks):
                job.failed = True
                of_strand.cursor.lose(job.blocks[0])
        for dump in self._dumps.values():
            if touches(dump.device_blocks, device_blocks):
                self._close(dump)

    def prompt_of(self, job_id: int) -> Prompt | None:
        """The prompt whose blocks the job copies."""
        dump, _ = self._jobs.get(job_id, (None, None))
        return None if dump is None else dump.prompt

    def ended(self, job_id: int, *, failed: bool) -> None:
        """All ranks have copied. Commits what is complete in prompt order."""
        dump, job = self._jobs.pop(job_id, (None, None))
        if dump is None or job is None:
            return
        self._ledger.ended(job_id)
        job.ended, job.failed = True, job.failed or failed
        while dump.jobs and dump.jobs[0].ended:
            done = dump.jobs.popleft()
            if done.generation != self._session.generation:
                continue
            keys: list[bytes] = list(dump.keys_of(done.blocks))
            if done.failed:
                dump.cursor.fail(done.blocks)
                self._session.send(p.Abort(ns=dump.namespace, keys=keys))
            else:
                parents = dump.parents(done.blocks)
                self._session.send(p.Commit(ns=dump.namespace, keys=keys, parents=parents))

    def _give_up(self, dump: RequestDump) -> None:
        for of_strand in dump.all_strands:
            of_strand.cursor.give_up()
            self._abort_slots(of_strand)

    def _close(self, dump: RequestDump) -> None:
        for of_strand in dump.all_strands:
            of_strand.closed = True
        self._give_up(dump)

    def _abort_slots(self, dump: StrandDump) -> None:
        """Gives back slots that nothing will be copied into."""
        self._abort(dump, dump.cursor.take_unused())

    def _abort(self, dump: StrandDump, blocks: Iterable[int]) -> None:
        keys: list[bytes] = list(dump.keys_of(blocks))
        if keys:
            self._session.send(p.Abort(ns=dump.namespace, keys=keys))

    def forget_all(self) -> None:
        """What is being copied won't be committed, and nothing else begins. Jobs outlive their
        dumps: those of preempted requests run on. What waits to be committed waits for one of
        them."""
        for of_strand, _ in self._jobs.values():
            for job in of_strand.jobs:
                job.failed = True
        for dump in self._dumps.values():
            for of_strand in dump.all_strands:
                of_strand.cursor.lose(0)
            self._close(dump)

    def node_lost(self) -> None:
        """Slots are gone with the node cache; running copies go into memory nobody reads."""
        for dump in self._dumps.values():
            for of_strand in dump.all_strands:
                of_strand.cursor.node_lost()
